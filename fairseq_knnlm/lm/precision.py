"""In which type a language model computes.

Some processors have instructions for matrix products of bfloat16 numbers. fairseq's own flag for
that converts the whole model, and does nothing where a text is scored; PyTorch's autocast around
the whole model fails in the adaptive input. So it is put around the decoder's layers, one by one:
weights, the sums between layers, features and keys stay float32, in training too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from fairseq_knnlm.errors import ModelError
from fairseq_knnlm.lm.transformer import is_transformer

FLOAT32, BFLOAT16 = "float32", "bfloat16"
#: What the layers can compute in, by the names of ``--lm-dtype``.
DTYPES = (FLOAT32, BFLOAT16)
#: What CPUs call the instructions, of which one is enough.
CPU_INSTRUCTIONS = ("avx512_bf16", "avx10_2", "amx_bf16", "bf16")


def precision(model: nn.Module) -> str:
    """What it computes in: ``"bfloat16"`` of layers that do, else the type of its weights."""
    if computes_in_bfloat16(model):
        return BFLOAT16
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def computes_in_bfloat16(model: nn.Module) -> bool:
    """Whether its layers do, by ``compute_in``."""
    layers: Any = getattr(getattr(model, "decoder", None), "layers", None)
    return bool(layers) and all(map(_is_set, layers))


def compute_in(model: nn.Module, dtype: str) -> None:
    """Has the decoder's layers compute in a type.

    Matrix products and attention do; norms, the sums between layers and what layers return stay
    float32, as all weights do. Gradients pass as ever.

    Args:
        model: with a decoder of fairseq's Transformer kind, in float32.
        dtype: of ``DTYPES``.

    Raises:
        ModelError: where it has no such decoder.
    """
    if dtype == FLOAT32:
        return
    if not is_transformer(model):
        raise ModelError(
            f"--lm-dtype {dtype} does not work with this model",
            expected="a language model with a Transformer decoder, such as transformer_lm",
            found=type(model).__name__,
            do="leave --lm-dtype out; a model of transformers computes in the type that "
            "`fairseq-knnlm wrap --dtype bfloat16` gave its weights",
        )
    decoder: Any = model.decoder
    for layer in decoder.layers:
        if not _is_set(layer):
            # As fairseq's checkpoint_wrapper has it: what a layer is, its name and weights stay.
            layer.forward = partial(_in_bfloat16, layer.forward)


def fast_in_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for products of bfloat16 numbers."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # of PyTorch 2.11 on
    if capabilities is not None:
        known = capabilities()
        return any(known.get(name) for name in CPU_INSTRUCTIONS)
    return bool(torch.cpu._is_avx512_bf16_supported())


def _is_set(layer: Any) -> bool:
    forward = getattr(layer, "forward", None)
    return isinstance(forward, partial) and forward.func is _in_bfloat16


def _in_bfloat16(forward: Callable[..., Any], x: Any, *rest: Any, **named: Any) -> Any:
    """The forward pass of a layer, (T, B, C) float32 to the same and whatever else it returns."""
    if x.dtype is not torch.float32:
        raise ModelError(
            "--lm-dtype bfloat16 is for a model in float32",
            expected="float32 weights",
            found=str(x.dtype).removeprefix("torch."),
            do="leave --lm-dtype out, or whatever converts the model",
        )
    with torch.autocast(x.device.type, torch.bfloat16):
        out, *others = forward(x, *rest, **named)
    return (out.float(), *others)
