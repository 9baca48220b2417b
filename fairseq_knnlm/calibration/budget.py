"""Mixtures that keep a budget of time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, combinations

from fairseq_knnlm.calibration.costs import Clock, Costs
from fairseq_knnlm.calibration.fitter import Fitter
from fairseq_knnlm.calibration.lean import Lean, Steps
from fairseq_knnlm.calibration.table import ScoreTable
from fairseq_knnlm.errors import ConfigError, TableError
from fairseq_knnlm.files import typed


def clock_of(table: ScoreTable) -> Clock | None:
    """What tells the time of a table's mixtures; None where it was not measured."""
    costs = table.card.get("costs")
    return None if costs is None else Clock(typed(costs, Costs), table.experts)


@dataclass(frozen=True)
class Plan:
    """A mixture to be fitted.

    Attributes:
        lean: its components.
        features: names of what its weights go by; none for weights that are always the same.
    """

    lean: Lean
    features: tuple[str, ...]


class Budget:
    """What keeps a budget of time, of the experts of a score table.

    Args:
        fitter: of the table.
        least_speed: tokens a second over those of the language model alone.

    Raises:
        TableError: where the table does not tell what its columns cost.
        ConfigError: where nothing keeps the budget.
    """

    def __init__(self, fitter: Fitter, least_speed: float) -> None:
        clock = clock_of(fitter.table)
        if clock is None:
            raise TableError(
                "the score table does not tell what its columns cost in time",
                expected="for --speed, a table that was written with --table-costs",
                found="one without",
                do="write it again with --table-costs, or by `fairseq-knnlm tune --data`",
            )
        self.least_speed = least_speed
        #: The way to ever less time.
        self.steps = Steps(fitter.table, clock, fitter.parts.fit)
        self._fitter = fitter
        self._clock = clock
        self.plans = list(self._plans(clock.costs.lm / least_speed))
        if not self.plans:
            raise self._too_tight(least_speed)

    def speed(self, lean: Lean) -> float:
        """Over that of the language model alone, without features."""
        return self._clock.speed(lean.components)

    def _plans(self, seconds: float) -> Iterator[Plan]:
        """The best components beside the features of any of the experts, or none."""
        experts = list(self._fitter.table.experts)
        known: list[Plan] = []
        for owners in chain.from_iterable(
            combinations(experts, number) for number in range(len(experts), -1, -1)
        ):
            features = tuple(self._fitter.features(owners))
            lean = self.steps.within(seconds, features)
            if lean is not None and (plan := Plan(lean, features)) not in known:
                known.append(plan)
                yield plan

    def _too_tight(self, least_speed: float) -> ConfigError:
        fastest = self.steps.fastest
        speed = self.speed(fastest)
        return ConfigError(
            "no mixture keeps the budget",
            expected=f"--speed {math.floor(speed * 100) / 100:g} or less: the fastest mixture, of "
            f"{'+'.join(fastest.experts)}, has {speed:.3f} of the language model's own speed",
            found=f"--speed {least_speed:g}",
            do="pass a lower --speed, or leave it out",
        )
