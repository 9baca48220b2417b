"""Who writes what: one process at a time, under a temporary name that can be told from others'."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import IO, ClassVar

from fairseq_knnlm.errors import BusyError
from fairseq_knnlm.files.folders import make_folders
from fairseq_knnlm.signals import undisturbed


class Claim:
    """Makes this process the only one that writes ``path``, until released or until it ends.

    A lock that dies with its process (``flock`` on ``.NAME.lock`` beside it). Who holds it owns all
    that is temporary of that name, so what a killed process left there is removed. A process may
    claim a path several times over; other processes are refused meanwhile.

    Args:
        path: what will be written, a file or a folder; its folder is made where it is missing.

    Raises:
        BusyError: where another process writes it.
        OSError: where nothing can be written there.
    """

    #: How many times over this process holds a lock, and its open file.
    _held: ClassVar[dict[Path, tuple[int, IO[bytes]]]] = {}

    def __init__(self, path: Path) -> None:
        make_folders(path.parent)
        lock = path.parent.resolve() / f".{path.name}.lock"
        with undisturbed():
            times, file = self._held.get(lock) or (0, _locked(lock, path))
            self._held[lock] = times + 1, file
            # Also where an exception leaves it behind, and at the end of the process.
            self.release = weakref.finalize(self, _let_go, self._held, lock)
        if not times:
            remove_partial(path)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _locked(lock: Path, path: Path) -> IO[bytes]:
    """The lock's file, open and locked."""
    while True:
        file = lock.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                return file
        except BlockingIOError:
            file.close()
            raise BusyError(
                f"another process is writing {path}",
                expected="one at a time",
                found=f"a living process that holds {lock}",
                do="wait until it ends, or write somewhere else",
            ) from None
        except FileNotFoundError:
            pass
        file.close()  # it was removed by its owner while this process took hold of it: again


def _let_go(held: dict[Path, tuple[int, IO[bytes]]], lock: Path) -> None:
    with undisturbed():
        times, file = held.pop(lock)
        if times > 1:
            held[lock] = times - 1, file
        else:
            lock.unlink(missing_ok=True)
            file.close()


def partial_prefix(path: Path) -> str:
    """What the names of temporary files and folders of ``path`` begin with."""
    return f".{path.name}.partial-"


def partial_folder(path: Path) -> tempfile.TemporaryDirectory:
    """A temporary folder beside ``path``, removed when it is forgotten or the process ends."""
    prefix = partial_prefix(path)
    with undisturbed():
        return tempfile.TemporaryDirectory(
            prefix=prefix, dir=path.parent, ignore_cleanup_errors=True
        )


def remove_partial(path: Path) -> None:
    """Removes what a process that was killed left of ``path``; for who holds the claim to it."""
    prefix = partial_prefix(path)
    for left in [one for one in path.parent.iterdir() if one.name.startswith(prefix)]:
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Removes what killed processes left in a folder of things that are claimed, if it is there."""
    for left in list(folder.iterdir()) if folder.is_dir() else ():
        name = re.fullmatch(r"\.(.+)\.(lock|partial-.*)", left.name)
        if name is not None:
            try:
                Claim(folder / name[1]).release()
            except BusyError:  # of a living one
                continue
