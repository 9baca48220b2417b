"""Experts: each gives a log-probability for every scored token.

The language model is the first; k-nearest neighbours the second. A mixer weighs them
(``mixing``). Besides its log-probability an expert may fill columns of the score table.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fairseq_knnlm.lm import Scored
from fairseq_knnlm.mixing import knn_log_probs
from fairseq_knnlm.neighbours import Retriever

#: Temperatures in a score table: 0.25 to 512 in steps of the square root of 2.
TEMPERATURES = tuple(2.0 ** (step / 2) for step in range(-4, 19))
#: Queries searched at a time: enough for FAISS to share work between them, and few enough for
#: memory to be used again in the place of new memory, which costs more than the arithmetic on it.
QUERIES_AT_A_TIME = 1024
#: Neighbours whose distance is a column of the score table.
DISTANCE_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Opinion:
    """What an expert says of a batch.

    Attributes:
        log_probs: (N,) float32, natural log, of each target.
        available: (N,) bool, False where the expert has nothing to go by.
        columns: for the score table, by name, (N,) or (N, M).
    """

    log_probs: Tensor
    available: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)


class KnnExpert:
    """p_kNN of the target, from the k nearest entries of a datastore.

    Args:
        retriever: answers queries.
        k: neighbours.
        temperature: T, divides the distances.
        for_table: also fill the score table's columns.
    """

    def __init__(
        self, retriever: Retriever, k: int, temperature: float, *, for_table: bool = False
    ) -> None:
        self.retriever = retriever
        self.k = k
        self.temperature = temperature
        self.for_table = for_table
        self.search_seconds = 0.0

    def opinion(self, scored: Scored) -> Opinion:
        """log p_kNN of each target, given its key."""
        assert scored.keys is not None
        some = zip(
            scored.keys.split(QUERIES_AT_A_TIME),
            scored.targets.split(QUERIES_AT_A_TIME),
            strict=True,
        )
        parts = [self._opinion(keys, targets) for keys, targets in some]
        return Opinion(
            torch.cat([part.log_probs for part in parts]),
            torch.cat([part.available for part in parts]),
            {name: torch.cat([p.columns[name] for p in parts]) for name in parts[0].columns},
        )

    def _opinion(self, keys: Tensor, targets: Tensor) -> Opinion:
        started = time.perf_counter()
        near = self.retriever.search(keys, self.k)
        self.search_seconds += time.perf_counter() - started
        matches = near.values == targets[:, None]
        temperatures = (self.temperature, *(TEMPERATURES if self.for_table else ()))
        columns = knn_log_probs(near.distances, matches, near.valid, temperatures, near.log_weights)
        table = {}
        if self.for_table:
            ranks = torch.tensor([rank - 1 for rank in DISTANCE_RANKS if rank <= self.k])
            nearest_first = near.distances.sort(dim=1).values
            table = {
                "knn_by_temperature": columns[:, 1:],
                "distances": nearest_first[:, ranks.to(nearest_first.device)],
                "matches": (matches & near.valid).sum(dim=1, dtype=torch.int32),
            }
        return Opinion(columns[:, 0], near.valid.any(dim=1), table)
