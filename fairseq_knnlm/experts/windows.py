"""The positions before others in the same text, as entries: a window that moves on with each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_knnlm.experts.entries import Entries, Pairs
from fairseq_knnlm.experts.ordering import in_order


@dataclass(frozen=True)
class Windows:
    """What stands before each of the last positions of texts that are as long.

    Attributes:
        texts: B.
        length: M, the positions of each.
        queries: n, of each the last ones, each of which has a window.
        wide: positions in a window, at most M - n; the last is the one just before.
    """

    texts: int
    length: int
    queries: int
    wide: int

    def of(self, whole: Tensor) -> Tensor:
        """Of (B, n, M), anything of each query and each position: (B n, wide)."""
        strides = (self.queries * self.length, self.length + 1, 1)
        shape = (self.texts, self.queries, self.length - self.queries)
        return whole.as_strided(shape, strides)[:, :, -self.wide :].flatten(0, 1)

    def around(self, text: Tensor) -> Tensor:
        """Of (B, M), something of each position: (B n, wide)."""
        before = text.unfold(1, self.length - self.queries, 1)[:, :-1]
        return before[:, :, -self.wide :].flatten(0, 1)

    def alike(self, text: Tensor, queries: Tensor) -> Pairs:
        """Where windows hold what a query has.

        Looked up in the sorted text: most of the windows need not be looked through.

        Args:
            text: (B, M) integers, -1 or more.
            queries: (B, n); with one below 0 nothing is alike.

        Returns:
            In rows (B n) and columns (wide).
        """
        ordered, places = in_order(self._apart(text)[None])
        asked = self._apart(queries).to(ordered.dtype)
        starts = torch.searchsorted(ordered[0], asked)
        ends = torch.searchsorted(ordered[0], asked, right=True)
        counts = (ends - starts).where(queries.flatten() >= 0, 0)
        rows = torch.arange(len(asked), device=asked.device).repeat_interleave(counts)
        skipped = starts - (counts.cumsum(dim=0) - counts)
        found = places[0][torch.arange(len(rows), device=rows.device) + skipped[rows]]
        columns = found - self._firsts(rows)
        return Pairs(rows, columns).among((columns >= 0) & (columns < self.wide))

    def positions(self, pairs: Pairs) -> Tensor:
        """(P,) int64, places in the (B M) positions of all texts."""
        return self._firsts(pairs.rows) + pairs.places

    def _firsts(self, rows: Tensor) -> Tensor:
        """Where windows begin, in the (B M) positions of all texts."""
        texts, queries = rows // self.queries, rows % self.queries
        return texts * self.length + self.length - self.queries - self.wide + queries

    def _apart(self, values: Tensor) -> Tensor:
        """(B, any) as one row of numbers, 0 or more, that are other ones in each text."""
        texts = torch.arange(self.texts, device=values.device)
        return ((values + 1) * self.texts + texts[:, None]).flatten()


@dataclass(frozen=True, kw_only=True)
class WindowEntries(Entries):
    """Windows as entries.

    Attributes:
        windows: where they lie.
        text: (B, M) int64, what followed each position.
    """

    windows: Windows
    text: Tensor

    def with_tokens(self, tokens: Tensor) -> Pairs:
        """Those that count and have the token (N,) of their context."""
        pairs = self.windows.alike(self.text, tokens.view(self.windows.texts, -1))
        return pairs if self.counted is None else pairs.among(self.counted[pairs])
