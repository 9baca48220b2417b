"""From a score table of valid to a calibration: no language model, no index, a few minutes.

The table's tokens are cut into stretches of text. Most are fitted on; some tell a gate when to stop
learning; the rest are held out, and on these alone a mixture is compared with the language model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from fairseq_knnlm.calibration import Calibration, Stack
from fairseq_knnlm.errors import TableError
from fairseq_knnlm.fitting import (
    Examples,
    best_setting,
    fit_bins,
    fit_fixed,
    fit_gate,
    worth_mixing,
)
from fairseq_knnlm.mixers import ALONE, LM, Component, Fixed, Mixer, Skip, gathered, searches
from fairseq_knnlm.mixing import mix
from fairseq_knnlm.tables import ScoreTable
from fairseq_knnlm.versions import versions

#: Tokens of a stretch. Neighbouring tokens are alike, so the parts must not alternate quickly.
STRETCH = 2000
#: Of ten stretches, how many to fit on and how many to stop on; the others are held out.
FIT, STOP = 8, 1
#: The feature that bins go by.
BINNED = "knn_distances"
#: The feature that is the query.
QUERY = "lm_key"
#: A gate that skips searches reads the query itself, which is wide and soon learned by heart.
SKIP_DROPOUT, SKIP_DECAY = 0.5, 0.1
#: Shares of the searches for which a table tells what skipping them does.
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Parts:
    """Rows of a table, (M,) int64 each."""

    fit: np.ndarray
    stop: np.ndarray
    held_out: np.ndarray

    @property
    def fixed(self) -> np.ndarray:
        """What weights are fitted on that need no stopping."""
        return np.concatenate([self.fit, self.stop])

    @classmethod
    def of(cls, rows: int) -> Parts:
        """Cuts a table: into shorter stretches where ten would not fit into it."""
        stretch = max(1, min(STRETCH, rows // 40))
        turn = np.arange(rows) // stretch % 10
        return cls(
            np.flatnonzero(turn < FIT),
            np.flatnonzero((turn >= FIT) & (turn < FIT + STOP)),
            np.flatnonzero(turn >= FIT + STOP),
        )


class Fitter:
    """Fits mixers of a table's experts.

    Args:
        table: a score table of text that the datastore does not hold.
        seed: of the gates.

    Raises:
        TableError: where the table has no expert but the language model.
    """

    def __init__(self, table: ScoreTable, seed: int = 0) -> None:
        if not table.experts:
            raise TableError(
                "the score table has no neighbours in it",
                expected="a table written with --knnlm",
                found=", ".join(table.columns),
                do="write it with --knnlm --dstore-filename DSTORE --score-table FILE.npz",
            )
        self.table = table
        self.seed = seed
        self.parts = Parts.of(len(table))
        self._components: dict[tuple[str, ...], list[Component]] = {}

    @cached_property
    def single(self) -> dict[str, Component]:
        """For each expert the setting that helps the language model most."""
        rows = self.parts.fixed
        lm = self.table["lm"][rows]
        best = {}
        for name, settings in self.table.experts.items():
            # Those of a part of the neighbours are for mixing.
            whole = [n for n, setting in enumerate(settings) if _is_whole(setting)]
            place, _ = best_setting(lm, self.table[name][rows][:, whole])
            best[name] = Component(name, settings[whole[place]])
        return best

    def fixed(self, experts: Sequence[str]) -> Fixed:
        """One setting and one weight an expert."""
        components = [LM, *(self.single[name] for name in experts)]
        return fit_fixed(components, log_probs(self.table, components, self.parts.fixed))

    def blend(self, experts: Sequence[str]) -> Fixed:
        """One weight for each of several settings an expert."""
        components = self.components(experts)
        columns = log_probs(self.table, components, self.parts.fixed)
        return fit_fixed(components, columns, "blend")

    def bins(self, experts: Sequence[str]) -> Mixer:
        """The same with weights by the distance of the nearest neighbour."""
        components = [LM, *(self.single[name] for name in experts)]
        rows = self.parts.fixed
        nearest = self.table[BINNED].reshape(len(self.table), -1)[rows, 0]
        return fit_bins(components, log_probs(self.table, components, rows), BINNED, nearest)

    def gate(self, experts: Sequence[str]) -> Mixer:
        """Weights by a small network, over several settings an expert; needs features."""
        components = self.components(experts)
        features = self.features(experts)
        fit, stop = self._examples(components, features)
        return fit_gate(components, features, fit, stop, seed=self.seed)

    def skip(self, experts: Sequence[str]) -> Skip | None:
        """What tells before a search if it is worth its while; None where there is no telling.

        A search is worth the weight that a gate gives to neighbours which it has not seen.
        """
        features = self.features([name for name in experts if not searches(name)])
        features += [name for name in self.table.card["features"] if name == QUERY]
        if not features or not any(map(searches, experts)):
            return None
        components = [LM, *(self.single[name] for name in experts)]
        fit, stop = self._examples(components, features)
        gate = fit_gate(
            components,
            features,
            fit,
            stop,
            seed=self.seed,
            dropout=SKIP_DROPOUT,
            weight_decay=SKIP_DECAY,
        )
        # Of all text that it did not learn from; they depend on no target.
        rows = np.concatenate([self.parts.stop, self.parts.held_out])
        scores = Skip(gate, ()).scores(self.table.features(features, rows)).numpy()
        return Skip(gate, np.quantile(scores, np.linspace(0, 1, 101)).tolist())

    def _examples(
        self, components: Sequence[Component], features: Sequence[str]
    ) -> tuple[Examples, Examples]:
        """To learn from, and to stop on."""

        def examples(rows: np.ndarray) -> Examples:
            columns = torch.from_numpy(log_probs(self.table, components, rows))
            return Examples(columns, gathered(self.table.features(features, rows), features))

        return examples(self.parts.fit), examples(self.parts.stop)

    def features(self, experts: Sequence[str]) -> list[str]:
        """What a gate over these experts can go by: features of theirs and of the LM.

        Not the query itself, from which a gate that sees the neighbours learns little.
        """
        owners = ("lm", *experts)
        every = self.table.card["features"]
        return [name for name in every if _owner(name) in owners and name != QUERY]

    def components(self, experts: Sequence[str]) -> list[Component]:
        """The settings that are worth mixing: those of which the best fixed mixture makes use."""
        if (known := self._components.get(tuple(experts))) is not None:
            return known
        every = [LM] + [
            Component(name, setting) for name in experts for setting in self.table.experts[name]
        ]
        # A part of the text tells which settings matter.
        columns = log_probs(self.table, every, self.parts.fit[::4])
        chosen = {every.index(self.single[name]) for name in experts} | {0}
        found = [every[place] for place in sorted(chosen | set(worth_mixing(columns)))]
        return self._components.setdefault(tuple(experts), found)

    def judge(self, experts: Sequence[str], mixer: Mixer) -> Stack:
        """A stack, with its figures on the tokens held out."""
        loss = mixture_losses(self.table, mixer, self.parts.held_out).mean()
        return Stack(tuple(experts), mixer, math.exp(loss), loss / math.log(2))


def _is_whole(setting: dict[str, object]) -> bool:
    return not setting.get("suffix") and not setting.get("k")


def _owner(feature: str) -> str:
    """The expert whose feature it is."""
    return feature.split("_")[0]


def log_probs(
    table: ScoreTable, components: Sequence[Component], rows: np.ndarray | slice = slice(None)
) -> np.ndarray:
    """(N, E) float32, the components' columns of a table."""
    return np.stack([table.column(component)[rows] for component in components], axis=1)


def mixture_losses(
    table: ScoreTable, mixer: Mixer, rows: np.ndarray | slice = slice(None)
) -> np.ndarray:
    """(N,) float64, -log p of each token of a table's rows by a mixture, natural log."""
    columns = torch.from_numpy(log_probs(table, mixer.components, rows))
    weights = mixer.log_weights(table.features(mixer.features, rows))
    return -mix(columns, weights).double().numpy()


def stacks_of(experts: Sequence[str]) -> list[tuple[str, ...]]:
    """The experts one by one, then each with all before it; and these without a search."""
    ones = [(name,) for name in experts]
    sets = ones + [tuple(experts[:number]) for number in range(2, len(experts) + 1)]
    rests = [tuple(name for name in one if not searches(name)) for one in sets]
    return list(dict.fromkeys([*sets, *filter(None, rests)]))


def lines(calibration: Calibration) -> list[str]:
    """What each part adds, as a table to read."""
    base = calibration.base_perplexity
    rows = [f"{'mixture':<28} {'perplexity':>10} {'change':>8}"]
    for number, stack in enumerate(calibration.stacks):
        change = f"{stack.perplexity / base - 1:+.1%}" if stack.experts else ""
        used = "  <- used" if number == calibration.default else ""
        rows.append(f"{stack.name:<28} {stack.perplexity:>10.2f} {change:>8}{used}".rstrip())
    return rows


def skipping_lines(
    calibration: Calibration, table: ScoreTable, rows: np.ndarray | slice = slice(None)
) -> list[str]:
    """What skipping shares of the searches does to perplexity, as a table to read.

    Args:
        calibration: what was fitted.
        table: the tokens' columns.
        rows: of the table, which of them count.
    """
    found = [f"{'experts':<28}" + "".join(f"{f'{share:.0%}':>16}" for share in SHARES)]
    for skip in calibration.skips:
        if set(table.columns) >= {*skip.experts, *skip.gate.features}:
            pairs = skipped(calibration, skip, table, rows)
            cells = "".join(f"{f'{p:.2f} ({share:.1%})':>16}" for share, p in pairs)
            found.append(f"{'+'.join(skip.experts):<28}{cells}")
    return found if len(found) > 1 else []


def skipped(
    calibration: Calibration, skip: Skip, table: ScoreTable, rows: np.ndarray | slice = slice(None)
) -> list[tuple[float, float]]:
    """The share of the searches really skipped, and perplexity, for each of ``SHARES``."""
    stacks = calibration.find(skip.experts), calibration.find(skip.rest)
    searched, rest = (mixture_losses(table, stack.mixer, rows) for stack in stacks if stack)
    scores = skip.scores(table.features(skip.gate.features, rows)).numpy()
    found = []
    for share in SHARES:
        out = scores < skip.threshold(share)
        loss = np.where(out, rest, searched).mean()
        found.append((float(out.mean()), math.exp(loss)))
    return found


def tested(calibration: Calibration, table: ScoreTable) -> Calibration:
    """The same mixtures with their figures on another table, such as one of test.

    Raises:
        TableError: where the table is of another model or k, or lacks an expert of the mixture
            that is used. Other mixtures that it lacks an expert of are left out.
    """
    calibration.check_model(table.card["model"])
    _check_experts(calibration, table)
    stacks = []
    for stack in calibration.stacks:
        if not set(stack.experts) <= set(table.experts):
            continue
        loss = mixture_losses(table, stack.mixer).mean()
        stacks.append(replace(stack, perplexity=math.exp(loss), bits=loss / math.log(2)))
    default = [stack.name for stack in stacks].index(calibration.best.name)
    base = stacks[0].perplexity
    return replace(calibration, stacks=tuple(stacks), base_perplexity=base, default=default)


def _check_experts(calibration: Calibration, table: ScoreTable) -> None:
    used = calibration.best.experts
    if missing := [name for name in used if name not in table.experts]:
        raise TableError(
            f"the score table lacks {', '.join(missing)}, which the calibration mixes",
            expected=", ".join(used),
            found=", ".join(table.experts) or "the language model alone",
            do=f"write it with --experts {','.join(used)}",
        )
    for name in set(table.experts) & set(calibration.experts):
        cards = calibration.experts[name], table.card["described"][name]
        then, now = (card.get("k") for card in cards)
        if then != now:
            raise TableError(
                "the score table is of another number of neighbours",
                expected=f"k {then}, as the calibration was fitted with",
                found=f"k {now}",
                do=f"write it with --k {then}",
            )


def fit(
    table: ScoreTable,
    seed: int = 0,
    steps: Callable[[list[tuple[str, ...]]], Iterator[tuple[str, ...]]] = iter,
) -> Calibration:
    """Every mixture of the table's experts, the best of them first in line.

    Args:
        table: a score table of text that the datastore does not hold.
        seed: of the gates.
        steps: goes through the sets of experts, to show progress.

    Raises:
        TableError: where the table has no expert but the language model.
    """
    fitter = Fitter(table, seed)
    base = fitter.judge((), ALONE)
    stacks, skips = [base], []
    for experts in steps(stacks_of(list(table.experts))):
        mixers: list[Mixer] = [fitter.fixed(experts)]
        if len(fitter.components(experts)) > len(mixers[0].components):
            mixers.append(fitter.blend(experts))
        if "knn" in experts and BINNED in table.columns:
            mixers.append(fitter.bins(experts))
        if fitter.features(experts):
            mixers.append(fitter.gate(experts))
        stacks += [fitter.judge(experts, mixer) for mixer in mixers]
        skips.append(fitter.skip(experts))
    # The language model stands first: nothing is preferred that does not beat it.
    best = min(range(len(stacks)), key=lambda number: stacks[number].perplexity)
    card = table.card
    return Calibration(
        datastores=tuple(card["datastores"]),
        model=card["model"],
        fitted_on={
            "split": card["split"],
            "tokens": len(table),
            "held_out": len(fitter.parts.held_out),
            "seed": seed,
        },
        experts=card["described"],
        base_perplexity=base.perplexity,
        stacks=tuple(stacks),
        default=best,
        versions=versions(),
        skips=tuple(skip for skip in skips if skip is not None),
    )
