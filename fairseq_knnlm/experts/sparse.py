"""The prediction of an expert that goes by entries: neighbours, pointers, the recent text.

With the entries i that a setting counts, their scores s_i, the sharpness a of the setting, and n_i
the number of merged entries that one stands for,

    p(w) = sum over i with token w of n_i exp(a s_i) / sum over all i of n_i exp(a s_i).

For neighbours -s is a squared L2 distance and 1/a the temperature (Khandelwal et al., 2020,
equation 2, where it is 1); for a cache s is a product of features and a is theta (Grave et al.,
2017). A setting may count some of the columns only, such as the nearest k or the last few, and of
these only entries that come after the same last tokens as the context.

Sums are kept as logs relative to the best entry. What is far below the best of many columns may be
the best of a few, so each ring of columns has a best of its own, and the sums over nested extents
are the running sums over rings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fairseq_knnlm.experts.contract import Distribution
from fairseq_knnlm.experts.entries import Cells, Entries, Extents, Pairs


class SparseSetting(NamedTuple):
    """How entries become a distribution.

    Attributes:
        suffix: count only entries that come after the same last ``suffix`` tokens.
        extent: which of the extents counts.
        sharpness: multiplies the scores.
    """

    suffix: int
    extent: int
    sharpness: float


class SparsePrediction:
    """Distributions over the tokens of entries.

    Args:
        entries: K for each of N contexts.
        settings: S of them, a column each.
        features: by name, (N,) or (N, M).
        every: of these entries, where it is there already.
    """

    def __init__(
        self,
        entries: Entries,
        settings: Sequence[SparseSetting],
        features: Mapping[str, Tensor] | None = None,
        every: Many | None = None,
    ) -> None:
        self.entries = entries
        self.settings = settings
        self.features = dict(features or {})
        self._suffixes = {setting.suffix for setting in settings}
        sums: dict[int, Sums] = {
            suffix: Few.of(entries, entries.sharing[suffix - 1]) for suffix in self._suffixes - {0}
        }
        if 0 in self._suffixes:
            sums[0] = Many.of(entries) if every is None else every
        self._totals = _columns(settings, sums)

    def log_prob(self, tokens: Tensor) -> Tensor:
        """log p of one token (N,) each: (N, S) float32, natural log.

        -inf where no entry that counts has the token, NaN where none counts.
        """
        if not self.settings:
            return self.entries.scores.new_empty((len(tokens), 0))
        found = _columns(self.settings, self._with_tokens(tokens))
        columns = [
            (one - total).where(~total.isneginf(), torch.nan)
            for one, total in zip(found, self._totals, strict=True)
        ]
        return torch.stack(columns, dim=1)

    def _with_tokens(self, tokens: Tensor) -> dict[int, Sums]:
        """For each suffix, of the entries with the token (N,) of their context."""
        entries, found = self.entries, dict[int, Sums]()
        for suffix in self._suffixes:
            if suffix:  # few share a suffix, so these are few to look through
                pairs = entries.sharing[suffix - 1]
                pairs = pairs.among(entries.tokens[pairs] == tokens[pairs.rows])
            else:
                pairs = entries.with_tokens(tokens)
            found[suffix] = Few.of(entries, pairs)
        return found

    def log_probs(self, setting: int) -> Distribution:
        """log p of the entries' tokens, an entry each, which add up where tokens are the same."""
        entries, (suffix, extent, sharpness) = self.entries, self.settings[setting]
        shares = entries.scores * sharpness - self._totals[setting][:, None]
        if entries.log_weights is not None:
            shares += entries.log_weights
        counted = entries.after(suffix) & (entries.extents.ring_of(shares.device) <= extent)
        shares = shares.masked_fill(~counted, -torch.inf)
        nobody = self._totals[setting].isneginf()[:, None]
        return Distribution(self._tokens, shares.masked_fill(nobody, torch.nan))

    @cached_property
    def _tokens(self) -> Tensor:
        """(N, K) ids, in every setting."""
        tokens, counted = self.entries.tokens, self.entries.counted
        return tokens if counted is None else tokens.where(counted, 0)


class Sums:
    """Sums over entries at any sharpness."""

    def log_sums(self, asked: Mapping[float, int]) -> Mapping[float, Tensor]:
        """log of the sum of exp(sharpness score) over each of the first extents.

        Args:
            asked: by the sharpness, over how many of the extents.

        Returns:
            By the sharpness, (N, extents); more than were asked for where there are.
        """
        raise NotImplementedError


def asked_of(settings: Sequence[SparseSetting], suffix: int) -> dict[float, int]:
    """What settings of a suffix ask sums for: by the sharpness, over how many extents."""
    asked: dict[float, int] = {}
    for one in settings:
        if one.suffix == suffix:
            asked[one.sharpness] = max(one.extent + 1, asked.get(one.sharpness, 0))
    return asked


def _columns(settings: Sequence[SparseSetting], sums: Mapping[int, Sums]) -> list[Tensor]:
    """(N,) for each setting; those of a suffix and sharpness share their sums."""
    found = {suffix: of.log_sums(asked_of(settings, suffix)) for suffix, of in sums.items()}
    return [found[one.suffix][one.sharpness][:, one.extent] for one in settings]


@dataclass(frozen=True)
class Many(Sums):
    """Of all entries that count, at their places; what was summed once is kept.

    Attributes:
        scores: (N, K) float32, each less the best of its ring; -inf where an entry does not count.
        tops: (N, rings) float32, the best of each; any number where none counts.
        extents: of the columns.
        log_weights: as in ``Entries``, 0 where an entry does not count.
    """

    scores: Tensor
    tops: Tensor
    extents: Extents
    log_weights: Tensor | None
    _known: dict[float, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, entries: Entries) -> Many:
        """Of all that count."""
        counted, scores, weights = entries.counted, entries.scores, entries.log_weights
        if counted is not None:
            scores = scores.masked_fill(~counted, -torch.inf)
            weights = None if weights is None else weights.masked_fill(~counted, 0.0)
        rings = entries.extents.rings
        nobody = scores.new_full((len(scores),), -torch.inf)  # of a ring without columns
        tops = torch.stack(
            [scores[:, ring].amax(dim=1) if ring.start < ring.stop else nobody for ring in rings],
            dim=1,
        )
        best = tops.amax(dim=1, keepdim=True).nan_to_num_(neginf=0.0)
        tops = tops.where(~tops.isneginf(), best)
        relative = torch.empty(scores.shape, device=scores.device)
        for ring, top in zip(rings, tops.unbind(1), strict=True):
            torch.sub(scores[:, ring], top[:, None], out=relative[:, ring])
        return cls(relative, tops, entries.extents, weights)

    def log_sums(self, asked: Mapping[float, int]) -> Mapping[float, Tensor]:
        """As ``Sums`` has it; one exponential serves every sharpness that is twice another."""
        new = {
            sharpness: extents
            for sharpness, extents in asked.items()
            if sharpness not in self._known or self._known[sharpness].shape[1] < extents
        }
        if self.log_weights is None:
            for run in _doubled(new):
                self._sum_up(run, [new[sharpness] for sharpness in run])
        else:
            for sharpness, extents in new.items():
                self._keep(sharpness, [self._weighted(sharpness, n) for n in range(extents)])
        return {sharpness: self._known[sharpness] for sharpness in asked}

    def _sum_up(self, run: Sequence[float], extents: Sequence[int]) -> None:
        """Sums at sharpnesses of which each is twice the one before."""
        span = self.extents.span(max(extents))
        weights = self._weights(run[0], span)
        for number, sharpness in enumerate(run):
            if number:
                narrow = self.extents.span(max(extents[number:]))
                weights = weights[:, narrow.start - span.start : narrow.stop - span.start]
                span, weights = narrow, weights.square_()
            rings = [
                weights[:, ring.start - span.start : ring.stop - span.start].sum(dim=1).log_()
                for ring in self.extents.rings[: extents[number]]
            ]
            self._keep(sharpness, rings)

    def _keep(self, sharpness: float, rings: Sequence[Tensor]) -> None:
        """Adds up the log sums of rings, (N,) each, relative to the best of each."""
        tops = sharpness * self.tops[:, : len(rings)]
        self._known[sharpness] = (torch.stack(list(rings), dim=1) + tops).logcumsumexp(dim=1)

    def _weights(self, sharpness: float, span: slice) -> Tensor:
        """exp(sharpness score) of some columns, relative to the best of each ring."""
        scores = self.scores[:, span]
        if sharpness == 0:  # times -inf is no number
            return (~scores.isneginf()).float()
        return (scores * sharpness).exp_()

    def _weighted(self, sharpness: float, number: int) -> Tensor:
        """(N,) of one ring of entries that stand for several: the best need not be the heaviest."""
        assert self.log_weights is not None
        ring = self.extents.rings[number]
        scores, weights = self.scores[:, ring], self.log_weights[:, ring]
        counted = ~scores.isneginf()
        return (scores * sharpness + weights).where(counted, -torch.inf).logsumexp(dim=1)


def _doubled(numbers: Iterable[float]) -> Iterator[list[float]]:
    """The numbers, in runs in which each is twice the one before."""
    left = set(numbers)
    for number in sorted(left):
        run = [number]
        while run[-1] in left:
            left.remove(run[-1])
            run.append(2 * run[-1])
        if len(run) > 1:
            yield run[:-1]


@dataclass(frozen=True)
class Few(Sums):
    """Of few of the entries: those of one token, or after the same tokens as the context.

    Attributes:
        scores: (P,) float32, each less the best of its ring, those of a context's ring side by
            side.
        cells: of these: which are of a context's ring.
        tops: (N, rings) float32; 0 where there are none.
        log_weights: (P,) float32; None where each is one.
    """

    scores: Tensor
    cells: Cells
    tops: Tensor
    log_weights: Tensor | None

    @classmethod
    def of(cls, entries: Entries, pairs: Pairs) -> Few:
        """Of P of them."""
        cells = entries.extents.cells(pairs, len(entries.scores))
        scores, weights = entries.scores[pairs], entries.log_weights
        tops = cells.most(scores)
        return cls(
            scores - tops.view(-1)[cells.numbers],
            cells,
            tops,
            None if weights is None else weights[pairs],
        )

    def log_sums(self, asked: Mapping[float, int]) -> Mapping[float, Tensor]:
        """As ``Sums`` has it."""
        sharpness = self.scores.new_tensor(list(asked))
        weights, tops = self.scores[:, None] * sharpness, self.tops[:, :, None] * sharpness
        if self.log_weights is not None:  # then the best need not be the heaviest
            weights += self.log_weights[:, None]
            most = torch.stack([self.cells.most(one) for one in weights.unbind(1)], dim=2)
            weights -= most.flatten(0, 1)[self.cells.numbers]
            tops += most
        rings = self.cells.sums(weights.exp_()).log_() + tops
        return dict(zip(asked, rings.logcumsumexp(dim=1).unbind(2), strict=True))
