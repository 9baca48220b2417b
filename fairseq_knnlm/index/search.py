"""An index that is ready to search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq_knnlm.index.card import IndexCard
from fairseq_knnlm.index.library import set_nprobe


class SearchIndex:
    """An index that is ready to search.

    Args:
        index: a FAISS index, on its device; one in the CPU's memory is set to visit
            ``card.nprobe`` lists.
        card: what it is.
        gpu_resources: FAISS's, which must live as long as the index; empty on a CPU.
    """

    def __init__(self, index: Any, card: IndexCard, gpu_resources: Sequence[Any] = ()) -> None:
        self.index = index
        self.card = card
        self._gpu_resources = gpu_resources
        # Shards and indexes with a transform before them take NumPy arrays only.
        self._takes_tensors = type(index).__name__.startswith("Gpu")
        if not gpu_resources:
            set_nprobe(index, card.nprobe)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest entries.

        Args:
            queries: (N, D) float32.
            k: neighbours a query.

        Returns:
            distances (N, k) float32, squared L2 or inner product, best first; ids (N, k) int64,
            -1 where fewer than k were found. Both on the queries' device.
        """
        if self._takes_tensors and queries.is_cuda:
            distances, ids = self.index.search(queries.contiguous(), k)
            return distances, ids
        found = self.index.search(np.ascontiguousarray(queries.cpu().numpy()), k)
        distances, ids = (torch.from_numpy(part).to(queries.device) for part in found)
        return distances, ids
