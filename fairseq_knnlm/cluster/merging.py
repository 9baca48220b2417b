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


def incomplete(
    found: Sequence[Found], held: Sequence[int], best: Found, *, largest: bool
) -> np.ndarray:
    """The queries of which a shard may have more neighbours than it told.

    A shard whose last one is not nearer than the last of all has none that would count.

    Args:
        found: of each shard.
        held: entries of each shard.
        best: the k best of these.
        largest: as for ``merged``.

    Returns:
        (n,) numbers of queries, ascending.
    """
    sign = -1 if largest else 1
    farthest = _last(best, sign)
    doubtful = np.zeros(len(farthest), bool)
    for some, entries in zip(found, held, strict=True):
        if some[0].shape[1] < min(entries, best[0].shape[1]):
            doubtful |= _last(some, sign) < farthest
    return doubtful.nonzero()[0]


def _last(found: Found, sign: int) -> np.ndarray:
    """(N,) the last distance of each query, where smaller is nearer; infinite where missing."""
    distances, rows = found[0][:, -1], found[1][:, -1]
    return np.where(rows < 0, np.float32(np.inf), sign * distances)
