"""The write steps of a process, counted, and one of them struck.

Loaded into a process that runs a command, never part of the package: it stands between the command
and what Python calls to change files (``os.rename``, ``os.unlink``, ``open`` for writing, the raw
``write`` below a buffer, ``fsync``, ``mmap.flush``, ...). Each such call below one folder is a
step. Before or after the n-th, or in the middle of it, happens what a ``Strike`` says.
"""

from __future__ import annotations

import atexit
import errno
import io
import mmap
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos_steps.losing import Losing

#: What can be done at a step. ``look`` only counts.
KINDS = {
    "before": "SIGKILL before the step",
    "after": "SIGKILL after it",
    "torn": "half of the bytes, or a copy of half the file, then SIGKILL",
    "lost": "SIGKILL after it, and what was not flushed to the disk is gone",
    "full": "ENOSPC at it, and at every later step that needs room",
    "failing": "EIO at it",
    "stop": "SIGSTOP before it",
    "slow": "every step takes a while",
    "look": "nothing",
}
#: Steps that need room on the disk.
GROWING = {"mkdir", "create", "write", "reserve", "link", "rename"}
#: The random part of a temporary name.
LETTERS = re.compile(r"(partial-)\w+")


@dataclass(frozen=True)
class Strike:
    """What happens to a process.

    Attributes:
        kind: of ``KINDS``.
        step: the number of the step, from 1; behind the last one nothing happens, but for
            ``lost``, which then happens at the end.
        seed: of what is lost.
    """

    kind: str = "look"
    step: int = 0
    seed: int = 0


class Striking:
    """Counts the steps below a folder.

    Args:
        folder: whose changes count.
        strike: what happens.
        log: a file outside of it; each step is written there before it is done.
    """

    def __init__(self, folder: Path, strike: Strike, log: Path) -> None:
        self.root = str(folder.resolve())
        self.strike = strike
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._steps = 0
        self._lock = threading.RLock()
        self._losing = Losing(log.with_suffix(".kept")) if strike.kind == "lost" else None

    def install(self) -> None:
        """Stands in the way of this process from here on."""
        for name, kind in (
            ("rename", "rename"),
            ("replace", "rename"),
            ("link", "link"),
            ("unlink", "unlink"),
            ("remove", "unlink"),
            ("mkdir", "mkdir"),
            ("rmdir", "rmdir"),
            ("chmod", "chmod"),
            ("fsync", "fsync"),
            ("posix_fallocate", "reserve"),
            ("ftruncate", "truncate"),
        ):
            setattr(os, name, self._wrapped(kind, getattr(os, name)))
        self._wrap_opening()
        atexit.register(self._at_end)

    def _wrapped(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            places = [_place(args[0], named.get("src_dir_fd", named.get("dir_fd")))]
            if kind in ("rename", "link"):
                places.append(_place(args[1], named.get("dst_dir_fd")))
            # Making what is there, or removing what is not, changes nothing.
            if kind in ("mkdir", "unlink") and os.path.lexists(places[0]) == (kind == "mkdir"):
                return real(*args, **named)
            return self.step(kind, places, lambda: real(*args, **named))

        return call

    def _wrap_opening(self) -> None:
        """Opening for writing, and what is written through it."""
        real_os_open, real_open = os.open, io.open
        striking = self

        def os_open(path: Any, flags: int, *args: Any, **named: Any) -> int:
            def do() -> int:
                return real_os_open(path, flags, *args, **named)

            place = _place(path, named.get("dir_fd"))
            # Naming a file that is there changes nothing.
            if flags & (os.O_CREAT | os.O_TRUNC) and not (
                os.path.lexists(place) and not flags & os.O_TRUNC
            ):
                return striking.step("create", [place], do)
            return do()

        class Raw(io.FileIO):
            """A file whose writes are steps."""

            def write(self, some: Any) -> int:
                view = memoryview(some).cast("B")
                place = _place(self.fileno(), None)

                def half() -> None:
                    io.FileIO.write(self, view[: len(view) // 2])

                return striking.step("write", [place], lambda: io.FileIO.write(self, view), half)

        def opened(
            file: Any, mode: str = "r", buffering: int = -1, *args: Any, **named: Any
        ) -> Any:
            changes = isinstance(file, str | os.PathLike) and set(mode) & set("wax+")
            if not changes or not striking.is_inside(_place(file, None)):
                return real_open(file, mode, buffering, *args, **named)
            plain = mode.replace("b", "").replace("t", "")
            place = _place(file, None)
            if set(mode) & set("wx") or not os.path.lexists(place):
                file_ = striking.step("create", [place], lambda: Raw(file, plain))
            else:
                file_ = Raw(file, plain)
            if buffering == 0:
                return file_
            both = io.BufferedRandom if "+" in mode else io.BufferedWriter
            buffered = both(file_)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, *args, **named)

        os.open = os_open
        io.open = opened
        import builtins

        builtins.open = opened
        self._wrap_maps()

    def _wrap_maps(self) -> None:
        import numpy as np

        real = np.memmap.flush
        striking = self

        def flush(array: Any) -> None:
            if isinstance(array._mmap, mmap.mmap) and array.filename is not None:
                striking.step("flush", [str(array.filename)], lambda: real(array))
            else:
                real(array)

        np.memmap.flush = flush  # type: ignore[method-assign,assignment]

    def is_inside(self, place: str) -> bool:
        """Whether something lies in the folder that is looked at."""
        return place == self.root or place.startswith(self.root + os.sep)

    def step(
        self,
        kind: str,
        places: list[str],
        do: Callable[[], Any],
        half: Callable[[], None] | None = None,
    ) -> Any:
        """Does a step, or what is to happen in its place."""
        if not any(map(self.is_inside, places)):
            return do()
        with self._lock:
            self._steps += 1
            names = [LETTERS.sub(r"\1", os.path.relpath(place, self.root)) for place in places]
            os.write(self._log, f"{kind} {' -> '.join(names)}\n".encode())
            strike, here = self.strike, self._steps == self.strike.step
            if strike.kind == "slow":
                time.sleep(0.002)
            if here and strike.kind == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if here and strike.kind == "before":
                _die()
            if here and strike.kind == "torn" and half is not None:
                half()
                _die()
            if here and strike.kind == "failing":
                raise OSError(errno.EIO, os.strerror(errno.EIO), places[-1])
            reached = 0 < strike.step <= self._steps
            if reached and strike.kind == "full" and kind in GROWING:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), places[-1])
            done = self._done(kind, places, do)
            if here and strike.kind in ("after", "torn"):
                _die()
            if here and strike.kind == "lost":
                self._lose()
            return done

    def _done(self, kind: str, places: list[str], do: Callable[[], Any]) -> Any:
        if self._losing is None:
            return do()
        note = self._losing.before(kind, places)
        found = do()
        note()
        return found

    def _lose(self) -> None:
        assert self._losing is not None
        self._losing.lose(random.Random(self.strike.seed))
        _die()

    def _at_end(self) -> None:
        os.write(self._log, b"end\n")
        if self.strike.kind == "lost" and self._steps < self.strike.step:
            self._lose()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _place(path: Any, folder: int | None) -> str:
    """The whole name of what a call names: a path, one below an open folder, or an open file."""
    if isinstance(path, int):
        name = os.readlink(f"/proc/self/fd/{path}")
        return name.removesuffix(" (deleted)")
    name = os.fsdecode(path)
    if folder is not None:
        name = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
    return os.path.join(os.path.realpath(os.path.dirname(name) or "."), os.path.basename(name))
