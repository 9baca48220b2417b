"""Work that goes on in a thread while the next is prepared: reading ahead, writing behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from fairseq_knnlm.signals import undisturbed

T = TypeVar("T")


def ahead(items: Iterable[T]) -> Iterator[T]:
    """Yields ``items``; while one is used, a thread already makes the next."""
    source, nothing = iter(items), object()
    with ThreadPoolExecutor(max_workers=1) as thread:
        upcoming = thread.submit(next, source, nothing)
        while (item := upcoming.result()) is not nothing:
            upcoming = thread.submit(next, source, nothing)
            yield item  # type: ignore[misc]


class Behind:
    """Calls a function in a thread, in order, while the caller goes on.

    Args:
        work: the function.
        pending: calls that may wait, which bounds the memory that their arguments hold.
    """

    def __init__(self, work: Callable[..., object], pending: int = 4) -> None:
        self._work = work
        self._pending = pending
        self._calls: deque[Future[object]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1)
        # A thread that was interrupted as it began is unknown to its pool, and never ends.
        with undisturbed():
            self._thread.submit(int)

    def __call__(self, *inputs: Any) -> None:
        """Has ``work(*inputs)`` done soon; raises what an earlier call raised."""
        while len(self._calls) >= self._pending:
            self._calls.popleft().result()
        self._calls.append(self._thread.submit(self._work, *inputs))

    def wait(self) -> None:
        """Returns when everything is done; raises what a call raised."""
        while self._calls:
            self._calls.popleft().result()
