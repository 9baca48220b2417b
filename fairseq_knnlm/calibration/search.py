"""From a score table of valid to a calibration: no language model, no index, a few minutes.

The table's tokens are cut into stretches of text (``parts``). Most are fitted on; some tell a gate
when to stop learning; by some it is chosen between mixtures; the rest are held out of all this, and
on these alone a mixture is compared with the language model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from fairseq_knnlm.calibration.budget import Budget, clock_of
from fairseq_knnlm.calibration.costs import Clock
from fairseq_knnlm.calibration.fitter import Fitter
from fairseq_knnlm.calibration.skipping import fit_skip
from fairseq_knnlm.calibration.stored import Calibration, FittedMixture
from fairseq_knnlm.calibration.table import ScoreTable
from fairseq_knnlm.mixture.components import searches
from fairseq_knnlm.mixture.mixers import ALONE
from fairseq_knnlm.versions import versions


def expert_sets(experts: Sequence[str]) -> list[tuple[str, ...]]:
    """The experts one by one, then each with all before it; and these without a search."""
    ones = [(name,) for name in experts]
    sets = ones + [tuple(experts[:number]) for number in range(2, len(experts) + 1)]
    rests = [tuple(name for name in one if not searches(name)) for one in sets]
    return list(dict.fromkeys([*sets, *filter(None, rests)]))


def fit(
    table: ScoreTable,
    seed: int = 0,
    steps: Callable[[list[tuple[str, ...]]], Iterator[tuple[str, ...]]] = iter,
    budget: Budget | None = None,
) -> Calibration:
    """Every mixture of the table's experts, the best of them first in line.

    Args:
        table: a score table of text that the datastore does not hold.
        seed: of the gates.
        steps: goes through the sets of experts, to show progress.
        budget: of time, that what is used has to keep.

    Raises:
        TableError: where nothing can be fitted on the table, as ``Fitter`` tells.
    """
    fitter, clock = Fitter(table, seed), clock_of(table)
    mixtures, skips = [fitter.measured((), ALONE)], []
    sets = expert_sets(list(table.experts))
    plans = budget.plans if budget is not None else []
    for number, experts in enumerate(steps([*sets, *(plan.lean.experts for plan in plans)])):
        if number < len(sets):
            mixtures += [fitter.measured(experts, mixer) for mixer in fitter.mixers(experts)]
            skips.append(fit_skip(fitter, experts))
        else:
            plan = plans[number - len(sets)]
            mixer = fitter.of(plan.lean.components, plan.features)
            mixtures.append(fitter.measured(experts, mixer))
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
            "chosen_on": len(fitter.parts.choose),
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


def _seconds(clock: Clock, mixture: FittedMixture) -> float:
    return clock.seconds(mixture.mixer.components, mixture.mixer.features)


def _names(card: dict[str, Any]) -> tuple[str, ...]:
    """The datastores' paths as they were typed."""
    names = str(card.get("datastore", "")).split(":")
    known = len(names) == len(card["datastores"])
    return tuple(names) if known else ("a datastore",) * len(card["datastores"])
