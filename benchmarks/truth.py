"""The true neighbours of queries, found by brute force while keys go by."""

from pathlib import Path

import numpy as np

from fairseq_knnlm.files import publish


class Truth:
    """The true k nearest of all keys that were shown to ``see``.

    By NumPy alone. FAISS's own brute force takes five times as long for a few queries.

    Args:
        queries: (Q, D) float32.
        k: neighbours of each.
    """

    def __init__(self, queries: np.ndarray, k: int) -> None:
        self.queries = queries
        self.k = k
        #: Of each query the nearest so far, in no order: distances less that of the query from 0.
        self._distances = [np.empty(0, np.float32) for _ in queries]
        self._rows = [np.empty(0, np.int64) for _ in queries]
        self._farthest = np.full((len(queries), 1), np.inf, np.float32)

    def see(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """Looks for neighbours among keys (n, D) float32 at these rows (n,) int64."""
        distances = np.einsum("nd,nd->n", keys, keys) - 2 * (self.queries @ keys.T)
        for query, near in enumerate(distances < self._farthest):
            if near.any():
                self._take(query, distances[query, near], rows[near])

    def _take(self, query: int, distances: np.ndarray, rows: np.ndarray) -> None:
        distances = np.concatenate([self._distances[query], distances])
        rows = np.concatenate([self._rows[query], rows])
        if len(rows) > self.k:
            nearest = np.argpartition(distances, self.k - 1)[: self.k]
            distances, rows = distances[nearest], rows[nearest]
            self._farthest[query] = distances.max()
        self._distances[query], self._rows[query] = distances, rows

    def recall(self, found: np.ndarray) -> float:
        """Share of the true neighbours that are among those found, (Q, k)."""
        pairs = zip(self._rows, found, strict=True)
        return float(np.mean([np.isin(true, ids).mean() for true, ids in pairs]))

    def save(self, path: Path) -> None:
        """Keeps what was found; the queries' neighbours must be as many each."""
        with publish(path) as temporary, temporary.open("wb") as file:
            np.savez(file, distances=np.stack(self._distances), rows=np.stack(self._rows))

    def add(self, path: Path) -> None:
        """Takes what another one found among other keys, and kept."""
        with np.load(path, allow_pickle=False) as kept:
            for query, pair in enumerate(zip(kept["distances"], kept["rows"], strict=True)):
                self._take(query, *pair)
