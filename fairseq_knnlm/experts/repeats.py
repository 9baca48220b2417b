"""Earlier places of a text where the same tokens went before, and what followed there.

Of a context the latest ``LATEST`` places after the same last token count, and the latest ``LATEST``
after the same last two: a frequent word has many of the first, few of which matter, and a long
match must not be lost among them. All that is found of a context depends on the tokens of its
window alone, so it does not matter in what batches a text is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

#: Places kept of those after the same last token, and of those after the same last two.
LATEST = 32
#: Tokens before a place that are compared, at most.
LONGEST = 6
#: Worth of what fewer tokens say, in places after more tokens.
PRIOR = 1.0
#: However far away, a place counts 2 to the minus this: a float32 has room for it.
MOST_HALVED = 64.0


@dataclass(frozen=True)
class Repeats:
    """P pairs of a context and an earlier place after the same tokens, of N contexts.

    Attributes:
        contexts: (P,) int64, the number of the context.
        tokens: (P,) int64, what followed at the place.
        distances: (P,) int64, tokens from the place to the context, 1 or more.
        lengths: (P,) int64, how many tokens before both are the same, 1 to ``LONGEST``.
        size: N.
    """

    contexts: Tensor
    tokens: Tensor
    distances: Tensor
    lengths: Tensor
    size: int

    @classmethod
    def of(cls, text: Tensor, first: int, window: int, documents: Tensor | None = None) -> Repeats:
        """Of all contexts from a place of the text on.

        Args:
            text: (M,) int64 tokens; -1 where one is not known, which is like no other.
            first: the place of the first context, which is predicted from the tokens before it; M
                less this is N.
            window: places looked back.
            documents: (M,) the number of each place's document, where others do not count.
        """
        # At a place the text before it is what counts: the last token, and the last two.
        padded = torch.cat([text.new_full((LONGEST,), -1), text])
        last, second = padded[LONGEST - 1 : -1], padded[LONGEST - 2 : -2]
        both = (last * (2 + _most(text)) + second).masked_fill((last < 0) | (second < 0), -1)
        ones, twos = (_latest(keys, first, window) for keys in (last, both))
        # Of the latest after the same last token those that share two are among the others.
        alone = second[ones[0]] != second[ones[1]]
        alone |= second[ones[0]] < 0
        ours, theirs = (torch.cat([one[alone], two]) for one, two in zip(ones, twos, strict=True))
        if documents is not None:
            same = documents[ours] == documents[theirs]
            ours, theirs = ours[same], theirs[same]
        lengths = _lengths(padded, ours, theirs)
        return cls(ours - first, text[theirs], ours - theirs, lengths, len(text) - first)

    @classmethod
    def joined(cls, parts: Sequence[Repeats]) -> Repeats:
        """Of the contexts of several texts, one text after the other."""
        firsts = accumulate((part.size for part in parts), initial=0)
        return cls(
            torch.cat([part.contexts + first for part, first in zip(parts, firsts, strict=False)]),
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.distances for part in parts]),
            torch.cat([part.lengths for part in parts]),
            sum(part.size for part in parts),
        )

    def shares(self, half_lives: Sequence[float]) -> Tensor:
        """(P, S) float32: what each place is of the probabilities of its context; they sum to 1.

        With c_n(w) the places after the same n tokens that w followed, each counting
        2^-(distance / half-life), and C_n the sum of them over all w,

            p_n(w) = (c_n(w) + PRIOR p_(n-1)(w)) / (C_n + PRIOR),  p_1(w) = c_1(w) / C_1,

        up to the longest n that is compared (MacKay and Peto's Dirichlet model of language, with
        the fading of a cache). So a place counts once for each n that it has in common.

        Args:
            half_lives: S of them, in tokens.
        """
        halved = self.distances[:, None] / torch.tensor(half_lives, device=self.distances.device)
        faded = torch.exp2(-halved.clamp_max(MOST_HALVED))
        sums = self._from_length_on(faded)  # C_n, (N, LONGEST, S)
        prior = torch.full_like(sums, PRIOR)
        prior[:, 0] = 0.0
        whole = (sums + prior).clamp_min(torch.finfo(sums.dtype).tiny)
        left = prior / whole  # to fewer tokens than n
        left[:, 0] = 1.0
        # What is left to n tokens by all longer ones.
        reaching = left.flip(1).cumprod(dim=1).flip(1)
        reaching = torch.cat([reaching[:, 1:], torch.ones_like(reaching[:, :1])], dim=1)
        worth = (reaching / whole).cumsum(dim=1)
        return worth[self.contexts, self.lengths - 1] * faded

    def summed(self, values: Tensor) -> Tensor:
        """(N, ...) sums over the places of each context, of values (P, ...)."""
        sums = values.new_zeros((self.size, *values.shape[1:]))
        return sums.index_add_(0, self.contexts, values)

    @cached_property
    def counts(self) -> Tensor:
        """(N, LONGEST) float32: places that share 1, 2, ... tokens or more."""
        return self._from_length_on(torch.ones(len(self.lengths), device=self.lengths.device))

    @cached_property
    def types(self) -> Tensor:
        """(N, LONGEST) float32: distinct tokens that followed there."""
        keys = self.contexts * (1 + _most(self.tokens)) + self.tokens
        # The place that shares most stands for all of the same token.
        order = (keys * (LONGEST + 1) - self.lengths).argsort()
        keys, contexts, lengths = keys[order], self.contexts[order], self.lengths[order]
        new = torch.ones_like(keys, dtype=torch.bool)
        new[1:] = keys[1:] != keys[:-1]
        part = Repeats(contexts[new], keys[new], keys[new], lengths[new], self.size)
        return part.counts

    @cached_property
    def best(self) -> tuple[Tensor, Tensor]:
        """Of the place that shares most, the latest of these, token and distance.

        Each is (N,) int64; -1 where a context has no place.
        """
        far, types = (1 + _most(one) for one in (self.distances, self.tokens))
        # Distance and token are carried along in the number that is compared, below 2^63.
        numbers = (self.lengths * far - self.distances) * types + self.tokens
        best = numbers.new_full((self.size,), -1)
        best.scatter_reduce_(0, self.contexts, numbers, "amax")
        none = best < 0
        distances = -best.div(types, rounding_mode="floor") % far
        return (best % types).masked_fill(none, -1), distances.masked_fill(none, -1)

    def _from_length_on(self, values: Tensor) -> Tensor:
        """(N, LONGEST, ...): sums of (P, ...) over places that share 1, 2, ... tokens or more."""
        cells = self.contexts * LONGEST + self.lengths - 1
        sums = values.new_zeros((self.size * LONGEST, *values.shape[1:]))
        sums = sums.index_add_(0, cells, values).unflatten(0, (self.size, LONGEST))
        return sums.flip(1).cumsum(dim=1).flip(1)


def _most(numbers: Tensor) -> int:
    """The largest; 0 where there are none."""
    return int(numbers.max()) if len(numbers) else 0


def _latest(keys: Tensor, first: int, window: int) -> tuple[Tensor, Tensor]:
    """Places from the first on, and for each the latest before it that have its key: pairs (P,).

    Args:
        keys: (M,) int64; -1 is like no other.
        first: place.
        window: places looked back.
    """
    every = torch.arange(len(keys), device=keys.device)
    order = keys.argsort(stable=True)  # those of a key side by side, in the order of the text
    sorted_ = keys[order]
    begins = torch.ones_like(sorted_, dtype=torch.bool)
    begins[1:] = sorted_[1:] != sorted_[:-1]
    ranks = every - every.where(begins, 0).cummax(dim=0).values
    at = torch.empty_like(every).index_copy_(0, order, every)
    places = every[first:]
    counts = ranks[at[places]].clamp_max(LATEST).masked_fill(keys[places] < 0, 0)
    ours = places.repeat_interleave(counts)
    firsts = (counts.cumsum(dim=0) - counts).repeat_interleave(counts)
    back = torch.arange(len(ours), device=keys.device) - firsts + 1
    theirs = order[at[ours] - back]
    near = ours - theirs <= window
    return ours[near], theirs[near]


def _lengths(padded: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
    """(P,) int64: how many tokens before two places are the same, up to ``LONGEST``.

    Args:
        padded: the text behind ``LONGEST`` unknown tokens.
        ours, theirs: (P,) places of the text.
    """
    lengths = torch.zeros_like(ours)
    going = torch.arange(len(ours), device=ours.device)
    for step in range(1, LONGEST + 1):
        token, other = (padded[one[going] + LONGEST - step] for one in (ours, theirs))
        going = going[(token == other) & (token >= 0)]
        lengths[going] = step
    return lengths
