import threading

import pytest

from hf_mel.inference.prefetch import computed_ahead


def is_running() -> bool:
    return any(thread.name.startswith("ahead") for thread in threading.enumerate())


def test_items_come_in_order_and_some_are_computed_ahead():
    computed = []

    def items():
        for item in range(7):
            computed.append(threading.current_thread())
            yield item * item

    for number, item in enumerate(computed_ahead(items(), ahead=2)):
        assert item == number * number
        assert len(computed) <= number + 4  # this one, two that wait, and one that is computed
    assert len(computed) == 7
    assert len(set(computed)) == 1
    assert computed[0] is not threading.main_thread()
    assert not is_running()


def test_the_next_item_is_computed_while_the_caller_works():
    second = threading.Event()

    def items():
        yield 1
        second.set()
        yield 2

    taken = computed_ahead(items())
    assert next(taken) == 1
    assert second.wait(60)
    assert list(taken) == [2]


def test_no_items_give_none():
    assert list(computed_ahead([])) == []
    assert list(computed_ahead([None, 0])) == [None, 0]


def test_an_error_comes_when_its_item_is_due():
    def items():
        yield 0
        yield 1
        raise KeyError("two")

    taken = computed_ahead(items(), ahead=3)
    assert [next(taken), next(taken)] == [0, 1]
    with pytest.raises(KeyError, match="two"):
        next(taken)
    assert not is_running()


def test_a_caller_that_stops_ends_the_thread():
    computed = []
    taken = computed_ahead((computed.append(number) for number in range(100)), ahead=1)
    next(taken)
    taken.close()
    assert len(computed) < 5
    assert not is_running()
