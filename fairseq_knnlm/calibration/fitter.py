"""Fits the mixers of a score table's experts: one of every kind for any set of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch

from fairseq_knnlm.calibration.checks import DISTANCES, check_columns
from fairseq_knnlm.calibration.costs import owners
from fairseq_knnlm.calibration.fitting import best_setting, fit_bins, fit_fixed, worth_mixing
from fairseq_knnlm.calibration.gates import Examples, fit_gate
from fairseq_knnlm.calibration.losses import log_probs, mean_loss, tensors
from fairseq_knnlm.calibration.parts import Parts
from fairseq_knnlm.calibration.stored import FittedMixture
from fairseq_knnlm.calibration.table import ScoreTable
from fairseq_knnlm.errors import TableError
from fairseq_knnlm.mixture.components import CONVENTIONS, LM, Abstain, Component
from fairseq_knnlm.mixture.mixers import ALONE, Bins, Fixed, Mixer, gathered

#: The feature that is the query.
QUERY = "lm_key"

M = TypeVar("M", bound=Mixer)


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
        check_columns(table)
        self.table = table
        self.seed = seed
        self.parts = Parts.of(len(table))
        self._components: dict[tuple[tuple[str, ...], Abstain], list[Component]] = {}

    @cached_property
    def single(self) -> dict[str, Component]:
        """For each expert the setting that helps the language model most."""
        rows = self.parts.settings
        lm = self.table["lm"][rows]
        best = {}
        for name, settings in self.table.experts.items():
            # Those of a part of the neighbours are for mixing.
            every = range(len(settings))
            whole = [n for n in every if _is_whole(settings[n])] or list(every)
            place, _ = best_setting(lm, self.table[name][rows][:, whole])
            best[name] = Component(name, settings[whole[place]])
        return best

    def fixed(self, experts: Sequence[str]) -> Fixed:
        """One setting and one weight an expert."""
        components = self.singles(experts)
        columns = log_probs(self.table, components, self.parts.fit)
        return self._better(
            experts, lambda abstain: fit_fixed(components, columns, abstain=abstain)
        )

    def blend(self, experts: Sequence[str]) -> Fixed:
        """One weight for each of several settings an expert."""

        def fitted(abstain: Abstain) -> Fixed:
            components = self.components(experts, abstain)
            columns = log_probs(self.table, components, self.parts.fit)
            return fit_fixed(components, columns, "blend", abstain)

        return self._better(experts, fitted)

    def bins(self, experts: Sequence[str]) -> Mixer:
        """One setting an expert, with weights by the distance of the nearest neighbour."""
        components, rows = self.singles(experts), self.parts.fit
        nearest = self._nearest(rows)
        columns = log_probs(self.table, components, rows)
        return self._better(
            experts, lambda abstain: fit_bins(components, columns, DISTANCES, nearest, abstain)
        )

    def gate(self, experts: Sequence[str], conventions: Sequence[Abstain] = CONVENTIONS) -> Mixer:
        """Weights by a small network, over several settings an expert; needs features.

        Args:
            experts: names of those to mix.
            conventions: of who gets the weight of an expert that abstains; the best of them is
                taken.
        """
        features = self.features(experts)

        def fitted(abstain: Abstain) -> Mixer:
            return self._gate(self.components(experts, abstain), features, abstain)

        return self._better(experts, fitted, conventions)

    def of(self, components: Sequence[Component], features: Sequence[str]) -> Mixer:
        """Weights of these components: by a gate over these features, or the same for all tokens.

        Args:
            components: the language model first.
            features: names; none for weights that are the same.
        """
        columns = log_probs(self.table, components, self.parts.fit)
        blend = self._better(
            [one.expert for one in components[1:]],
            lambda abstain: fit_fixed(components, columns, "blend", abstain),
        )
        return self._gate(components, features, blend.abstain) if features else blend

    def _gate(
        self, components: Sequence[Component], features: Sequence[str], abstain: Abstain
    ) -> Mixer:
        fit, stop = self.examples(components, features)
        return fit_gate(components, features, fit, stop, seed=self.seed, abstain=abstain)

    def mixers(self, experts: Sequence[str]) -> Iterator[Mixer]:
        """One of every kind that there is something to fit for."""
        yield (fixed := self.fixed(experts))
        blend = self.blend(experts)
        if len(blend.components) > len(fixed.components):
            yield blend
        if "knn" in experts and DISTANCES in self.table.columns:
            yield self.bins(experts)
        if self.features(experts):
            # It takes long to train, and what suits the blend of the same settings suits it.
            yield self.gate(experts, (blend.abstain,))

    def _better(
        self,
        experts: Sequence[str],
        fitted: Callable[[Abstain], M],
        conventions: Sequence[Abstain] = CONVENTIONS,
    ) -> M:
        """What is fitted under the convention, of who gets the weight of an expert that abstains,
        that does better on the tokens to choose on.
        """
        abstaining = any(np.isnan(self.table[name]).any() for name in experts)
        found = [fitted(abstain) for abstain in (conventions if abstaining else conventions[:1])]
        return min(found, key=lambda mixer: mean_loss(self.table, mixer, self.parts.compared))

    def singles(self, experts: Sequence[str]) -> list[Component]:
        """The language model, and each expert in its ``single`` setting."""
        return [LM, *(self.single[name] for name in experts)]

    def examples(
        self, components: Sequence[Component], features: Sequence[str]
    ) -> tuple[Examples, Examples]:
        """What a gate learns from, and what it stops on."""

        def of(rows: np.ndarray) -> Examples:
            columns = torch.from_numpy(log_probs(self.table, components, rows))
            inputs = tensors(self.table.features(features, rows))
            return Examples(columns, gathered(inputs, features))

        return of(self.parts.fit), of(self.parts.stop)

    def features(self, experts: Sequence[str]) -> list[str]:
        """What a gate over these experts can go by: features of theirs and of the LM.

        Not the query itself, from which a gate that sees the neighbours learns little.
        """
        every = self.table.card["features"]
        owner = owners(every, self.table.experts)
        return [name for name in every if owner[name] in ("lm", *experts) and name != QUERY]

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

    def measured(self, experts: Sequence[str], mixer: Mixer) -> FittedMixture:
        """A mixture, with its figures on the tokens to choose on and on those held out."""
        choice = mean_loss(self.table, mixer, self.parts.compared)
        final = self._refitted(mixer)
        loss = mean_loss(self.table, final, self.parts.report)
        return FittedMixture(
            tuple(experts), final, math.exp(loss), loss / math.log(2), math.exp(choice)
        )

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
        return self.table[DISTANCES].reshape(len(self.table), -1)[rows, 0]


def _is_whole(setting: dict[str, object]) -> bool:
    return not setting.get("suffix") and not setting.get("k")
