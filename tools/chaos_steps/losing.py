"""What a power cut takes: bytes that were not flushed, and names whose folder was not.

As Lucene's MockDirectoryWrapper does it. A file keeps the bytes that it had when it was flushed
last, and of later ones some or none. A folder keeps the changes of its names up to when it was
flushed last, and of later ones the first few or none; folders lose theirs apart from each other.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Those of the system: the others are stood in the way of.
_open, _link, _rename, _unlink, _mkdir, _ftruncate, _rmdir = (
    *(os.open, os.link, os.rename, os.unlink, os.mkdir, os.ftruncate, os.rmdir),
)
Identity = tuple[int, int]


@dataclass(frozen=True)
class Change:
    """Of the names in a folder.

    Attributes:
        folder: whose.
        undo: takes it back.
    """

    folder: Identity
    undo: Callable[[], object]


class Losing:
    """Keeps account of what is not on the disk.

    Args:
        kept: a folder, on the same disk, for what is removed and could come back.
    """

    def __init__(self, kept: Path) -> None:
        self._kept = kept
        kept.mkdir(exist_ok=True)
        self._names: list[Change] = []
        #: Files by identity: an open one, and its bytes that are on the disk.
        self._files: dict[Identity, tuple[int, int]] = {}
        self._count = 0

    def before(self, kind: str, places: list[str]) -> Callable[[], None]:
        """Looks at what a step is about to change; the result notes it, once it is done."""
        place = places[-1]
        backup = self._backup(place) if kind in ("rename", "unlink") else None
        size = os.stat(place).st_size if os.path.isfile(place) else 0
        was_there = os.path.lexists(place)

        def note() -> None:
            if kind == "fsync":
                self._flushed(place)
            elif kind in ("reserve", "truncate", "write", "create"):
                self._dirty(place, size)
                if kind == "create" and not was_there:
                    self._change(place, lambda at, name: _unlink(name, dir_fd=at))
            elif kind == "mkdir":
                self._change(place, lambda at, name: shutil.rmtree(name, dir_fd=at))
            elif kind == "rmdir":
                self._change(place, lambda at, name: _mkdir(name, dir_fd=at))
            elif kind == "link":
                self._change(place, lambda at, name: _unlink(name, dir_fd=at))
            elif kind == "unlink":
                self._change(place, lambda at, name: _put_back(backup, at, name))
            elif kind == "rename":
                self._renamed(places[0], place, backup)

        return note

    def _backup(self, place: str) -> str | None:
        """Keeps a file that is to go."""
        if not os.path.isfile(place):
            return None
        self._count += 1
        to = str(self._kept / str(self._count))
        _link(place, to)
        return to

    def _change(self, place: str, undo: Callable[[int, str], object]) -> None:
        folder, name = os.path.split(place)
        at = _open(folder, os.O_RDONLY | os.O_DIRECTORY)  # whatever it is called later
        self._names.append(Change(_identity(at), lambda: undo(at, name)))

    def _renamed(self, old: str, new: str, backup: str | None) -> None:
        before = _open(os.path.dirname(old), os.O_RDONLY | os.O_DIRECTORY)

        def undo(at: int, name: str) -> None:
            _rename(name, os.path.basename(old), src_dir_fd=at, dst_dir_fd=before)
            _put_back(backup, at, name)

        self._change(new, undo)

    def _dirty(self, place: str, size: int) -> None:
        if os.path.isfile(place) and not os.path.islink(place):
            file = _open(place, os.O_RDWR)
            if self._files.setdefault(_identity(file), (file, size))[0] != file:
                os.close(file)

    def _flushed(self, place: str) -> None:
        found = os.stat(place)
        identity = found.st_dev, found.st_ino
        self._names = [change for change in self._names if change.folder != identity]
        if identity in self._files:
            self._files[identity] = self._files[identity][0], found.st_size

    def lose(self, rng: random.Random) -> None:
        """Takes what is not on the disk."""
        for file, size in self._files.values():
            there = os.fstat(file).st_size
            if there > size:
                _ftruncate(file, rng.choice((size, (size + there) // 2)))
        kept: dict[Identity, int] = {}
        for folder in sorted({change.folder for change in self._names}):
            changes = sum(change.folder == folder for change in self._names)
            kept[folder] = rng.choice((0, 0, rng.randint(0, changes)))
        gone = []
        for change in self._names:
            kept[change.folder] -= 1
            if kept[change.folder] < 0:
                gone.append(change)
        for change in reversed(gone):
            with contextlib.suppress(OSError):  # its folder went before
                change.undo()


def _put_back(backup: str | None, at: int, name: str) -> None:
    if backup is not None:
        with contextlib.suppress(FileExistsError):
            _link(backup, name, dst_dir_fd=at)


def _identity(handle: int) -> Identity:
    found = os.fstat(handle)
    return found.st_dev, found.st_ino
