"""What an expert goes by: so many entries for each context, some of which stand out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Pairs(NamedTuple):
    """P of the (N, K) entries of N contexts, in the order of these and then of columns.

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


@dataclass(frozen=True)
class Cells:
    """Of P entries, those that belong together: of one context and one ring.

    Attributes:
        numbers: (P,) int64, context and ring in one.
        starts: (N, rings) int64, where those of each begin among the P, by the place of the ring.
        rings: where each ring is in that order.
    """

    numbers: Tensor
    starts: Tensor
    rings: Sequence[int]

    def most(self, values: Tensor) -> Tensor:
        """The most of (P,) values, (N, rings); 0 where there is none."""
        nothing = values.new_full((self.starts.numel(),), -torch.inf)
        most = nothing.scatter_reduce(0, self.numbers, values, "amax").nan_to_num_(neginf=0.0)
        return most.view(self.starts.shape)

    def sums(self, values: Tensor) -> Tensor:
        """The sums of (P, S) values, (N, rings, S)."""
        if not len(values):
            return values.new_zeros((*self.starts.shape, values.shape[1]))
        every = torch.arange(len(values), device=values.device)
        # PyTorch's fastest sum of rows that lie side by side.
        found = nn.functional.embedding_bag(every, values, self.starts.view(-1), mode="sum")
        return found.view(*self.starts.shape, -1)[:, self.rings]


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

    def cells(self, pairs: Pairs, contexts: int) -> Cells:
        """Which of some entries, of N contexts, belong together."""
        columns = len(self._ring_of)
        # One without columns begins where another does, and comes before that.
        ends = [(ring.start, ring.stop) for ring in self.rings]
        placed = sorted(range(len(ends)), key=lambda number: ends[number])
        firsts = pairs.rows.new_tensor([self.rings[number].start for number in placed])
        rows = torch.arange(contexts, device=firsts.device)[:, None]
        starts = torch.searchsorted(pairs.rows * columns + pairs.places, rows * columns + firsts)
        numbers = pairs.rows * len(self.rings) + self.ring_of(firsts.device)[pairs.places]
        return Cells(numbers, starts, [placed.index(number) for number in range(len(placed))])

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
