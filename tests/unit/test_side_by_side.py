"""Work that goes on side by side: order, threads, errors, and requests to end."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from functools import partial

import pytest
import torch
from conftest import ROOT

from fairseq_knnlm.calibration.side_by_side import Stopped, go_on, side_by_side

#: Is told to end by one of its works, while the others go on.
SCRIPT = """
import os, signal, threading, time
from fairseq_knnlm.calibration.side_by_side import go_on, side_by_side
from fairseq_knnlm.signals import end_on_request

signal.signal(signal.SIGINT, signal.default_int_handler)
end_on_request()
begun = threading.Barrier(3)

def work():
    if begun.wait() == 0:
        os.kill(os.getpid(), signal.{name})
    while True:
        go_on()
        time.sleep(0.001)

try:
    side_by_side([work] * 7, [1] * 7, workers=3)
except KeyboardInterrupt as error:
    print(type(error).__name__, threading.active_count())
"""


@pytest.mark.parametrize("workers", [1, 2, 5, 99])
def test_all_is_done_on_one_thread_each_and_returned_in_order(workers: int) -> None:
    begun: list[int] = []
    told: list[int] = []

    def work(number: int) -> tuple[int, int]:
        begun.append(number)
        return number * number, torch.get_num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = side_by_side(
            [partial(work, number) for number in range(8)], range(8), told.append, workers
        )
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert found == [(number * number, 1) for number in range(8)]
    assert sorted(begun) == sorted(told) == list(range(8))
    if workers == 1:  # the longest first
        assert begun == told == list(range(7, -1, -1))


def test_so_many_go_on_at_a_time() -> None:
    """As many as PyTorch has threads."""
    together = threading.Barrier(3)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert len({*side_by_side([lambda: together.wait(20)] * 3, [1] * 3)}) == 3
    finally:
        torch.set_num_threads(before)


def test_nothing_to_do_is_soon_done() -> None:
    assert side_by_side([], []) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_what_one_raises_is_raised_and_ends_the_others(workers: int) -> None:
    begun: list[str] = []
    ended: list[str] = []
    waiting = threading.Event()

    def fails() -> None:
        begun.append("fails")
        assert workers == 1 or waiting.wait(20)
        raise OSError("disk")

    def goes_on() -> None:
        begun.append("goes on")
        waiting.set()
        try:
            while True:
                go_on()
                time.sleep(0.001)
        except Stopped:
            ended.append("goes on")
            raise

    before, threads = torch.get_num_threads(), threading.active_count()
    with pytest.raises(OSError, match="disk"):
        side_by_side([fails, *[goes_on] * 5], [9, *[1] * 5], workers=workers)
    # None that had begun is left behind.
    assert begun[0] == "fails"
    assert ended == begun[1:]
    assert len(begun) == 1 if workers == 1 else len(begun) > 1
    assert threading.active_count() == threads
    assert torch.get_num_threads() == before


def test_elsewhere_work_goes_on() -> None:
    go_on()


@pytest.mark.parametrize(
    ("name", "kind"), [("SIGTERM", "Terminated"), ("SIGINT", "KeyboardInterrupt")]
)
def test_a_request_to_end_is_followed_at_once(name: str, kind: str) -> None:
    """And no thread is left behind."""
    command = [sys.executable, "-c", SCRIPT.format(name=name)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [kind, "1"]
    assert not done.stderr
