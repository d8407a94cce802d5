"""Work that a second thread does ahead of the first."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def computed_ahead(compute: Callable[[Item], Result], items: Iterable[Item], *, ahead: int = 1) -> Iterator[Result]:
    """Yields `compute(item)` of each item, in order. A second thread computes the next ones while the caller works.

    It computes one at a time, because processors and tokenizers cannot run in several threads at once. For the same reason,
    the caller leaves alone what `compute` uses. Modes of torch that the caller has set, such as inference mode and autocast,
    do not hold in the thread.

    Args:
        compute: Takes an item. An error that it raises is raised when its result is due.
        items (iterable): The items, which are taken in the caller's thread.
        ahead (`int`): Number of results that wait for the caller, at most.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        try:
            for item in items:
                waiting.append(thread.submit(compute, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
