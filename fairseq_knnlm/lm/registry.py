"""Which language models can be read: one file a family, and a line for it here."""

from __future__ import annotations

from typing import Any

from torch import nn

from fairseq_knnlm.errors import ModelError
from fairseq_knnlm.lm.keys import KEY_TYPES, prenorm
from fairseq_knnlm.lm.transformer import TransformerLM, is_transformer

#: Families: what tells a model of the family, and the class that reads it.
FAMILIES = ((is_transformer, TransformerLM),)


def is_supported(model: nn.Module) -> bool:
    """Whether some family reads the model."""
    return any(belongs(model) for belongs, _ in FAMILIES)


def language_model(model: nn.Module, key_type: str | None = None) -> TransformerLM:
    """The model, read as its family is.

    Args:
        model: weights loaded.
        key_type: one of ``KEY_TYPES``, or None to capture no keys.

    Raises:
        ModelError: where no family reads it.
    """
    for belongs, family in FAMILIES:
        if belongs(model):
            return family(model, key_type)
    raise _unknown(model)


def check_model(model: nn.Module, key_type: str) -> int:
    """The width of the model's keys.

    Raises:
        ModelError: where it is no Transformer decoder or lacks the layer of the key type.
    """
    decoder: Any = getattr(model, "decoder", None)
    if not is_supported(model):
        raise _unknown(model)
    if KEY_TYPES[key_type](decoder) is None:
        raise ModelError(
            f"the model has no layer for --knn-keytype {key_type}",
            expected="decoder_output needs a final layer norm; last_attn_input_before_norm "
            "needs two layers where the norm comes after",
            found=f"{len(decoder.layers)} layers, "
            + ("no final norm" if prenorm(decoder) else "norm after each block"),
            do="choose another --knn-keytype; the paper's is last_ffn_input",
        )
    return int(decoder.embed_dim)


def _unknown(model: nn.Module) -> ModelError:
    return ModelError(
        "this model's keys cannot be read",
        expected="a language model with fairseq's Transformer decoder, such as transformer_lm",
        found=type(model).__name__,
    )
