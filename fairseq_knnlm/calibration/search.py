"""From a score table of valid to a calibration: no language model, no index, a few minutes.

The table's tokens are cut into stretches of text. Most are fitted on; some tell a gate when to stop
learning; by some it is chosen between mixtures; the rest are held out of all this, and on these
alone a mixture is compared with the language model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch

from fairseq_knnlm.calibration.fitting import (
    Examples,
    best_setting,
    fit_bins,
    fit_fixed,
    fit_gate,
    worth_mixing,
)
from fairseq_knnlm.calibration.stored import Calibration, Stack
from fairseq_knnlm.calibration.table import ScoreTable
from fairseq_knnlm.errors import TableError
from fairseq_knnlm.mixture.components import CONVENTIONS, LM, Abstain, Component, searches
from fairseq_knnlm.mixture.mix import mix
from fairseq_knnlm.mixture.mixers import ALONE, Bins, Fixed, Mixer, Skip, gathered
from fairseq_knnlm.versions import versions

#: Tokens of a stretch. Neighbouring tokens are alike, so the parts must not alternate quickly.
STRETCH = 2000
#: Of ten stretches, how many to fit on, to stop on and to choose on; the other is held out.
FIT, STOP, CHOOSE = 7, 1, 1
#: Tokens without which there is no telling them apart: four rounds of ten stretches of one token.
LEAST_ROWS = 40
#: The feature that bins go by.
BINNED = "knn_distances"
#: The feature that is the query.
QUERY = "lm_key"
#: A gate that skips searches reads the query itself, which is wide and soon learned by heart.
SKIP_DROPOUT, SKIP_DECAY = 0.5, 0.1
#: Shares of the searches for which a table tells what skipping them does.
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
#: A nearest neighbour this much nearer than the farthest is the token itself, but for rounding.
ITSELF = 1e-3
#: Of text that the datastore does not hold fewer tokens find themselves.
MOST_ITSELF = 0.2
#: Nats a token beyond which a perplexity is no number.
MOST_NATS = 700.0

M = TypeVar("M", bound=Mixer)


@dataclass(frozen=True)
class Parts:
    """Rows of a table, (M,) int64 each."""

    fit: np.ndarray
    stop: np.ndarray
    choose: np.ndarray
    report: np.ndarray

    @property
    def fixed(self) -> np.ndarray:
        """What weights are fitted on that need no stopping."""
        return np.concatenate([self.fit, self.stop])

    @property
    def unreported(self) -> np.ndarray:
        """What they are fitted on once more when nothing is left to choose."""
        return np.concatenate([self.fit, self.stop, self.choose])

    @classmethod
    def of(cls, rows: int) -> Parts:
        """Cuts a table: into shorter stretches where ten would not fit into it."""
        stretch = max(1, min(STRETCH, rows // LEAST_ROWS))
        turn = np.arange(rows) // stretch % 10
        part = np.searchsorted(np.cumsum([FIT, STOP, CHOOSE]), turn, side="right")
        return cls(*(np.flatnonzero(part == number) for number in range(4)))


class Fitter:
    """Fits mixers of a table's experts.

    Args:
        table: a score table of text that the datastore does not hold.
        seed: of the gates.

    Raises:
        TableError: where the table has no expert but the language model, too few tokens, or a
            column that nothing can be fitted on.
    """

    def __init__(self, table: ScoreTable, seed: int = 0) -> None:
        if not table.experts:
            raise TableError(
                "the score table has no neighbours in it",
                expected="a table written with --knnlm",
                found=", ".join(table.columns),
                do="write it with --knnlm --dstore-filename DSTORE --score-table FILE.npz",
            )
        _check_columns(table, LEAST_ROWS)
        self.table = table
        self.seed = seed
        self.parts = Parts.of(len(table))
        self._components: dict[tuple[tuple[str, ...], Abstain], list[Component]] = {}

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
        components = self._singles(experts)
        columns = log_probs(self.table, components, self.parts.fixed)
        return self._better(
            experts, lambda abstain: fit_fixed(components, columns, abstain=abstain)
        )

    def blend(self, experts: Sequence[str]) -> Fixed:
        """One weight for each of several settings an expert."""

        def fitted(abstain: Abstain) -> Fixed:
            components = self.components(experts, abstain)
            columns = log_probs(self.table, components, self.parts.fixed)
            return fit_fixed(components, columns, "blend", abstain)

        return self._better(experts, fitted)

    def bins(self, experts: Sequence[str]) -> Mixer:
        """One setting an expert, with weights by the distance of the nearest neighbour."""
        components, rows = self._singles(experts), self.parts.fixed
        nearest = self._nearest(rows)
        columns = log_probs(self.table, components, rows)
        return self._better(
            experts, lambda abstain: fit_bins(components, columns, BINNED, nearest, abstain)
        )

    def gate(self, experts: Sequence[str]) -> Mixer:
        """Weights by a small network, over several settings an expert; needs features."""
        features = self.features(experts)

        def fitted(abstain: Abstain) -> Mixer:
            components = self.components(experts, abstain)
            fit, stop = self._examples(components, features)
            return fit_gate(components, features, fit, stop, seed=self.seed, abstain=abstain)

        return self._better(experts, fitted)

    def mixers(self, experts: Sequence[str]) -> Iterator[Mixer]:
        """One of every kind that there is something to fit for."""
        yield (fixed := self.fixed(experts))
        blend = self.blend(experts)
        if len(blend.components) > len(fixed.components):
            yield blend
        if "knn" in experts and BINNED in self.table.columns:
            yield self.bins(experts)
        if self.features(experts):
            yield self.gate(experts)

    def _better(self, experts: Sequence[str], fitted: Callable[[Abstain], M]) -> M:
        """What is fitted under the convention, of who gets the weight of an expert that abstains,
        that does better on the tokens to choose on.
        """
        silent = any(np.isnan(self.table[name]).any() for name in experts)
        found = [fitted(abstain) for abstain in (CONVENTIONS if silent else CONVENTIONS[:1])]
        return min(found, key=lambda mixer: mean_loss(self.table, mixer, self.parts.choose))

    def _singles(self, experts: Sequence[str]) -> list[Component]:
        return [LM, *(self.single[name] for name in experts)]

    def skip(self, experts: Sequence[str]) -> Skip | None:
        """What tells before a search if it is worth its while; None where there is no telling.

        A search is worth the weight that a gate gives to neighbours which it has not seen.
        """
        features = self.features([name for name in experts if not searches(name)])
        features += [name for name in self.table.card["features"] if name == QUERY]
        if not features or not any(map(searches, experts)):
            return None
        components = self._singles(experts)
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
        # Of text that it did not learn from, nor is judged on.
        rows = np.concatenate([self.parts.stop, self.parts.choose])
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

    def components(self, experts: Sequence[str], abstain: Abstain = "share") -> list[Component]:
        """The settings that are worth mixing: those of which the best fixed mixture makes use."""
        if (known := self._components.get((tuple(experts), abstain))) is not None:
            return known
        every = [LM] + [
            Component(name, setting) for name in experts for setting in self.table.experts[name]
        ]
        # A part of the text tells which settings matter.
        columns = log_probs(self.table, every, self.parts.fit[::4])
        chosen = {every.index(self.single[name]) for name in experts} | {0}
        chosen |= set(worth_mixing(columns, abstain))
        found = [every[place] for place in sorted(chosen)]
        return self._components.setdefault((tuple(experts), abstain), found)

    def judge(self, experts: Sequence[str], mixer: Mixer) -> Stack:
        """A stack, with its figures on the tokens to choose on and on those held out."""
        choice = mean_loss(self.table, mixer, self.parts.choose)
        final = self._refitted(mixer)
        loss = mean_loss(self.table, final, self.parts.report)
        return Stack(tuple(experts), final, math.exp(loss), loss / math.log(2), math.exp(choice))

    def _refitted(self, mixer: Mixer) -> Mixer:
        """The same mixture, its weights fitted on the tokens to choose on, too.

        A gate stays as it is, since it takes long to train.
        """
        components, rows = mixer.components, self.parts.unreported
        if isinstance(mixer, Fixed) and mixer != ALONE:
            columns = log_probs(self.table, components, rows)
            return fit_fixed(components, columns, mixer.kind, mixer.abstain)
        if isinstance(mixer, Bins):
            columns, (feature,) = log_probs(self.table, components, rows), mixer.features
            return fit_bins(components, columns, feature, self._nearest(rows), mixer.abstain)
        return mixer

    def _nearest(self, rows: np.ndarray) -> np.ndarray:
        """(M,) distances of the nearest neighbours."""
        return self.table[BINNED].reshape(len(self.table), -1)[rows, 0]


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
    return -mix(columns, weights, mixer.abstain).double().numpy()


def mean_loss(table: ScoreTable, mixer: Mixer, rows: np.ndarray | slice = slice(None)) -> float:
    """Mean of ``mixture_losses``, natural log.

    Raises:
        TableError: where it is no number, or its perplexity none.
    """
    loss = float(mixture_losses(table, mixer, rows).mean())
    if not loss < MOST_NATS:
        raise TableError(
            "the score table gives a mixture no perplexity",
            expected=f"a loss below {MOST_NATS:g} nats a token",
            found=f"{loss:g}, of {'+'.join({one.expert: 0 for one in mixer.components})}",
            do="look for infinite or wrong numbers in the table, and write it again",
        )
    return loss


def _check_columns(table: ScoreTable, least: int) -> None:
    """Refuses a table of too few tokens, or in which somebody never says anything."""
    if len(table) < least:
        raise TableError(
            "the score table has too few tokens",
            expected=f"{least} at least, and tens of thousands for figures that mean something",
            found=len(table),
            do="write it of a longer text",
        )
    if count := int((~np.isfinite(table["lm"])).sum()):
        raise TableError(
            "the language model gives tokens of the score table no probability",
            expected="a finite number in every row of lm",
            found=f"{count:,} rows of {len(table):,} that are infinite or NaN",
            do="look for NaN in the checkpoint, or write the table without --fp16",
        )
    if wrong := [name for name in table.experts if np.isposinf(table[name]).any()]:
        raise TableError(
            f"{', '.join(wrong)} gives tokens of the score table more than certainty",
            expected="log-probabilities",
            found="infinity",
            do="write the table again",
        )
    if silent := [name for name in table.experts if np.isnan(table[name]).all()]:
        raise TableError(
            f"{', '.join(silent)} abstains from every token of the score table",
            expected="log-probabilities",
            found="NaN in every row",
            do="write the table without it, or of a longer text",
        )


def itself(table: ScoreTable) -> float:
    """Share of the tokens whose nearest neighbour is where they stand, but for rounding."""
    if BINNED not in table.columns or not len(table):
        return 0.0
    distances = table[BINNED].reshape(len(table), -1)
    return float(np.mean(np.abs(distances[:, 0]) <= ITSELF * distances[:, -1]))


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
        TableError: where the table is of another model or k, has no tokens, or lacks an expert of
            the mixture that is used. Other mixtures that it lacks an expert of are left out.
    """
    calibration.check_model(table.card["model"])
    _check_columns(table, LEAST_ROWS)
    _check_experts(calibration, table)
    stacks = []
    for stack in calibration.stacks:
        if not set(stack.experts) <= set(table.experts):
            continue
        loss = mean_loss(table, stack.mixer)
        stacks.append(replace(stack, perplexity=math.exp(loss), bits=loss / math.log(2)))
    default = [stack.name for stack in stacks].index(calibration.best.name)
    base = math.exp(mean_loss(table, ALONE))
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
        TableError: where nothing can be fitted on the table, as ``Fitter`` tells.
    """
    fitter = Fitter(table, seed)
    base = fitter.judge((), ALONE)
    stacks, skips = [base], []
    for experts in steps(stacks_of(list(table.experts))):
        stacks += [fitter.judge(experts, mixer) for mixer in fitter.mixers(experts)]
        skips.append(fitter.skip(experts))
    # The language model stands first: nothing is preferred that does not beat it.
    best = min(range(len(stacks)), key=lambda number: stacks[number].choice_perplexity)
    card = table.card
    return Calibration(
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
        base_perplexity=base.perplexity,
        stacks=tuple(stacks),
        default=best,
        versions=versions(),
        skips=tuple(skip for skip in skips if skip is not None),
    )


def _names(card: dict[str, Any]) -> tuple[str, ...]:
    """The datastores' paths as they were typed."""
    names = str(card.get("datastore", "")).split(":")
    known = len(names) == len(card["datastores"])
    return tuple(names) if known else ("a datastore",) * len(card["datastores"])
