"""Adaptive retrieval: the datastore is searched only where that promises to help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fairseq_knnlm.experts.contract import Distribution, Expert, Prediction
from fairseq_knnlm.lm.contexts import Contexts
from fairseq_knnlm.mixture.components import searches
from fairseq_knnlm.mixture.mixers import Mixer, Skip
from fairseq_knnlm.mixture.model import MixtureLM, MixturePrediction, Scores, Weighed
from fairseq_knnlm.mixture.shares import Found, Shares, over
from fairseq_knnlm.retrieval.neighbours import Neighbours


@dataclass(frozen=True)
class Skipped:
    """A prediction in which some contexts were searched for, and the others were not.

    Attributes:
        rest: of everyone who does not search, for all N contexts.
        searched: who searches, for n of them.
        rows: (n,) int64, which these are.
        whole: (n) of everyone.
    """

    rest: Weighed
    searched: Mapping[str, Prediction]
    rows: Tensor
    whole: Weighed

    @property
    def features(self) -> Mapping[str, Tensor]:
        """Those of everyone who does not search."""
        return self.rest.features

    def score(self, tokens: Tensor) -> Scores:
        """Of one token (N,) each."""
        scores, rows = self.rest.score(tokens), self.rows
        columns = {name: column[rows] for name, column in scores.columns.items()}
        columns |= {name: one.log_prob(tokens[rows]) for name, one in self.searched.items()}
        mixed = scores.log_probs.index_copy(0, rows, self.whole.mixed(columns))
        return Scores(mixed, scores.columns, scores.features)

    def log_probs(self) -> Tensor:
        """log p of every token: (N, V) float32, natural log."""
        return self.rest.log_probs().index_copy(0, self.rows, self.whole.log_probs())

    def shares(self, tokens: Tensor) -> Shares:
        """Who made up the probability of one token (N,) each, and how much of it."""
        some, every = self.whole.shares(tokens[self.rows]), self.rest.shares(tokens)
        names = list(dict.fromkeys([*every.experts, *some.experts]))
        some, every = over(some, names), over(every, names)
        return Shares(
            names,
            every.weights.index_copy(0, self.rows, some.weights),
            every.log_probs.index_copy(0, self.rows, some.log_probs),
        )

    def found(self) -> dict[str, Found]:
        """By the expert's name, the neighbours of those that search, and what each gave."""
        some = self.whole.found()
        return {name: replace(one, rows=self.rows[one.rows]) for name, one in some.items()}

    def near(self) -> dict[str, tuple[Tensor, Neighbours]]:
        """The same without what each gave."""
        return {name: (self.rows, near) for name, (_, near) in self.whole.near().items()}


class Picked:
    """A prediction of some of its contexts.

    Args:
        whole: of N contexts.
        rows: (n,) int64 among the N.
        size: N.
    """

    def __init__(self, whole: Prediction, rows: Tensor, size: int) -> None:
        self._whole = whole
        self._rows = rows
        self._size = size
        self.features = {name: feature[rows] for name, feature in whole.features.items()}

    def log_prob(self, tokens: Tensor) -> Tensor:
        """(n, S), of tokens (n,)."""
        every = tokens.new_zeros(self._size).index_copy_(0, self._rows, tokens)
        return self._whole.log_prob(every)[self._rows]

    def log_probs(self, setting: int) -> Tensor | Distribution:
        """(n, V), or of a few tokens."""
        found = self._whole.log_probs(setting)
        if isinstance(found, Tensor):
            return found[self._rows]
        return Distribution(*(part[self._rows] for part in found))


class SkippingMixtureLM(MixtureLM):
    """Asks the other experts first, and the datastore only where that promises to help.

    He et al. (2021) call this adaptive retrieval. A context that is searched for is predicted as by
    ``MixtureLM``; one that is not, by a mixture that never knew of the datastore.

    Args:
        lm: the language model.
        experts: the others.
        mixer: weighs components of them all.
        rest: weighs components of those that do not search.
        skip: tells which searches are worth their while.
        share: of the searches to be skipped, 0 to 1, as far as the text is like what ``skip`` was
            fitted on.

    Attributes:
        tokens: how many contexts there were.
        searched: how many of them were searched for.
    """

    def __init__(
        self,
        lm: Expert,
        experts: Sequence[Expert],
        mixer: Mixer,
        rest: Mixer,
        skip: Skip,
        share: float,
    ) -> None:
        super().__init__(lm, experts, mixer)
        self.searching = [one for one in experts if searches(one.name)]
        self.rest = MixtureLM(lm, [one for one in experts if one not in self.searching], rest)
        self.skip = skip
        self.threshold = skip.threshold(share)
        self.start_counting()
        self._rows = torch.empty(0, dtype=torch.int64)

    @property
    def searches_elsewhere(self) -> bool:
        """Never before it is known which contexts are searched for."""
        return False

    def predict(self, contexts: Contexts) -> MixturePrediction:
        """What follows N contexts."""
        others = {one.name: one.predict(contexts) for one in self.rest.everyone}
        rest = self.rest.weighed(others)
        scores = self.skip.scores(rest.features).to(contexts.rows.device)
        rows = self._rows = (scores >= self.threshold).nonzero().squeeze(1)
        self.tokens += len(contexts)
        self.searched += len(rows)
        if not len(rows):
            return rest
        some = contexts[rows]
        searched = {one.name: one.predict(some) for one in self.searching}
        picked: dict[str, Prediction] = {
            name: Picked(one, rows, len(contexts)) for name, one in others.items()
        }
        return Skipped(rest, searched, rows, self.weighed(picked | searched))

    @property
    def looks_back(self) -> int | None:
        """As ``MixtureLM``; what pointers need hangs on who tells which contexts to search for."""
        theirs = [one.looks_back for one in self.searching]
        if self.rest.looks_back is None or None in theirs:
            return None
        return self.rest.looks_back + max([one for one in theirs if one is not None])

    def catch_up(self, contexts: Contexts, tokens: Tensor) -> None:
        """As ``MixtureLM``; pointers go on only from contexts that were searched for."""
        if all(one.looks_back == 0 for one in self.searching):
            super().catch_up(contexts, tokens)
            return
        for part in self._parts(len(contexts)):
            self.predict(contexts[part])
            self.observe(tokens[part])
        self.start_counting()

    def start_counting(self) -> None:
        super().start_counting()
        self.tokens = self.searched = 0

    def observe(self, tokens: Tensor) -> None:
        """Tells what came after the contexts of the last prediction, (N,) int64."""
        self.rest.observe(tokens)
        if len(self._rows):
            for one in self.searching:
                one.observe(tokens[self._rows])
