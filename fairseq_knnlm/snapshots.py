"""Snapshots of an index that is being filled, from which a build that was stopped goes on.

A snapshot is an index file and beside it ``snapshot.json``, which says what is being built and how
many of the datastore's rows the index holds. Rows are added in order, so a build that goes on
neither loses nor repeats one.
"""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any

from fairseq_knnlm.errors import IndexFileError
from fairseq_knnlm.files import publish, read_sealed, write_sealed
from fairseq_knnlm.index import read_file, write_file

logger = logging.getLogger(__name__)

FORMAT = "fairseq-knnlm snapshot of a build"
VERSION = 1
#: Seconds between two snapshots.
INTERVAL = 300.0


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
        if not (self.folder / "snapshot.json").is_file():
            return None
        try:
            fields, _ = read_sealed(self.folder / "snapshot.json", FORMAT, VERSION, dict)
            plan, rows = fields["plan"], fields["rows"]
            if plan != self.plan:
                raise ValueError("it is of another build")
            index = read_file(self._file(rows))
            if index.ntotal != rows:
                raise ValueError(f"it holds {index.ntotal:,} keys in the place of {rows:,}")
        except (ValueError, IndexFileError) as error:
            logger.warning("starting anew: %s cannot be used, %s", self.folder, error)
            return None
        return index, rows

    def take(self, index: Any, rows: int) -> None:
        """Takes a snapshot of an index with so many rows, if the last is a while ago."""
        if time.monotonic() - self._last < INTERVAL:
            return
        with publish(self._file(rows)) as temporary:
            write_file(index, temporary)
        write_sealed(
            self.folder / "snapshot.json", FORMAT, VERSION, {"plan": self.plan, "rows": rows}
        )
        for old in self.folder.glob("*.index"):
            if old != self._file(rows):
                old.unlink()
        self._last = time.monotonic()

    def clear(self) -> None:
        """Removes them, once the index is where it belongs."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, rows: int) -> Path:
        return self.folder / f"{rows}.index"
