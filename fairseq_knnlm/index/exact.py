"""Exact search by matrix product in torch, on the keys themselves.

For a GPU that only torch can use (faiss-cpu knows none): the place of an exact index is taken by
the datastore's keys, as they are stored, on that GPU.

|q - x|^2 = |q|^2 - 2 q.x + |x|^2 cancels in float32 where keys and queries lie far from 0. So it
is taken of what is left of both without the keys' mean, to find candidates only: their distances
are then computed difference by difference, and these decide.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fairseq_knnlm.datastore import Rows
from fairseq_knnlm.index.card import IndexCard
from fairseq_knnlm.index.distances import distances_to_rows

#: Numbers in a block of scores, (queries, keys) float32, which bounds the memory of a search.
SCORES_AT_A_TIME = 2**27
#: Queries searched at a time.
QUERIES_AT_A_TIME = 1024
#: Candidates beyond k whose distances are computed too, since rounding can change their order.
MARGIN = 32


class ExactSearch:
    """Searches keys that lie in a device's memory. Has the interface of ``SearchIndex``.

    Args:
        keys: (N, D) float16 or float32; copied to the device as they are.
        card: of the exact index whose place this takes.
        device: torch's.
    """

    def __init__(self, keys: Rows, card: IndexCard, device: str) -> None:
        assert card.exact
        self.card = card
        keys = np.array(keys)
        self._keys = torch.from_numpy(keys).to(device)
        # An inner product is not that of what is left without the mean.
        centred = card.metric == "l2"
        middle = keys.mean(axis=0, dtype=np.float64) if centred else np.zeros(keys.shape[1])
        self._middle = torch.from_numpy(middle.astype(np.float32)).to(device)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest entries.

        Args:
            queries: (N, D) float32.
            k: neighbours a query.

        Returns:
            distances (N, k) float32, squared L2 or inner product, best first; ids (N, k) int64, -1
            where there are fewer than k keys. Both on the queries' device.
        """
        parts = [
            self._search(some.to(self._keys.device), k) for some in queries.split(QUERIES_AT_A_TIME)
        ]
        distances, ids = (
            torch.cat(column).to(queries.device) for column in zip(*parts, strict=True)
        )
        return distances, ids

    def _search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The same for a few queries on the keys' device."""
        there = min(k, len(self._keys))
        candidates = self._candidates(queries, min(k + MARGIN, len(self._keys)))
        l2 = self.card.metric == "l2"
        distances = distances_to_rows(self._keys, queries, candidates, "l2" if l2 else "dot")
        nearest, order = distances.topk(there, dim=1, largest=False)
        best = queries.new_full((len(queries), k), torch.inf if l2 else -torch.inf)
        ids = torch.full_like(best, -1, dtype=torch.int64)
        best[:, :there] = nearest if l2 else -nearest
        ids[:, :there] = candidates.gather(1, order)
        return best, ids

    def _candidates(self, queries: Tensor, count: int) -> Tensor:
        """Ids (N, count) of the nearest keys, up to rounding."""
        queries = queries - self._middle
        best = queries.new_full((len(queries), count), -torch.inf)
        ids = torch.zeros_like(best, dtype=torch.int64)
        step = max(1, SCORES_AT_A_TIME // max(1, len(queries)))
        for start in range(0, len(self._keys), step):
            keys = self._keys[start : start + step].float() - self._middle
            scores = queries @ keys.T
            if self.card.metric == "l2":  # all but |q|^2, which changes no order
                scores = scores.mul_(2).sub_(keys.square().sum(dim=1))
            some, places = scores.topk(min(count, len(keys)), dim=1)
            best, order = torch.cat([best, some], dim=1).topk(count, dim=1)
            ids = torch.cat([ids, places + start], dim=1).gather(1, order)
        return ids
