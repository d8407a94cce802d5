"""Work that a second thread does ahead of the first."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")

_END: Any = object()


def computed_ahead(items: Iterable[Item], *, ahead: int = 1) -> Iterator[Item]:
    """Yields the items of a generator, whose next ones a second thread computes while the caller works.

    It computes one at a time, because processors and tokenizers cannot run in several threads at once. For the same reason,
    the caller leaves alone what the generator uses. Modes of torch that the caller has set, such as inference mode and
    autocast, do not hold in the thread. An error of the generator is raised when its item is due.

    Args:
        items (iterable): The items.
        ahead (`int`): Number of items that wait for the caller, at most, beside the one that is computed.
    """
    iterator, waiting = iter(items), deque[Future[Any]]()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        try:
            waiting.extend(thread.submit(next, iterator, _END) for _ in range(ahead + 1))
            while (item := waiting.popleft().result()) is not _END:
                waiting.append(thread.submit(next, iterator, _END))
                yield item
        finally:
            for future in waiting:
                future.cancel()
