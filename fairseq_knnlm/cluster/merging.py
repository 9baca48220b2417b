"""Neighbours from several shards, merged; and which of them may be missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fairseq_knnlm.index.library import faiss, one_thread


class Found(NamedTuple):
    """What a shard, or all of them, found of N queries.

    Attributes:
        distances: (N, k) float32, of the index, best first.
        rows: (N, k) integers, of the whole datastore; -1 where there are no more.
        values: (N, k) token ids, anything where there are no more; None where not asked for.
        exact: (N, k) float32, squared L2 or the negative inner product on the stored keys, anything
            where there are no more; None where not asked for.
    """

    distances: np.ndarray
    rows: np.ndarray
    values: np.ndarray | None = None
    exact: np.ndarray | None = None

    def each(self, change: Callable[[np.ndarray], np.ndarray]) -> Found:
        """The same of every array that is there."""
        return _found([None if part is None else change(part) for part in self])

    @property
    def width(self) -> int:
        """Neighbours a query, k."""
        return int(self.rows.shape[1])


def joined(found: Sequence[Found]) -> Found:
    """What was found of some queries, and then of others, in arrays of their own."""
    columns = list(zip(*found, strict=True))
    parts = [None if column[0] is None else np.concatenate(column) for column in columns]
    return _found(parts)


def merged(found: Sequence[Found], k: int, *, largest: bool) -> Found:
    """The k best of what shards found.

    Args:
        found: of each shard, of any width up to k.
        k: neighbours a query.
        largest: whether the best are the largest, as inner products are.
    """
    if len(found) == 1 and found[0].width == k:
        return found[0]
    shape = len(found), len(found[0].rows), k
    distances, places = np.empty(shape, np.float32), np.empty(shape, np.int64)
    first = 0
    for some, theirs, own in zip(found, distances, places, strict=True):
        stop = some.width
        theirs[:, :stop] = some.distances
        own[:, :stop] = np.arange(first, first + stop)
        if (some.rows[:, -1] < 0).any():
            own[:, :stop][some.rows < 0] = -1
        own[:, stop : stop + 1] = -1  # where FAISS stops
        first += stop
    with one_thread():
        best, chosen = faiss.merge_knn_results(distances, places, keep_max=largest)
    missing = chosen < 0
    some_missing = bool(missing.any())
    if some_missing:
        chosen[missing] = 0
    columns = list(zip(*found, strict=True))[1:]
    all_best = _found([best, *(_chosen(column, chosen) for column in columns)])
    if some_missing:
        all_best.rows[missing] = -1
    return all_best


def _chosen(column: Sequence[np.ndarray | None], places: np.ndarray) -> np.ndarray | None:
    """Of what all shards say of a query, one after another, what stands at its places (N, k)."""
    parts = [part for part in column if part is not None]
    return np.take_along_axis(np.concatenate(parts, axis=1), places, axis=1) if parts else None


def doubtful(
    found: Sequence[Found], held: Sequence[int], best: Found, *, largest: bool
) -> np.ndarray:
    """Which shards may have more neighbours of which queries than they told.

    A shard whose last one is not nearer than the last of all has none that would count.

    Args:
        found: of each shard.
        held: entries of each shard.
        best: the k best of these.
        largest: as for ``merged``.

    Returns:
        (S, N) bool, for each shard and query.
    """
    sign = -1 if largest else 1
    farthest, k = _last(best, sign), best.width
    return np.stack(
        [
            (_last(some, sign) < farthest) & (some.width < min(entries, k))
            for some, entries in zip(found, held, strict=True)
        ]
    )


def replaced(found: Found, better: Found, where: np.ndarray) -> Found:
    """What a shard found of some queries, with more where it was asked again.

    Args:
        found: (N, n).
        better: (M, k), of the queries that were asked again.
        where: (N,) bool, M of them true: which these are.

    Returns:
        (N, k); rows are -1 where there are no more.
    """

    def wider(old: np.ndarray | None, new: np.ndarray | None, fill: int) -> np.ndarray | None:
        if old is None or new is None:
            return None
        both = np.full((len(where), better.width), fill, old.dtype)
        both[:, : old.shape[1]] = old
        both[where] = new
        return both

    fills = (0, -1, 0, 0)
    return _found([wider(*columns) for columns in zip(found, better, fills, strict=True)])


def _found(parts: Sequence[np.ndarray | None]) -> Found:
    """Of its arrays, in their order, of which the last two may not be there."""
    distances, rows, *others = parts
    assert distances is not None and rows is not None
    return Found(distances, rows, *others)


def _last(found: Found, sign: int) -> np.ndarray:
    """(N,) the last distance of each query, where smaller is nearer; infinite where missing."""
    distances, rows = found.distances[:, -1], found.rows[:, -1]
    return np.where(rows < 0, np.float32(np.inf), sign * distances)
