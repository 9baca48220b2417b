"""What an expert goes by: so many entries for each context, some of which stand out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """P of the (N, K) entries of N contexts.

    Attributes:
        rows: (P,) int64, of which context.
        places: (P,) int64, in which column.
    """

    rows: Tensor
    places: Tensor

    @classmethod
    def of(cls, some: Tensor) -> Pairs:
        """Those that an (N, K) bool names."""
        return cls(*some.nonzero(as_tuple=True))

    def among(self, kept: Tensor) -> Pairs:
        """Those of them that a (P,) bool names."""
        return Pairs(self.rows[kept], self.places[kept])

    def as_mask(self, like: Tensor) -> Tensor:
        """(N, K) bool, of the shape of another."""
        mask = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
        mask[self.rows, self.places] = True
        return mask


class Extents:
    """Nested parts of K columns: each is the one before it and a ring of further columns.

    Args:
        rings: disjoint, together all columns; each beside the one before it.
    """

    def __init__(self, rings: Sequence[slice]) -> None:
        self.rings = list(rings)
        columns = max(ring.stop for ring in rings)
        self._ring_of = torch.empty(columns, dtype=torch.int64)
        for number, ring in enumerate(self.rings):
            self._ring_of[ring] = number

    def __len__(self) -> int:
        return len(self.rings)

    def ring_of(self, device: torch.device) -> Tensor:
        """(K,) int64, the ring of each column."""
        self._ring_of = self._ring_of.to(device)
        return self._ring_of

    def span(self, extents: int) -> slice:
        """The columns of so many of the extents."""
        rings = self.rings[:extents]
        return slice(min(ring.start for ring in rings), max(ring.stop for ring in rings))


@dataclass(frozen=True)
class Entries:
    """What N contexts have to go by, K entries each.

    Attributes:
        tokens: (N, K) ids; anything where an entry does not count.
        scores: (N, K) float32, the larger the likelier.
        counted: (N, K) bool, which entries count; None where all do.
        sharing: for 1, 2, ... tokens: those that count, and come after the same last tokens as the
            context.
        extents: of the columns.
        log_weights: (N, K) float32, natural log of the entries that each stands for, 0 or more;
            None where each is one.
    """

    tokens: Tensor
    scores: Tensor
    counted: Tensor | None
    sharing: Sequence[Pairs]
    extents: Extents
    log_weights: Tensor | None = None

    def with_tokens(self, tokens: Tensor) -> Pairs:
        """Those that count and have the token (N,) of their context."""
        same = self.tokens == tokens.to(self.tokens.dtype)[:, None]
        return Pairs.of(same if self.counted is None else same.logical_and_(self.counted))

    def counts(self) -> Tensor:
        """(N, suffixes + 1) int64: how many count, and come after the same 1, 2, ... tokens."""
        contexts, columns = self.scores.shape
        if self.counted is None:
            every = torch.full((contexts,), columns, device=self.scores.device)
        else:
            every = self.counted.sum(dim=1)
        sharing = [torch.bincount(pairs.rows, minlength=contexts) for pairs in self.sharing]
        return torch.stack([every, *sharing], dim=1)

    def after(self, suffix: int) -> Tensor:
        """(N, K) bool: those that count, and come after the same last ``suffix`` tokens."""
        if suffix:
            return self.sharing[suffix - 1].as_mask(self.scores)
        if self.counted is not None:
            return self.counted
        return torch.ones_like(self.scores, dtype=torch.bool)
