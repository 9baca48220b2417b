"""Which language models can be read: one file a family, and a line for it here."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fairseq_knnlm.errors import ModelError
from fairseq_knnlm.lm import fconv, hf_causal, hf_gpt2, lightconv, lstm, transformer
from fairseq_knnlm.lm.contract import Family, LanguageModel

#: Families; the first that a model belongs to reads it.
FAMILIES: Sequence[Family] = (
    transformer.FAMILY,
    hf_gpt2.FAMILY,
    hf_causal.FAMILY,
    lightconv.FAMILY,
    fconv.FAMILY,
    lstm.FAMILY,
)


def is_supported(model: nn.Module) -> bool:
    """Whether some family reads the model."""
    return any(family.belongs(model) for family in FAMILIES)


def family_of(model: nn.Module) -> Family:
    """The family that reads a model.

    Raises:
        ModelError: where none does.
    """
    for family in FAMILIES:
        if family.belongs(model):
            return family
    raise ModelError(
        "this model's keys cannot be read",
        expected=f"a language model of {', '.join(family.name for family in FAMILIES)}",
        found=type(model).__name__,
    )


def language_model(model: nn.Module, key_type: str | None = None) -> LanguageModel:
    """The model, read as its family is.

    Args:
        model: weights loaded.
        key_type: one of ``KEY_TYPES``, or None to capture no keys.

    Raises:
        ModelError: where no family reads it.
    """
    return family_of(model).open(model, key_type)


def check_model(model: nn.Module, key_type: str | None) -> int:
    """The width of the model's keys; of its features where no keys are needed.

    Args:
        model: built.
        key_type: one of ``KEY_TYPES``, or None.

    Raises:
        ModelError: where no family reads it, or it lacks the place of the key type.
    """
    return family_of(model).width(model, key_type)
