"""Several arrays, one after another, that read as one without being copied together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class Stacked:
    """Arrays of one type and width that read as their concatenation.

    It takes the place of a NumPy array where rows are read: ``len``, ``shape``, ``dtype``, and rows
    by a slice or by an array of row numbers, which come as a NumPy array.

    Args:
        parts: one or more, each (n, ...), mapped or in memory.
    """

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = tuple(parts)
        self.dtype = self.parts[0].dtype
        #: (parts + 1,) int64: the first row of each part, and the number of all rows.
        self.starts = np.cumsum([0, *map(len, self.parts)])
        self.shape = (int(self.starts[-1]), *self.parts[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Rows by a slice, or by integers (n,) from 0 on.

        Raises:
            IndexError: where there is no such row.
        """
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step < 0:
                return self[np.arange(start, stop, step)]
            return self._between(start, stop)[::step]
        rows = np.asarray(rows)
        if rows.ndim == 0:
            return self[rows[None]][0]
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min():,} to {rows.max():,} of {len(self):,}")
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        homes = np.searchsorted(self.starts, rows, side="right") - 1
        for home in np.unique(homes):
            here = homes == home
            found[here] = self.parts[home][rows[here] - self.starts[home]]
        return found

    def _between(self, start: int, stop: int) -> np.ndarray:
        """The rows from ``start`` to before ``stop``; a view where they lie in one part."""
        found = [
            part[max(start - first, 0) : stop - first]
            for first, part in zip(self.starts, self.parts, strict=False)
            if start < first + len(part) and first < stop
        ]
        if len(found) == 1:
            return found[0]
        return np.concatenate(found or [self.parts[0][:0]])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All rows, copied together."""
        return np.concatenate(self.parts).astype(dtype or self.dtype, copy=False)


#: Keys of a datastore: of one block, or of several.
Rows = np.ndarray | Stacked
