"""Neighbours from several shards, merged; and which of them may be missing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fairseq_knnlm.index.library import faiss

#: Distances (N, k) float32, best first, and rows (N, k); -1 where there are no more.
Found = tuple[np.ndarray, np.ndarray]


def merged(found: Sequence[Found], k: int, *, largest: bool) -> Found:
    """The k best of what shards found.

    Args:
        found: of each shard, of any width up to k.
        k: neighbours a query.
        largest: whether the best are the largest, as inner products are.

    Returns:
        distances (N, k) float32, best first, and rows (N, k) int64.
    """
    if len(found) == 1 and found[0][0].shape[1] == k:
        return found[0][0], found[0][1].astype(np.int64)
    shape = len(found), len(found[0][0]), k
    distances, rows = np.empty(shape, np.float32), np.empty(shape, np.int64)
    for number, (some, theirs) in enumerate(found):
        width = some.shape[1]
        distances[number, :, :width] = some
        rows[number, :, :width] = theirs
        rows[number, :, width : width + 1] = -1  # where FAISS stops
    best: Found = faiss.merge_knn_results(distances, rows, keep_max=largest)
    return best


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
    farthest, k = _last(best, sign), best[0].shape[1]
    return np.stack(
        [
            (_last(some, sign) < farthest) & (some[0].shape[1] < min(entries, k))
            for some, entries in zip(found, held, strict=True)
        ]
    )


def replaced(found: Found, better: Found, where: np.ndarray) -> Found:
    """What a shard found of some queries, with more where it was asked again.

    Args:
        found: (N, n), distances and rows.
        better: (M, k), of the queries that were asked again.
        where: (N,) bool, M of them true: which these are.

    Returns:
        distances (N, k) and rows (N, k), -1 where there are no more.
    """
    width = found[0].shape[1]
    distances = np.zeros((len(where), better[0].shape[1]), np.float32)
    rows = np.full(distances.shape, -1, np.int64)
    distances[:, :width], rows[:, :width] = found
    distances[where], rows[where] = better
    return distances, rows


def _last(found: Found, sign: int) -> np.ndarray:
    """(N,) the last distance of each query, where smaller is nearer; infinite where missing."""
    distances, rows = found[0][:, -1], found[1][:, -1]
    return np.where(rows < 0, np.float32(np.inf), sign * distances)
