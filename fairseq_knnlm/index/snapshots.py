"""Snapshots of an index that is being filled, from which a build that was stopped goes on.

A snapshot is an index file and beside it ``snapshot.json``, which says what is being built, how
many of the datastore's rows the index holds, and the file's checksums. Rows are added in order, so
a build that goes on neither loses nor repeats one.
"""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec

from fairseq_knnlm.errors import IndexFileError
from fairseq_knnlm.files import (
    Checksum,
    altered,
    checksums,
    chunks_of,
    publish,
    read_sealed,
    write_sealed,
)
from fairseq_knnlm.index.storage import read_file, write_file

logger = logging.getLogger(__name__)

FORMAT = "fairseq-knnlm snapshot of a build"
VERSION = 2
CARD = "snapshot.json"
#: Seconds between two snapshots.
INTERVAL = 300.0


class _Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fields of ``snapshot.json``."""

    plan: dict[str, Any]
    rows: Annotated[int, msgspec.Meta(ge=0, le=2**62)]
    bytes: Annotated[int, msgspec.Meta(ge=1, le=2**62)]
    chunks: tuple[Checksum, ...]


class Snapshots:
    """The snapshots of one build.

    Args:
        folder: where they lie.
        plan: what is being built, as JSON has it. A snapshot of another plan is not used.
    """

    def __init__(self, folder: Path, plan: dict[str, Any]) -> None:
        self.folder = folder
        self.plan = plan
        self._last = time.monotonic()

    def latest(self) -> tuple[Any, int] | None:
        """The index as it was last, and the rows in it; None where there is nothing to go on from.

        A snapshot that is damaged or of another plan is passed over with a warning.
        """
        if not (self.folder / CARD).is_file():
            return None
        try:
            card, _ = read_sealed(self.folder / CARD, FORMAT, range(VERSION, VERSION + 1), _Card)
            if card.plan != self.plan:
                raise ValueError("it is of another build")
            file = self._file(card.rows)
            if not file.is_file() or file.stat().st_size != card.bytes:
                raise ValueError(f"{file.name} is missing or of another length")
            chunks = list(card.chunks)
            if len(chunks) != chunks_of(card.bytes) or altered(file, chunks, everything=True):
                raise ValueError(f"{file.name} is damaged (checksums differ)")
            index = read_file(file)
            if index.ntotal != card.rows:
                raise ValueError(f"it holds {index.ntotal:,} keys in the place of {card.rows:,}")
        except (ValueError, OSError, IndexFileError) as error:
            logger.warning("starting anew: %s cannot be used, %s", self.folder, error)
            return None
        return index, card.rows

    def take(self, index: Any, rows: int, *, now: bool = False) -> None:
        """Takes a snapshot of an index with so many rows, if the last is a while ago, or ``now``.

        Where it cannot be written, the build goes on with a warning, and the last one stays.
        """
        if not now and time.monotonic() - self._last < INTERVAL:
            return
        try:
            self._take(index, rows)
        except OSError as error:
            logger.warning(
                "no snapshot of the build in %s: %s. A build that is stopped starts from the last.",
                self.folder,
                error.strerror or error,
            )
        self._last = time.monotonic()

    def _take(self, index: Any, rows: int) -> None:
        file = self._file(rows)
        with publish(file) as temporary:
            write_file(index, temporary)
            size, chunks = temporary.stat().st_size, checksums(temporary)
        card = {"plan": self.plan, "rows": rows, "bytes": size, "chunks": chunks}
        try:
            write_sealed(self.folder / CARD, FORMAT, VERSION, card)
        except OSError:
            file.unlink(missing_ok=True)  # nothing names it
            raise
        for other in self.folder.iterdir():  # also what a killed process left
            if other.name not in (CARD, file.name):
                other.unlink(missing_ok=True)

    def clear(self) -> None:
        """Removes them, once the index is where it belongs."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, rows: int) -> Path:
        return self.folder / f"{rows}.index"
