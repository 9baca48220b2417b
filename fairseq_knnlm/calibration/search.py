"""From a score table of valid to a calibration: no language model, no index, a few minutes.

The table's tokens are cut into stretches of text (``parts``). Most are fitted on; by some it is
chosen between mixtures, and half of these tell a gate when to stop learning; the rest are held out
of all this, and on these alone a mixture is compared with the language model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

from fairseq_knnlm.calibration.budget import Budget, Plan, clock_of
from fairseq_knnlm.calibration.costs import Clock
from fairseq_knnlm.calibration.fitter import Fitter
from fairseq_knnlm.calibration.side_by_side import side_by_side
from fairseq_knnlm.calibration.skipping import fit_skip
from fairseq_knnlm.calibration.stored import Calibration, FittedMixture
from fairseq_knnlm.calibration.table import ScoreTable
from fairseq_knnlm.mixture.components import searches
from fairseq_knnlm.mixture.mixers import ALONE, Skip
from fairseq_knnlm.versions import versions

#: What is fitted of a set of experts.
Fitted = tuple[list[FittedMixture], Skip | None]


def expert_sets(experts: Sequence[str]) -> list[tuple[str, ...]]:
    """The experts one by one, then each with all before it; and these without a search."""
    ones = [(name,) for name in experts]
    sets = ones + [tuple(experts[:number]) for number in range(2, len(experts) + 1)]
    rests = [tuple(name for name in one if not searches(name)) for one in sets]
    return list(dict.fromkeys([*sets, *filter(None, rests)]))


def fit(
    table: ScoreTable,
    seed: int = 0,
    told: Callable[[int, int, Sequence[str]], object] = lambda done, every, experts: None,
    budget: Budget | None = None,
    workers: int | None = None,
) -> Calibration:
    """Every mixture of the table's experts, the best of them first in line.

    Args:
        table: a score table of text that the datastore does not hold.
        seed: of the gates.
        told: is called as work begins and after each set of experts: how many are done, how many
            there are, and which one was done.
        budget: of time, that what is used has to keep.
        workers: sets that are fitted at a time, as ``side_by_side`` has it. What is found does not
            depend on it.

    Raises:
        TableError: where nothing can be fitted on the table, as ``Fitter`` tells.
    """
    fitter, clock = Fitter(table, seed), clock_of(table)
    mixtures, skips = [fitter.measured((), ALONE)], []
    for some, skip in _every_set(fitter, budget, told, workers):
        mixtures += some
        skips.append(skip)
    if clock is not None:
        mixtures = [replace(mixture, seconds=_seconds(clock, mixture)) for mixture in mixtures]
    card = table.card
    found = Calibration(
        datastores=tuple(card["datastores"]),
        names=_names(card),
        model=card["model"],
        fitted_on={
            "split": card["split"],
            "tokens": len(table),
            "chosen_on": len(fitter.parts.compared),
            "held_out": len(fitter.parts.report),
            "seed": seed,
            "context": card.get("context") or {},
        },
        experts=card["described"],
        base_perplexity=mixtures[0].perplexity,
        mixtures=tuple(mixtures),
        default=0,
        versions=versions(),
        skips=tuple(skip for skip in skips if skip is not None),
        least_speed=budget.least_speed if budget is not None else None,
    )
    # The language model stands first: nothing is preferred that does not beat it.
    best = found.choice(found.mixtures)
    return replace(found, default=[one is best for one in found.mixtures].index(True))


def _every_set(
    fitter: Fitter,
    budget: Budget | None,
    told: Callable[[int, int, Sequence[str]], object],
    workers: int | None,
) -> list[Fitted]:
    """What is fitted of each set of the table's experts, and then for the budget."""
    sets = expert_sets(list(fitter.table.experts))
    plans = budget.plans if budget is not None else []
    names = [*sets, *(plan.lean.experts for plan in plans)]
    works = [partial(_fitted, fitter, experts) for experts in sets]
    works += [partial(_planned, fitter, plan) for plan in plans]
    ended = count(1)
    told(0, len(names), ())
    return side_by_side(
        works,
        [_size(experts) for experts in names],
        lambda place: told(next(ended), len(names), names[place]),
        workers,
    )


def _size(experts: Sequence[str]) -> int:
    """What a set takes, roughly: where there are searches, a second gate, by many features."""
    return len(experts) * (3 if any(map(searches, experts)) else 1)


def _fitted(fitter: Fitter, experts: Sequence[str]) -> Fitted:
    mixtures = [fitter.measured(experts, mixer) for mixer in fitter.mixers(experts)]
    return mixtures, fit_skip(fitter, experts)


def _planned(fitter: Fitter, plan: Plan) -> Fitted:
    mixer = fitter.of(plan.lean.components, plan.features)
    return [fitter.measured(plan.lean.experts, mixer)], None


def _seconds(clock: Clock, mixture: FittedMixture) -> float:
    return clock.seconds(mixture.mixer.components, mixture.mixer.features)


def _names(card: dict[str, Any]) -> tuple[str, ...]:
    """The datastores' paths as they were typed."""
    names = str(card.get("datastore", "")).split(":")
    known = len(names) == len(card["datastores"])
    return tuple(names) if known else ("a datastore",) * len(card["datastores"])
