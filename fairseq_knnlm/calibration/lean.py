"""From the best mixture to the language model alone, by steps that lose least for what they save.

A step leaves out a column; or all columns of an expert that need the most of what these share (the
longest window), in whose place its cheaper ones may come; or an expert. What it loses is told by
the best fixed weights on a part of the text, which are found in a moment.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fairseq_knnlm.calibration.costs import Clock
from fairseq_knnlm.calibration.fitting import LEAST, MOST, climbed
from fairseq_knnlm.calibration.losses import log_probs
from fairseq_knnlm.calibration.table import ScoreTable
from fairseq_knnlm.mixture.components import LM, Component

#: Tokens on which steps are weighed, at most.
SAMPLE = 10_000
#: Rounds of expectation and maximisation: from nothing, and from weights that are nearly right.
ROUNDS, FEW_ROUNDS = 60, 10
#: Columns of an expert whose shared work takes this part of the time less are a step apart.
APART = 0.02


@dataclass(frozen=True)
class Lean:
    """A mixture on the way.

    Attributes:
        components: what is mixed, the language model first.
        loss: of the best fixed weights on the part of the text, natural log a token.
        seconds: a token, without features.
    """

    components: tuple[Component, ...]
    loss: float
    seconds: float

    @property
    def experts(self) -> tuple[str, ...]:
        """Their names, without the language model."""
        return tuple(dict.fromkeys(one.expert for one in self.components if one != LM))


@dataclass(frozen=True)
class _Left:
    """The same, as places among all columns, (E,) weights, loss and seconds."""

    places: list[int]
    weights: Tensor
    loss: float
    seconds: float


class Steps:
    """The way down.

    Args:
        table: a score table.
        clock: tells what its columns cost.
        rows: of the table, on a part of which steps are weighed.
    """

    def __init__(self, table: ScoreTable, clock: Clock, rows: np.ndarray) -> None:
        self._clock = clock
        self._every = [LM] + [
            Component(name, setting) for name, some in table.experts.items() for setting in some
        ]
        self._shared = [0.0, *(clock.shared(one) for one in self._every[1:])]
        known = log_probs(table, self._every, rows[:: -(-len(rows) // SAMPLE)])
        known = np.where(np.isnan(known), known[:, :1], known)  # who abstains leaves it to the LM
        tops = known.max(axis=1, keepdims=True)
        self._probs = torch.from_numpy(np.exp(known - tops))
        self._top = float(tops.mean(dtype=np.float64))

    @cached_property
    def _way(self) -> list[tuple[_Left, list[_Left]]]:
        """What is reached, the best mixture first, and the steps that lead on from there."""
        now = self._worth(range(len(self._every)))
        way = []
        while True:
            steps = [step for step in self._steps(now) if step.seconds < now.seconds]
            way.append((now, steps))
            if not steps:
                return way
            # As long as there is one with an expert, who has less time than that takes none.
            steps = [step for step in steps if len(step.places) > 1] or steps
            prices = [(step.loss - now.loss) / (now.seconds - step.seconds) for step in steps]
            now = steps[int(np.argmin(prices))]

    def __iter__(self) -> Iterator[Lean]:
        """The best mixture first, the language model alone last; each takes less time."""
        return (self._lean(now) for now, _ in self._way)

    def within(self, seconds: float, features: Collection[str]) -> Lean | None:
        """The best of all that was met on the way, or but for a step, that takes no more time.

        Args:
            seconds: a token.
            features: names of what its weights will go by, of whose time this is too.

        Returns:
            It, else the best column alone; None where even that takes more.
        """
        owned = self._clock.owners(features)

        def kept(some: Iterable[_Left]) -> list[Lean]:
            leans = [lean for lean in map(self._lean, some) if lean.experts]
            leans = [lean for lean in leans if owned <= {*lean.experts}]
            spent = [self._clock.seconds(lean.components, features) for lean in leans]
            return [lean for lean, one in zip(leans, spent, strict=True) if one <= seconds]

        met = kept(one for now, steps in self._way for one in [now, *steps])
        places = range(1, len(self._every))
        met = met or kept(self._fitted([0, place], None, ROUNDS) for place in places)
        return min(met, key=lambda lean: lean.loss, default=None)

    @property
    def fastest(self) -> Lean:
        """What takes the least time with any expert at all: one column."""
        seconds = [self._clock.seconds([LM, one]) for one in self._every[1:]]
        return self._lean(self._fitted([0, 1 + int(np.argmin(seconds))], None, ROUNDS))

    def _lean(self, one: _Left) -> Lean:
        return Lean(tuple(self._every[place] for place in one.places), one.loss, one.seconds)

    def _steps(self, now: _Left) -> Iterator[_Left]:
        for number in range(1, len(now.places)):
            rest = [*range(number), *range(number + 1, len(now.places))]
            yield self._fitted([now.places[one] for one in rest], now.weights[rest], FEW_ROUNDS)
        experts = [self._every[place].expert for place in now.places]
        for name in dict.fromkeys(experts[1:]):
            pairs = zip(now.places, experts, strict=True)
            others = [place for place, expert in pairs if expert != name]
            yield self._fitted(others, None, ROUNDS)
            mine = [place for place, one in enumerate(self._every) if one.expert == name]
            least = max(self._shared[place] for place in mine if place in now.places)
            for level in sorted({self._shared[place] for place in mine}, reverse=True):
                if level < least - APART * now.seconds:
                    least = level
                    cheaper = [place for place in mine if self._shared[place] <= level]
                    yield self._worth([*others, *cheaper])

    def _worth(self, places: Sequence[int]) -> _Left:
        """Those that the best weights of all make use of."""
        every = self._fitted(sorted(places), None, ROUNDS)
        heaviest = (-every.weights).argsort()[:MOST].tolist()
        worth = sorted({0, *(one for one in heaviest if every.weights[one] >= LEAST)})
        return self._fitted([every.places[one] for one in worth], every.weights[worth], FEW_ROUNDS)

    def _fitted(self, places: list[int], weights: Tensor | None, rounds: int) -> _Left:
        """The best weights of these columns, from nearly right ones or from equal ones."""
        probs = self._probs[:, places]
        start = torch.ones(len(places)) if weights is None else weights.clamp_min(1e-6)
        weights = climbed(probs, None, start / start.sum(), rounds)
        loss = -float((probs @ weights).log().mean(dtype=torch.float64)) - self._top
        components = [self._every[place] for place in places]
        return _Left(places, weights, loss, self._clock.seconds(components))
