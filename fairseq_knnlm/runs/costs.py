"""Measures what the parts of a mixture cost, while a score table is written.

In the middle of the text, when caches have filled, experts with a few of the columns each are made
and asked of contexts that are scored next. From their times follow those of ``Costs``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import torch
from torch import Tensor

from fairseq_knnlm.calibration.costs import Costs, ExpertCosts, Group
from fairseq_knnlm.calibration.fitting import MOST
from fairseq_knnlm.experts.contract import Expert
from fairseq_knnlm.experts.kind import Models, Opened
from fairseq_knnlm.experts.lm import ShapeExpert
from fairseq_knnlm.lm.contexts import Contexts
from fairseq_knnlm.mixture.components import LM
from fairseq_knnlm.mixture.mix import mix
from fairseq_knnlm.mixture.mixers import Gate
from fairseq_knnlm.mixture.model import MixtureLM

#: Contexts of a batch that are asked of: enough to share the work of a call.
CONTEXTS = 512
#: Batches on which all is measured. The fastest counts: whatever else is going on only adds to it.
BATCHES = 6

#: Seconds a token of an expert with the columns at some places, and with its features or without.
Measure = Callable[[Sequence[int], bool], float]


def like(settings: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Places of the settings that count the same entries, together.

    Whole numbers (k, window, suffix) say which entries count, other numbers (temperature, theta)
    what is made of them.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, setting in enumerate(settings):
        which = tuple((name, x) for name, x in sorted(setting.items()) if type(x) is not float)
        groups.setdefault(which, []).append(place)
    return list(groups.values())


def expert_costs(
    groups: Sequence[Sequence[int]], measure: Measure, *, features: bool
) -> ExpertCosts:
    """What the columns of an expert cost.

    Args:
        groups: places of those that are alike.
        measure: takes the time of some of them.
        features: whether the expert names any.
    """
    alone = [measure(group[:1], False) for group in groups]
    longest, shortest = (
        groups[some(range(len(groups)), key=alone.__getitem__)][0] for some in (max, min)
    )
    told = []
    for group, one in zip(groups, alone, strict=True):
        more = measure(group, False) - one if len(group) > 1 else 0.0
        further = _positive(more) / max(1, len(group) - 1)
        # Beside the one that takes longest, what they share is there already.
        beside = (
            measure([longest, group[0]], False) - max(alone) if group[0] != longest else further
        )
        first = min(_positive(beside), one)
        told.append(Group(list(group), one - first, first, further))
    if not features:
        return ExpertCosts(told, Group([], 0.0, 0.0, 0.0))
    own = _positive(measure([longest], True) - max(alone))
    least = next(group.first for group in told if group.columns[0] == shortest)
    shared = _positive(measure([shortest], True) - least - own)
    return ExpertCosts(told, Group([], shared, own, 0.0))


def _positive(seconds: float) -> float:
    """What is below 0 is noise."""
    return max(0.0, seconds)


class CostMeter:
    """Measures, between batches, what the columns of their score table cost.

    Args:
        experts: of the table, by their names.
        models: the language models.
        tokens: tells how many will be scored, about.
    """

    def __init__(
        self, experts: Mapping[str, Opened], models: Models, tokens: Callable[[], float]
    ) -> None:
        self._experts = experts
        self._models = models
        self._tokens = tokens
        self._read = 0
        self._batches = 0
        self._fastest: dict[object, float] = {}
        self._costs: dict[str, ExpertCosts] = {}

    def take(self, mixture: MixtureLM, contexts: Contexts, tokens: Tensor, seconds: float) -> None:
        """Is shown a batch before it is scored.

        Args:
            mixture: that scores it, whose experts have read all that stands before.
            contexts: N of them.
            tokens: (N,) int64, what came after each.
            seconds: that the language model took to read them.
        """
        self._read += len(contexts)
        if len(contexts) and self._batches < BATCHES and self._read >= self._tokens() / 2:
            self._batches += 1
            self._note("reading", seconds / len(contexts))
            self._measure(mixture, contexts[:CONTEXTS], tokens[:CONTEXTS])

    def told(self) -> dict[str, Any] | None:
        """``Costs``, as JSON; None where there was nothing to measure on."""
        if not self._costs:
            return None
        lm = self._fastest["reading"] + self._fastest["lm"]
        shape = self._fastest.get(ShapeExpert.name, 0.0)
        costs = Costs(lm, shape, self._fastest["mixing"], self._costs)
        told: dict[str, Any] = msgspec.to_builtins(costs)
        return told

    def _measure(self, mixture: MixtureLM, contexts: Contexts, tokens: Tensor) -> None:
        self._time("lm", partial(_ask, mixture.lm, contexts, tokens), len(tokens))
        width = 0
        for one in mixture.experts:
            if (opened := self._experts.get(one.name)) is not None:
                width += self._measure_expert(one, opened, contexts, tokens)
            elif isinstance(one, ShapeExpert):
                self._time(one.name, partial(_ask, one, contexts, tokens), len(tokens))
        gate = Gate([LM] * (MOST + 1), ["inputs"], max(1, width)).eval()
        inputs = {"inputs": torch.zeros(len(tokens), max(1, width), device=tokens.device)}
        columns = torch.zeros(len(tokens), MOST + 1, device=tokens.device)
        gate.to(tokens.device)
        self._time("mixing", lambda: mix(columns, gate.log_weights(inputs)), len(tokens))

    def _measure_expert(
        self, expert: Expert, opened: Opened, contexts: Contexts, tokens: Tensor
    ) -> int:
        """Measures one, and tells how many numbers its features are."""
        settings = [opened.kind.read(setting) for setting in expert.settings]

        def made(places: Sequence[int], features: bool) -> Expert:
            some = [settings[place] for place in places]
            found = opened.kind.make(opened, self._models, some, features)
            found.follow(expert)
            return found

        def measure(places: Sequence[int], features: bool) -> float:
            some = made(places, features)
            what = (opened.name, *places, features)
            return self._time(what, partial(_ask, some, contexts, tokens), len(tokens))

        named = made([0], True).predict(contexts[:1]).features
        groups = like(expert.settings)
        self._costs[opened.name] = expert_costs(groups, measure, features=bool(named))
        return sum(math.prod(feature.shape[1:]) for feature in named.values())

    def _time(self, what: object, work: Callable[[], object], tokens: int) -> float:
        """The least that some work ever took, seconds a token."""
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._note(what, (time.perf_counter() - started) / tokens)

    def _note(self, what: object, seconds: float) -> float:
        self._fastest[what] = min(seconds, self._fastest.get(what, math.inf))
        return self._fastest[what]


def _ask(expert: Expert, contexts: Contexts, tokens: Tensor) -> None:
    """As a mixture asks it."""
    for start in range(0, len(contexts), expert.at_a_time):
        part = slice(start, start + expert.at_a_time)
        expert.predict(contexts[part]).log_prob(tokens[part])
        expert.observe(tokens[part])
