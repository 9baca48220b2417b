"""A second language model as an expert: its flags, and how it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fairseq_knnlm.experts.kind import Kind, Models, Opened, flag
from fairseq_knnlm.experts.knn import ModelExpert
from fairseq_knnlm.lm.transformer import TargetLM


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
    ) -> ModelExpert:
        return ModelExpert(TargetLM(models.others[opened.name], models.pad))

    def described(self, opened: Opened, models: Models) -> dict[str, Any]:
        return {"model": models.fingerprints[opened.name]}


KIND = SecondKind()
