"""The panel: a language model, its experts, and the mixer that weighs what they say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_knnlm.experts.knn import Expert, Opinion, Passage
from fairseq_knnlm.mixture.components import LM, Component, searches
from fairseq_knnlm.mixture.mix import mix
from fairseq_knnlm.mixture.mixers import ALONE, Mixer, Skip


@dataclass(frozen=True)
class Verdict:
    """What a panel says of a batch.

    Attributes:
        opinions: by the expert's name.
        log_probs: (N,) float32, natural log, of the mixture.
    """

    opinions: dict[str, Opinion]
    log_probs: Tensor


class Panel:
    """Asks every expert and mixes the answers.

    Args:
        experts: who is asked, besides the language model.
        mixer: weighs components; each is a setting of one of the experts.
    """

    def __init__(self, experts: Sequence[Expert] = (), mixer: Mixer = ALONE) -> None:
        self.experts = experts
        self.mixer = mixer
        self._places = {
            expert.name: [dict(setting) for setting in expert.settings] for expert in experts
        }
        for component in mixer.components:
            assert component == LM or component.setting in self._places[component.expert]

    def judge(self, base: Tensor, passage: Passage) -> Verdict:
        """Mixes the language model's log-probabilities, (N,), with the experts'."""
        opinions = {expert.name: expert.opinion(passage) for expert in self.experts}
        return Verdict(opinions, self.mixed(base, opinions))

    def mixed(self, base: Tensor, opinions: dict[str, Opinion]) -> Tensor:
        """(N,) float32, natural log, of the mixture of the language model's and these opinions."""
        if list(self.mixer.components) == [LM]:
            return base
        columns = [self._column(component, base, opinions) for component in self.mixer.components]
        log_weights = self.mixer.log_weights(_features(opinions)).to(base.device)
        return mix(torch.stack(columns, dim=1), log_weights, self.mixer.abstain)

    def _column(self, component: Component, base: Tensor, opinions: dict[str, Opinion]) -> Tensor:
        if component == LM:
            return base
        place = self._places[component.expert].index(component.setting)
        return opinions[component.expert].log_probs[:, place]


class SkippingPanel(Panel):
    """Asks the other experts first, and the datastore only where that promises to help.

    He et al. (2021) call this adaptive retrieval. A token that is searched for is scored as by
    ``Panel``; one that is not, by a mixture that never knew of the datastore.

    Args:
        experts: who is asked, besides the language model.
        mixer: weighs components of them all.
        rest: weighs components of those that do not search.
        skip: tells which searches are worth their while.
        share: of the searches to be skipped, 0 to 1, as far as the text is like what ``skip`` was
            fitted on.

    Attributes:
        tokens: how many were judged.
        searched: how many of them were searched for.
    """

    def __init__(
        self, experts: Sequence[Expert], mixer: Mixer, rest: Mixer, skip: Skip, share: float
    ) -> None:
        super().__init__(experts, mixer)
        self.searching = [expert for expert in experts if searches(expert.name)]
        self.rest = Panel([one for one in experts if one not in self.searching], rest)
        self.skip = skip
        self.threshold = skip.threshold(share)
        self.tokens = self.searched = 0

    def judge(self, base: Tensor, passage: Passage) -> Verdict:
        """Mixes the language model's log-probabilities, (N,), with the experts'."""
        verdict = self.rest.judge(base, passage)
        scores = self.skip.scores(_features(verdict.opinions)).to(base.device)
        rows = (scores >= self.threshold).nonzero().squeeze(1)
        self.tokens += len(base)
        self.searched += len(rows)
        if not len(rows):
            return verdict
        some = passage.at(rows)
        opinions = {name: opinion.at(rows) for name, opinion in verdict.opinions.items()}
        opinions |= {expert.name: expert.opinion(some) for expert in self.searching}
        log_probs = verdict.log_probs.index_copy(0, rows, self.mixed(base[rows], opinions))
        return Verdict(verdict.opinions, log_probs)


def _features(opinions: dict[str, Opinion]) -> dict[str, Tensor]:
    """By name, those of all experts."""
    return {
        name: feature for opinion in opinions.values() for name, feature in opinion.features.items()
    }
