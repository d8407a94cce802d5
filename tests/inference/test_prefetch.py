import threading

import pytest

from hf_mel.inference.prefetch import computed_ahead


def test_results_come_in_order_and_some_are_computed_ahead():
    computed = []

    def compute(item):
        computed.append((item, threading.current_thread()))
        return item * item

    taken = []

    def items():
        for item in range(7):
            taken.append(item)
            yield item

    for number, result in enumerate(computed_ahead(compute, items(), ahead=2)):
        assert result == number * number
        assert taken == list(range(min(number + 3, 7)))
    assert [item for item, _ in computed] == list(range(7))
    assert len({thread for _, thread in computed}) == 1
    assert computed[0][1] is not threading.main_thread()


def test_no_items_give_no_results():
    assert list(computed_ahead(lambda item: item, [])) == []


def test_an_error_comes_when_its_result_is_due():
    def compute(item):
        if item == 2:
            raise KeyError("two")
        return item

    results = computed_ahead(compute, range(5), ahead=3)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(KeyError, match="two"):
        next(results)


def test_a_caller_that_stops_ends_the_thread():
    computed = []
    results = computed_ahead(lambda item: computed.append(item), range(100), ahead=1)
    next(results)
    results.close()
    assert len(computed) < 4
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
