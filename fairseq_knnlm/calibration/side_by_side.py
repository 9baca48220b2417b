"""Work that goes on side by side, each piece of it on one thread.

So what comes of it does not depend on how many pieces go on at a time. They are threads of one
process, which share a score table as it is: nearly all that a fit does is done by NumPy and
PyTorch, which let other threads go on meanwhile. The small networks that it trains gain next to
nothing by more threads each.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch

from fairseq_knnlm.signals import undisturbed

T = TypeVar("T")

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
    told: Callable[[int], object] = lambda place: None,
    workers: int | None = None,
) -> list[T]:
    """Does all works, so many at a time, and begins them in their order.

    Args:
        works: are called without anything. The process's own random numbers are not for them.
        told: is called with the place of each as it ends, in this thread.
        workers: at a time; as many as PyTorch has threads where left out. With one it is this
            thread that works.

    Returns:
        What they return, in their order.

    Raises:
        Exception: what one of them raised first; all others have ended then.
    """
    threads = torch.get_num_threads()
    workers = min(workers or threads, len(works))
    torch.set_num_threads(1)
    try:
        return _in_threads(works, told, workers) if workers > 1 else _in_turn(works, told)
    finally:
        torch.set_num_threads(threads)


def _in_turn(works: Sequence[Callable[[], T]], told: Callable[[int], object]) -> list[T]:
    found = []
    for place, work in enumerate(works):
        found.append(work())
        told(place)
    return found


def _in_threads(
    works: Sequence[Callable[[], T]], told: Callable[[int], object], workers: int
) -> list[T]:
    stop = threading.Event()

    def begin() -> None:
        torch.set_num_threads(1)  # which OpenMP knows of each thread by itself
        _mine.stop = stop

    pool = ThreadPoolExecutor(workers, initializer=begin)
    try:
        # A thread that was interrupted as it began is unknown to its pool, and never ends. Those
        # begun here leave all signals to this one.
        with undisturbed():
            places = {pool.submit(work): place for place, work in enumerate(works)}
        for future in as_completed(places):
            future.result()
            told(places[future])
        return [future.result() for future in places]
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
