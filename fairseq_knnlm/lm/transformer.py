"""fairseq's Transformer decoders as language models: features and keys in, log-probabilities out.

The model runs unmodified, up to its features; a hook sees the representation that serves as key.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_knnlm.errors import ModelError
from fairseq_knnlm.lm import softmax
from fairseq_knnlm.lm.contexts import Encoded, first_column, tokens_before
from fairseq_knnlm.lm.keys import KEY_TYPES, prenorm, watching
from fairseq_knnlm.lm.products import FastProducts
from fairseq_knnlm.lm.reading import Reading

#: Positions that go through the layers at a time, on a CPU.
POSITIONS_AT_A_TIME = 2048
#: What every key type reads of a decoder's last layer.
LAYER_PARTS = ("fc1", "self_attn", "self_attn_layer_norm", "final_layer_norm", "normalize_before")
#: Layers that are known to do nothing between positions but attend.
PLAIN_LAYERS = {
    "fairseq.modules.transformer_layer.TransformerDecoderLayer",
    "fairseq.modules.transformer_layer.TransformerDecoderLayerBase",
}


def is_transformer(model: nn.Module) -> bool:
    """True for a decoder of fairseq's Transformer kind: all that is read of one is there.

    Others stop at no features when asked to, or have layers without attention, or no output layer
    of their own.
    """
    decoder: Any = getattr(model, "decoder", None)
    layers: Any = getattr(decoder, "layers", None)
    return (
        bool(layers)
        and all(hasattr(layers[-1], part) for part in LAYER_PARTS)
        and hasattr(decoder, "adaptive_softmax")
        and (decoder.adaptive_softmax is not None or hasattr(decoder, "output_layer"))
        and "features_only" in inspect.signature(decoder.forward).parameters
    )


class TransformerLM:
    """A fairseq language model with a Transformer decoder.

    Args:
        model: the model, weights loaded.
        key_type: one of ``KEY_TYPES``, or None to capture no keys.
    """

    def __init__(self, model: nn.Module, key_type: str | None = None) -> None:
        model.eval()  # returns None once fairseq has prepared the model for inference
        self.model = model
        self.decoder: Any = model.decoder
        self.key_type = key_type

    @torch.no_grad()
    def encode(self, inputs: Mapping[str, Any], mask: Tensor) -> Encoded:
        """Runs the model and keeps some of the positions.

        Args:
            inputs: ``net_input`` of one of fairseq's batches.
            mask: (B, T) bool, the positions that are asked for.
        """
        with _last_layer_from(self.decoder, first_column(mask)), _cast_once(mask), FastProducts():
            parts = [self._encode(part) for part in _parts(inputs)]
        features = torch.cat([part for part, _ in parts])
        before = tokens_before(inputs["src_tokens"])[mask]
        mask = mask[:, -features.shape[1] :]
        keys = [part for _, part in parts if part is not None]
        return Encoded(features[mask], torch.cat(keys)[mask] if keys else None, before, mask)

    def _encode(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Features and, where they are captured, keys of some blocks, each (B, T, D)."""
        captured: list[Tensor] = []
        with _reading(self.decoder, self.key_type, captured):
            features, _ = self.model(**inputs, features_only=True)
        if not captured:
            return features, None
        # fairseq's layers run time first: T x B x C. What lies before the last layer has all of T.
        return features, captured[-1][-features.shape[1] :].transpose(0, 1)

    @property
    def reads_ahead(self) -> bool:
        """Whether all layers are known to do nothing between positions but attend.

        Then a state can be read into several tokens at a time, and tokens can be taken back.
        """
        return all(map(_is_plain, self.decoder.layers))

    def reading(self, texts: int, pad: int) -> Reading:
        """Begins to read so many texts, each at its own pace."""
        return Reading(self, texts, pad)

    @contextmanager
    def reading_keys(self) -> Iterator[list[Tensor]]:
        """While the block runs, gathers what the key's spot sees, time first."""
        captured: list[Tensor] = []
        with _reading(self.decoder, self.key_type, captured):
            yield captured

    @torch.no_grad()
    def step(self, tokens: Tensor, state: dict[str, Any]) -> Encoded:
        """Reads one more token of each text, and keeps the last position.

        Args:
            tokens: (B, t) int64, the texts so far; all but the last token were read before.
            state: fairseq's incremental state, which is written to; empty where t is 1.
        """
        captured: list[Tensor] = []
        with _reading(self.decoder, self.key_type, captured):
            features, _ = self.decoder(tokens, incremental_state=state, features_only=True)
        keys = captured[-1][-1] if captured else None  # time first
        return Encoded.last(tokens, features[:, -1], keys)

    def reorder(self, state: dict[str, Any], order: Tensor) -> None:
        """Has text i go on where text ``order[i]`` stood, (B,) int64."""
        self.decoder.reorder_incremental_state_scripting(state, order)

    @torch.no_grad()
    def log_prob(self, features: Tensor, tokens: Tensor) -> Tensor:
        """log p of one token (N,) each, from features (N, C): (N,) float32, natural log."""
        return softmax.log_prob(self._layer, self.decoder.adaptive_softmax, features, tokens)

    @torch.no_grad()
    def log_probs(self, features: Tensor) -> Tensor:
        """log p of every token, from features (N, C): (N, V) float32, natural log."""
        return softmax.log_probs(self._layer, self.decoder.adaptive_softmax, features)

    @property
    def _layer(self) -> softmax.Layer | None:
        """To logits; a decoder with an adaptive softmax may have none."""
        return getattr(self.decoder, "output_layer", None)


def _parts(inputs: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A batch's inputs, on a CPU few blocks at a time: what layers make of these stays in cache."""
    tokens = inputs["src_tokens"]
    blocks, length = tokens.shape
    size = blocks if tokens.is_cuda else max(1, POSITIONS_AT_A_TIME // max(1, length))
    for start in range(0, max(1, blocks), max(1, size)):
        part = slice(start, start + size)
        yield {
            name: x[part] if isinstance(x, Tensor) and len(x) == blocks else x
            for name, x in inputs.items()
        }


def _cast_once(like: Tensor) -> torch.autocast:
    """While the block runs, layers that compute in another type cast each weight once."""
    return torch.autocast(like.device.type, torch.bfloat16, enabled=False)


@contextmanager
def _last_layer_from(decoder: Any, start: int) -> Iterator[None]:
    """While the block runs, the last layer works on the positions from ``start`` on only.

    Positions of mere context lie before it. The last layer needs them as keys and values of its
    attention; nobody reads what it would make of them. The features then begin at ``start``.
    """
    layer = decoder.layers[-1]
    if start == 0 or not _narrows(layer):
        yield
        return
    everything: list[Tensor] = []

    def narrow(_: nn.Module, given: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, *rest = given
        everything[:] = [layer.self_attn_layer_norm(x) if layer.normalize_before else x]
        return (x[start:], *rest), kwargs

    def attend_to_everything(_: nn.Module, given: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attn_mask"]
        (kv,) = everything
        return given, kwargs | {"key": kv, "value": kv, "attn_mask": mask[start:]}

    handles = (
        layer.register_forward_pre_hook(narrow, with_kwargs=True),
        layer.self_attn.register_forward_pre_hook(attend_to_everything, with_kwargs=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _narrows(layer: Any) -> bool:
    """Whether this is fairseq's plain layer, whose attention takes fewer queries than keys."""
    attention = layer.self_attn
    return (
        _is_plain(layer)
        # These two ways of computing attention take keys and values from the queries.
        and not attention.use_xformers
        and not attention.skip_embed_dim_check
    )


def _is_plain(layer: Any) -> bool:
    """Whether this is fairseq's plain layer."""
    name = f"{type(layer).__module__}.{type(layer).__name__}"
    return name in PLAIN_LAYERS and not layer.cross_self_attention


@contextmanager
def _reading(decoder: Any, key_type: str | None, into: list[Tensor]) -> Iterator[None]:
    """While the block runs, appends to ``into`` what the key's spot sees."""
    spot = None if key_type is None else KEY_TYPES[key_type](decoder)
    assert spot is not None or key_type is None  # TransformerFamily.width has seen to that
    with watching(spot, into):
        yield


class TransformerFamily:
    """``transformer_lm`` of every architecture, and other models with fairseq's decoder."""

    name = "transformer_lm"

    def belongs(self, model: nn.Module) -> bool:
        """Whether all that is read of such a decoder is there."""
        return is_transformer(model)

    def width(self, model: nn.Module, key_type: str | None) -> int:
        """D, which all key types have in common.

        Raises:
            ModelError: where the decoder lacks the layer of the key type.
        """
        decoder: Any = model.decoder
        if key_type is not None and KEY_TYPES[key_type](decoder) is None:
            raise ModelError(
                f"the model has no layer for --knn-keytype {key_type}",
                expected="decoder_output needs a final layer norm; last_attn_input_before_norm "
                "needs two layers where the norm comes after",
                found=f"{len(decoder.layers)} layers, "
                + ("no final norm" if prenorm(decoder) else "norm after each block"),
                do="choose another --knn-keytype; the paper's is last_ffn_input",
            )
        return int(decoder.embed_dim)

    def open(self, model: nn.Module, key_type: str | None) -> TransformerLM:
        """The model, read."""
        return TransformerLM(model, key_type)


FAMILY = TransformerFamily()
