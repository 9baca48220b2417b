"""How good an index is: what it finds of a few keys' true neighbours, which are known."""

from __future__ import annotations

from typing import Any

import numpy as np

from fairseq_knnlm.index.library import METRICS, faiss
from fairseq_knnlm.index.search import SearchIndex


class TrueNeighbours:
    """Sampled keys, and their true nearest neighbours among all the keys shown to ``see``.

    A key is its own nearest neighbour, so one more is looked for and the key itself left out.

    Args:
        queries: (Q, D) float32, keys of the datastore.
        rows: (Q,) int64, where they stand in it.
        k: true neighbours of each.
        metric: ``"l2"`` or ``"ip"``.
    """

    def __init__(self, queries: np.ndarray, rows: np.ndarray, k: int, metric: str) -> None:
        self.k = k
        self._queries = np.ascontiguousarray(queries, dtype=np.float32)
        self._rows = rows
        self._metric = METRICS[metric]
        self._best = faiss.ResultHeap(len(rows), k + 1, keep_max=metric == "ip")
        self._true: list[np.ndarray] | None = None

    def see(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """Looks for true neighbours among keys (n, D) float32 at these rows (n,)."""
        k = min(self.k + 1, len(keys))
        distances, found = faiss.knn(self._queries, keys, k, metric=self._metric)
        self._best.add_result(distances, np.ascontiguousarray(rows[found], dtype=np.int64))

    def recall(self, searcher: SearchIndex) -> float:
        """Share of the true k nearest that the index finds."""
        _, found = searcher.index.search(self._queries, self.k + 1)
        pairs = zip(self._truth(), found, strict=True)
        return float(np.mean([np.isin(true, ids).mean() for true, ids in pairs]))

    def coverage(self, index: Any) -> np.ndarray:
        """Share of the true k nearest that lie in the lists visited, by their number.

        What an index with compressed keys then finds is less, since it mistakes distances.

        Returns:
            (lists,) float64; element i is the share in the i + 1 lists nearest to a query.
        """
        true = self._truth()
        homes = _lists_of_rows(index, np.concatenate(true))
        order = _nearest_lists(index, self._queries)
        place = np.empty_like(order)
        np.put_along_axis(place, order, np.arange(order.shape[1])[None], axis=1)
        asked = np.repeat(np.arange(len(true)), [len(ids) for ids in true])
        visits = np.bincount(place[asked, homes], minlength=order.shape[1])
        return np.cumsum(visits) / visits.sum()

    def _truth(self) -> list[np.ndarray]:
        """The rows of each query's true neighbours."""
        if self._true is None:
            self._best.finalize()
            rows = zip(self._rows, self._best.I, strict=True)
            self._true = [ids[(ids >= 0) & (ids != row)][: self.k] for row, ids in rows]
        return self._true


def _lists_of_rows(index: Any, rows: np.ndarray) -> np.ndarray:
    """The inverted list that holds each of these rows (n,), as (n,) int64."""
    lists: Any = faiss.extract_index_ivf(index).invlists
    wanted, which = np.unique(rows, return_inverse=True)
    homes = np.zeros(len(wanted), dtype=np.int64)
    for number in range(lists.nlist):
        held = lists.list_size(number)
        if held:
            ids = faiss.rev_swig_ptr(lists.get_ids(number), held)
            places = np.searchsorted(wanted, ids).clip(max=len(wanted) - 1)
            homes[places[wanted[places] == ids]] = number
    return homes[which]


def _nearest_lists(index: Any, queries: np.ndarray) -> np.ndarray:
    """All lists in the order in which each query (Q, D) visits them, (Q, lists) int64."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        return _nearest_lists(index.base_index, queries)
    if isinstance(index, faiss.IndexPreTransform):
        chain: Any = index.chain
        for number in range(chain.size()):
            queries = chain.at(number).apply(queries)
    ivf = faiss.extract_index_ivf(index)
    _, order = ivf.quantizer.search(queries, ivf.nlist)
    return order
