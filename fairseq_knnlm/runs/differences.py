"""How entries that were computed again differ from those that are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fairseq_knnlm.errors import DatastoreError
from fairseq_knnlm.runs.findings import WRONG, Finding

#: Share of a key's length, and of a block's codes, that may differ where another processor, other
#: libraries or other batches compute. What float16 rounds off a number is a twentieth of that.
TOLERATED = 0.01


@dataclass(frozen=True)
class Computed:
    """Entries that were computed again.

    Attributes:
        rows: (n,) int64, in the text.
        keys: (n, D), as the model has them.
        values: (n,) token ids.
    """

    rows: np.ndarray
    keys: np.ndarray
    values: np.ndarray


@dataclass
class Difference:
    """How entries computed again differ from those that are stored, of one block.

    Attributes:
        rows: that were compared.
        values: that are others; ``first_value``, the row of the first of them.
        keys: that are others, if only in a bit, or codes in their place; ``first_key``, the row of
            the first of them.
        farthest: the largest distance between the two keys of a row, as a share of their length.
    """

    rows: int = 0
    values: int = 0
    first_value: int = -1
    keys: int = 0
    first_key: int = -1
    farthest: float = 0.0

    def add_values(self, rows: np.ndarray, new: np.ndarray, stored: np.ndarray) -> None:
        """Compares values (n,) of these rows (n,)."""
        differ = rows[new != stored]
        self.rows += len(rows)
        self.values += len(differ)
        self.first_value = _first(self.first_value, differ)

    def add_keys(self, rows: np.ndarray, new: np.ndarray, stored: np.ndarray) -> None:
        """Compares keys (n, D) of these rows (n,), bit for bit in the type of those stored."""
        with np.errstate(over="ignore"):
            new = np.ascontiguousarray(new.astype(stored.dtype))
        differ = _other_bytes(new, stored)
        self.keys += int(differ.sum())
        self.first_key = _first(self.first_key, rows[differ])
        if differ.any():
            ours, theirs = (keys[differ].astype(np.float64) for keys in (new, stored))
            lengths = np.maximum(np.linalg.norm(ours, axis=1), np.finfo(np.float32).tiny)
            apart = np.linalg.norm(ours - theirs, axis=1) / lengths
            self.farthest = max(self.farthest, float(apart.max()))

    def add_codes(self, new: np.ndarray, stored: np.ndarray) -> None:
        """Compares codes (rows, S) of all rows."""
        differ = np.flatnonzero(_other_bytes(new, stored))
        self.keys += len(differ)
        self.first_key = _first(self.first_key, differ)

    def finding(self, path: Path, what: str, doubts: Sequence[str]) -> Finding:
        """What is said of the block.

        Args:
            path: its folder.
            what: was compared: ``"float16"`` keys, ``"values and codes"`` or ``"values alone"``.
            doubts: why last digits may differ, though all be right.
        """
        said = f"{self.rows:,} entries computed again"
        compared = f"keys in {what}, and values" if what.startswith("float") else what
        if not (self.values or self.keys):
            return Finding(path, f"{said}: the same, bit for bit ({compared})")
        if not self.values and doubts and self._is_rounding(what):
            how = self._how(what)
            return Finding(path, f"{said}: the same but for rounding: {how} ({'; '.join(doubts)})")
        error = DatastoreError(
            f"{path} is not what this checkpoint makes of this text",
            expected=f"the same {self.rows:,} entries, bit for bit",
            found="; ".join([self._how(what), *doubts]),
            do="save the datastore again, or restore it from a copy",
        )
        return Finding(path, WRONG, (error,))

    def _is_rounding(self, what: str) -> bool:
        if what.startswith("float"):
            return self.farthest <= TOLERATED
        return self.keys <= TOLERATED * self.rows

    def _how(self, what: str) -> str:
        parts = []
        if self.values:
            parts.append(f"{self.values:,} other values, the first in row {self.first_value:,}")
        if self.keys and what.startswith("float"):
            parts.append(
                f"{self.keys:,} other keys, the first in row {self.first_key:,}, apart by up to "
                f"{self.farthest:.2g} of their length"
            )
        elif self.keys:
            parts.append(f"{self.keys:,} other codes, the first in row {self.first_key:,}")
        return ", and ".join(parts)


def _other_bytes(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """(n,) bool, the rows of two arrays (n, D) of one type that differ in a bit."""
    views = [np.ascontiguousarray(one).view(np.uint8) for one in (ours, theirs)]
    return (views[0] != views[1]).any(axis=1)


def _first(known: int, rows: np.ndarray) -> int:
    """The first of rows (n,) and of one that is known; -1 stands for none."""
    found = [int(rows.min())] if len(rows) else []
    return min(found + ([known] if known >= 0 else []), default=-1)
