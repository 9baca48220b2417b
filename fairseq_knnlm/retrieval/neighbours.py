"""What a search finds, and who searches. Nobody who asks needs to know where the keys live."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Neighbours:
    """The k nearest entries of each query.

    Attributes:
        ids: (N, K) int64, rows of the datastore; -1 where missing.
        distances: (N, K) float32, squared L2, or the negative inner product: in both cases a
            neighbour's weight is exp(-distance / T); infinite where missing.
        values: (N, K) int32 or int64 token ids; undefined where missing.
        valid: (N, K) bool, False where the index found fewer than K.
        log_weights: (N, K) float32, natural log of the entries that each neighbour stands for;
            undefined where missing; None where each is one.

    All on the queries' device.
    """

    ids: Tensor
    distances: Tensor
    values: Tensor
    valid: Tensor
    log_weights: Tensor | None = None

    @cached_property
    def all_found(self) -> bool:
        """Whether none is missing."""
        return bool(self.valid.all())

    def nearest_first(self) -> Neighbours:
        """The same, in ascending order of their distances; the missing ones at the end."""
        if bool((self.distances[:, 1:] >= self.distances[:, :-1]).all()):
            return self  # as an index gives them
        order, weights = self.distances.argsort(dim=1, stable=True), self.log_weights
        return Neighbours(
            self.ids.gather(1, order),
            self.distances.gather(1, order),
            self.values.gather(1, order),
            self.valid.gather(1, order),
            None if weights is None else weights.gather(1, order),
        )


class Retriever(Protocol):
    """Finds the nearest entries of a memory, on this machine or on others."""

    @property
    def vocabulary(self) -> int:
        """Types of the dictionary, V."""

    @property
    def measures_l2(self) -> bool:
        """Whether the distances are squared L2, or the index's approximation of it."""

    @property
    def elsewhere(self) -> bool:
        """Whether others search, so that this process can do something else meanwhile."""

    def ahead(self, queries: Tensor, k: int) -> None:
        """Has queries looked for, if others do that, which ``search`` will be asked of soon."""

    def search(self, queries: Tensor, k: int) -> Neighbours:
        """The k nearest entries of queries (N, D), as (N, K)."""

    def tokens_before(self, ids: Tensor, steps: int) -> Tensor:
        """The tokens that stand ``steps`` before entries in their text, of any shape; else -1."""

    def token_counts(self) -> Tensor:
        """(V,) int64, how often each token is a value."""
