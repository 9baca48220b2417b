"""How far a run is, in a small file that it writes while it goes on: for whoever waits for it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from fairseq_knnlm.files import parse_json, partial_prefix, typed

if TYPE_CHECKING:
    from fairseq_knnlm.runs.scorer import Batch

#: Seconds between two times that it is written.
EVERY = 1.0


class Progress(msgspec.Struct, frozen=True):
    """What the file says.

    Attributes:
        tokens: that are scored.
        of: tokens of the split, of which this run may have a share.
    """

    tokens: int
    of: int


class TellsProgress:
    """Counts the tokens that are scored, and says so once a second.

    Args:
        path: the file.
        of: tokens of the split.
    """

    def __init__(self, path: Path, of: int) -> None:
        self._path = path
        self._new = path.with_name(f"{partial_prefix(path)}told")
        self._of = of
        self._tokens = 0
        self._due = time.monotonic()

    def take(self, batch: Batch) -> None:
        self._tokens += int((batch.rows >= 0).sum())
        if time.monotonic() >= self._due:
            self.tell()
            self._due = time.monotonic() + EVERY

    def tell(self) -> None:
        """Writes the file; where that cannot be, the run is worth more than to end for it."""
        with suppress(OSError):  # no folder is made anew, and nothing flushed to the disk
            self._new.write_text(json.dumps({"tokens": self._tokens, "of": self._of}) + "\n")
            self._new.replace(self._path)


def progress_of(files: Iterable[Path]) -> tuple[int | None, int]:
    """How many tokens there are, where a file says it, and how many are scored by all shares.

    Args:
        files: of the shares of one run; those that are not there yet count nothing.
    """
    total, done = None, 0
    for path in files:
        try:
            found = typed(parse_json(path.read_text(encoding="utf-8")), Progress)
        except (OSError, ValueError):
            continue
        total, done = found.of, done + found.tokens
    return total, done
