"""Where a decoder's keys are read: the paper's choices of a representation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Spot:
    """A place in a decoder where a representation is read.

    Attributes:
        module: the module whose ``side`` it is.
        side: ``"input"`` or ``"output"``.
    """

    module: nn.Module
    side: str = "input"


@contextmanager
def watching(spot: Spot | None, into: list[Tensor]) -> Iterator[None]:
    """While the block runs, appends to ``into`` what a spot sees; None sees nothing."""
    if spot is None:
        yield
        return

    def keep_input(_: nn.Module, given: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        # Some modules are called by name: fairseq's attention, and that of transformers.
        found = given[0] if given else kwargs.get("query", kwargs.get("hidden_states"))
        assert found is not None
        into.append(found)

    def keep_output(_: nn.Module, __: Any, output: Any) -> None:
        into.append(output[0] if isinstance(output, tuple) else output)

    handle = (
        spot.module.register_forward_pre_hook(keep_input, with_kwargs=True)
        if spot.side == "input"
        else spot.module.register_forward_hook(keep_output)
    )
    try:
        yield
    finally:
        handle.remove()


def prenorm(decoder: Any) -> bool:
    return bool(decoder.layers[-1].normalize_before)


def _last_ffn_input(decoder: Any) -> Spot:
    return Spot(decoder.layers[-1].fc1)


def _last_ffn_input_before_norm(decoder: Any) -> Spot:
    last = decoder.layers[-1]
    # In a post-norm layer it is the norm after attention that stands before the FFN.
    return Spot(last.final_layer_norm if prenorm(decoder) else last.self_attn_layer_norm)


def _last_attn_input(decoder: Any) -> Spot:
    return Spot(decoder.layers[-1].self_attn)


def _last_attn_input_before_norm(decoder: Any) -> Spot | None:
    if prenorm(decoder):
        return Spot(decoder.layers[-1].self_attn_layer_norm)
    # Post-norm: the norm that ends the layer below, if there is one.
    return Spot(decoder.layers[-2].final_layer_norm) if len(decoder.layers) > 1 else None


def _decoder_output(decoder: Any) -> Spot | None:
    if not prenorm(decoder):
        return Spot(decoder.layers[-1], "output")
    return Spot(decoder.layer_norm, "output") if decoder.layer_norm is not None else None


def _decoder_output_before_norm(decoder: Any) -> Spot:
    if prenorm(decoder):
        return Spot(decoder.layers[-1], "output")
    return Spot(decoder.layers[-1].final_layer_norm)


#: The paper's choices of a key (section 5, "Key function"), by the names of ``--knn-keytype``, and
#: where fairseq's Transformer decoders have them.
KEY_TYPES: dict[str, Callable[[Any], Spot | None]] = {
    "last_ffn_input": _last_ffn_input,
    "last_ffn_input_before_norm": _last_ffn_input_before_norm,
    "last_attn_input": _last_attn_input,
    "last_attn_input_before_norm": _last_attn_input_before_norm,
    "decoder_output": _decoder_output,
    "decoder_output_before_norm": _decoder_output_before_norm,
}
