"""Work in forks of this process, a few at a time."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from fault_cases.stage import BadOutcome

T = TypeVar("T")
#: Seconds after which a whole case is ended.
PATIENCE = 300.0


def in_forks(
    work: Iterable[T], do: Callable[[T, Path], Any], folder: Path, jobs: int
) -> Iterator[tuple[T, Any, str]]:
    """Does work in forks of this process.

    Args:
        work: taken as forks become free.
        do: what a fork does with it, given a path that is its own; returns what JSON can hold.
        folder: of these paths.
        jobs: forks at a time.

    Yields:
        What was done, in the order in which it ended: the work, what ``do`` returned, and what was
        bad; that is empty where all was well.
    """
    waiting, running = iter(work), dict[int, tuple[T, Path, float]]()
    more, count = True, 0
    try:
        while more or running:
            while more and len(running) < jobs:
                try:
                    each = next(waiting)
                except StopIteration:
                    more = False
                    break
                count += 1
                path = folder / f"case-{count}"
                running[_fork(each, do, path)] = each, path, time.monotonic()
            for pid in [pid for pid, (_, _, begun) in running.items() if _ended(pid, begun)]:
                each, path, _ = running.pop(pid)
                yield each, *_result(path)
            time.sleep(0.002)
    finally:
        for pid in running:
            os.killpg(pid, signal.SIGKILL)


def _fork(each: T, do: Callable[[T, Path], Any], path: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        found, bad = None, ""
        try:
            found = do(each, path)
        except BadOutcome as outcome:
            bad = str(outcome)
        except Exception:
            bad = f"the case itself failed: {traceback.format_exc(limit=-3)}"
        path.with_suffix(".json").write_text(json.dumps([found, bad]))
    finally:
        os._exit(0)


def _ended(pid: int, begun: float) -> bool:
    if time.monotonic() - begun > PATIENCE:
        os.killpg(pid, signal.SIGKILL)
    return os.waitpid(pid, os.WNOHANG)[0] != 0


def _result(path: Path) -> tuple[Any, str]:
    file = path.with_suffix(".json")
    if not file.exists():
        return None, f"did not end within {PATIENCE:.0f} s"
    found, bad = json.loads(file.read_text())
    file.unlink()
    return found, bad
