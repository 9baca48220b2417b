"""Language models as experts: the one that is given a memory, a second one, and their features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairseq_knnlm.experts.contract import FeaturesOnly, Timeless
from fairseq_knnlm.experts.dense import DensePrediction
from fairseq_knnlm.experts.kind import Kind, Models, Opened, flag
from fairseq_knnlm.lm.contexts import Contexts
from fairseq_knnlm.lm.contract import LanguageModel
from fairseq_knnlm.lm.registry import language_model

#: Contexts whose whole distribution is looked at at a time, where only its shape is wanted.
SHAPES_AT_A_TIME = 256


class LMExpert(Timeless):
    """A language model.

    Args:
        models: one, or several for the mean of their probabilities.
        name: ``lm`` for the language model that is given a memory; of any other, its features are
            under that name in the contexts, a model each with a number behind it but for the first.
    """

    settings: Sequence[Mapping[str, Any]] = ({},)

    def __init__(self, *models: LanguageModel, name: str = "lm") -> None:
        self.models = models
        self.name = name

    def predict(self, contexts: Contexts) -> DensePrediction:
        """What follows N contexts, by the model's features."""
        features = [_features(contexts, self.name, number) for number in range(len(self.models))]
        pairs = list(zip(self.models, features, strict=True))
        return DensePrediction(
            lambda tokens: _mean([model.log_prob(known, tokens) for model, known in pairs]),
            lambda: _mean([model.log_probs(known) for model, known in pairs]),
        )


def _features(contexts: Contexts, name: str, number: int) -> Tensor:
    if name == "lm" and number == 0:
        return contexts.features
    return contexts.others[member(name, number)]


def member(name: str, number: int) -> str:
    """What features of one of several models are called in contexts."""
    return f"{name}.{number}" if number else name


def _mean(log_probs: Sequence[Tensor]) -> Tensor:
    """log of the mean of probabilities."""
    if len(log_probs) == 1:
        return log_probs[0]
    return torch.logsumexp(torch.stack(list(log_probs)), dim=0) - math.log(len(log_probs))


class ShapeExpert(Timeless):
    """The shape of the language model's own distribution: features, and no word on tokens.

    It takes a softmax over the whole vocabulary, which nothing else here does.

    Args:
        lm: the language model.
    """

    name = "lm_shape"
    settings: Sequence[Mapping[str, Any]] = ()

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm

    def predict(self, contexts: Contexts) -> FeaturesOnly:
        """Entropy and log of the largest probability, (N,) float32 each, natural."""
        entropies, tops = [], []
        for features in contexts.features.split(SHAPES_AT_A_TIME):
            log_probs = self.lm.log_probs(features)
            entropies.append(torch.special.entr(log_probs.exp()).sum(dim=1))
            tops.append(log_probs.amax(dim=1))
        return FeaturesOnly({"lm_entropy": torch.cat(entropies), "lm_top": torch.cat(tops)})


class KeyExpert(Timeless):
    """The query itself, as features of a gate that is asked before the search.

    He et al. (2021) let their retrieval adaptor go by it.
    """

    name = "lm_key"
    settings: Sequence[Mapping[str, Any]] = ()

    def predict(self, contexts: Contexts) -> FeaturesOnly:
        """The keys, (N, D) float16."""
        assert contexts.keys is not None
        return FeaturesOnly({"lm_key": contexts.keys.half()})


@dataclass(frozen=True)
class SecondOptions:
    """Flags of a second language model."""

    expert_lm: str | None = flag(
        None, "checkpoint of a second language model, for lm2", checkpoint=True
    )
    expert_lm_lmbda: float | None = flag(
        None, "weight of that model (default: the calibration, else 0.1)", weight=True
    )


@dataclass(frozen=True)
class NoSetting:
    """Of what has one column alone."""


class SecondKind(Kind):
    """``lm2``."""

    name = "lm2"
    options = SecondOptions
    setting = NoSetting

    def make(
        self, opened: Opened, models: Models, settings: Sequence[NoSetting], features: bool
    ) -> LMExpert:
        return LMExpert(language_model(models.others[opened.name]), name=opened.name)

    def described(self, opened: Opened, models: Models) -> dict[str, Any]:
        return {"model": models.fingerprints[opened.name]}


KIND = SecondKind()
