"""Work that goes on side by side, each piece of it on one thread.

So what comes of it does not depend on how many pieces go on at a time. They are threads of one
process, which share a score table as it is: nearly all that a fit does is done by NumPy and
PyTorch, which let other threads go on meanwhile. The small networks that it trains gain next to
nothing by more threads each.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from fairseq_knnlm.signals import undisturbed

T = TypeVar("T")

#: Seconds that are waited at a time. A request to end that comes just before a wait begins, or that
#: the system gives to another thread, is heard of when the wait ends.
MOMENT = 0.5

_mine = threading.local()


class Stopped(Exception):
    """Nobody waits for this piece of work any more."""


def go_on() -> None:
    """Work that takes long calls it now and then, so that it ends where nobody waits for it.

    Raises:
        Stopped: where other work beside this one has failed, or a user interrupted it all.
    """
    stop: threading.Event | None = getattr(_mine, "stop", None)
    if stop is not None and stop.is_set():
        raise Stopped


def side_by_side(
    works: Sequence[Callable[[], T]],
    sizes: Sequence[float],
    told: Callable[[int], object] = lambda place: None,
    workers: int | None = None,
) -> list[T]:
    """Does all works, so many at a time.

    Args:
        works: are called without anything. The process's own random numbers are not for them.
        sizes: what each of them takes, roughly and in any unit: the longest begin first, so that at
            the end nobody works on while others have nothing left to do.
        told: is called with the place of each as it ends, in this thread.
        workers: at a time; as many as PyTorch has threads where left out. With one it is this
            thread that works.

    Returns:
        What they return, in the order of the works.

    Raises:
        Exception: what one of them raised first; all others have ended then.
    """
    order = sorted(range(len(works)), key=lambda place: -sizes[place])
    threads, found = torch.get_num_threads(), dict[int, T]()
    workers = min(workers or threads, len(works))
    torch.set_num_threads(1)
    try:
        if workers > 1:
            _in_threads(works, order, workers, found, told)
        else:
            for place in order:
                found[place] = works[place]()
                told(place)
    finally:
        torch.set_num_threads(threads)
    return [found[place] for place in range(len(works))]


def _in_threads(
    works: Sequence[Callable[[], T]],
    order: Sequence[int],
    workers: int,
    found: dict[int, T],
    told: Callable[[int], object],
) -> None:
    stop = threading.Event()

    def begin() -> None:
        torch.set_num_threads(1)  # a number that each thread has for itself
        _mine.stop = stop

    pool = ThreadPoolExecutor(workers, initializer=begin)
    try:
        # A thread that was interrupted as it began is unknown to its pool, and never ends.
        with undisturbed():
            places = {pool.submit(works[place]): place for place in order}
        left = {*places}
        while left:
            done, left = wait(left, MOMENT, FIRST_COMPLETED)
            for future in done:
                found[places[future]] = future.result()
                told(places[future])
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
