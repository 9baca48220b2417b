"""What is read from a fairseq language model: the target's log-probability, and the keys.

The model runs unmodified, up to its features; a hook sees the representation that serves as key.
From the features only the scored positions and only their targets' log-probabilities are
computed, never the whole vocabulary for a position of context.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fairseq_knnlm.errors import ModelError

#: Logits held at a time, in numbers: bounds the memory of the output layer.
LOGITS_AT_A_TIME = 2**22
#: Tokens before a target that a scored position knows: what n-grams and matches of words go by.
CONTEXT = 4
#: What every key type reads of a decoder's last layer.
LAYER_PARTS = ("fc1", "self_attn", "self_attn_layer_norm", "final_layer_norm", "normalize_before")
#: Layers that are known to do nothing between positions but attend.
PLAIN_LAYERS = {
    "fairseq.modules.transformer_layer.TransformerDecoderLayer",
    "fairseq.modules.transformer_layer.TransformerDecoderLayerBase",
}


@dataclass(frozen=True)
class Spot:
    """A place in a decoder where a representation is read.

    Attributes:
        module: the module whose ``side`` it is.
        side: ``"input"`` or ``"output"``.
    """

    module: nn.Module
    side: str = "input"


def _prenorm(decoder: Any) -> bool:
    return bool(decoder.layers[-1].normalize_before)


def _last_ffn_input(decoder: Any) -> Spot:
    return Spot(decoder.layers[-1].fc1)


def _last_ffn_input_before_norm(decoder: Any) -> Spot:
    last = decoder.layers[-1]
    # In a post-norm layer it is the norm after attention that stands before the FFN.
    return Spot(last.final_layer_norm if _prenorm(decoder) else last.self_attn_layer_norm)


def _last_attn_input(decoder: Any) -> Spot:
    return Spot(decoder.layers[-1].self_attn)


def _last_attn_input_before_norm(decoder: Any) -> Spot | None:
    if _prenorm(decoder):
        return Spot(decoder.layers[-1].self_attn_layer_norm)
    # Post-norm: the norm that ends the layer below, if there is one.
    return Spot(decoder.layers[-2].final_layer_norm) if len(decoder.layers) > 1 else None


def _decoder_output(decoder: Any) -> Spot | None:
    if not _prenorm(decoder):
        return Spot(decoder.layers[-1], "output")
    return Spot(decoder.layer_norm, "output") if decoder.layer_norm is not None else None


def _decoder_output_before_norm(decoder: Any) -> Spot:
    if _prenorm(decoder):
        return Spot(decoder.layers[-1], "output")
    return Spot(decoder.layers[-1].final_layer_norm)


#: The paper's choices of a key (section 5, "Key function"), by the names of ``--knn-keytype``.
KEY_TYPES: dict[str, Callable[[Any], Spot | None]] = {
    "last_ffn_input": _last_ffn_input,
    "last_ffn_input_before_norm": _last_ffn_input_before_norm,
    "last_attn_input": _last_attn_input,
    "last_attn_input_before_norm": _last_attn_input_before_norm,
    "decoder_output": _decoder_output,
    "decoder_output_before_norm": _decoder_output_before_norm,
}


@dataclass(frozen=True)
class Scored:
    """The scored positions of a batch, sentence after sentence.

    Attributes:
        targets: (N,) int64, the tokens to be predicted.
        features: (N, C), the decoder's output, from which the LM predicts them.
        keys: (N, D), the representation of their contexts; None where not captured.
        mask: (B, T) bool, which positions these are; T ends with the batch's blocks, and begins
            where the first scored position of any block is.
        context: (N, CONTEXT) int64, the tokens before each target, the nearest first; -1 where
            the model saw none.
    """

    targets: Tensor
    features: Tensor
    keys: Tensor | None
    mask: Tensor
    context: Tensor

    def at(self, places: Tensor) -> Scored:
        """Some of the positions, ascending places (M,) int64 among the N."""
        mask = torch.zeros_like(self.mask)
        mask[self.mask.nonzero()[places].unbind(dim=1)] = True
        keys = None if self.keys is None else self.keys[places]
        return Scored(self.targets[places], self.features[places], keys, mask, self.context[places])


def is_supported(model: nn.Module) -> bool:
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


def check_model(model: nn.Module, key_type: str) -> int:
    """The width of the model's keys.

    Raises:
        ModelError: where it is no Transformer decoder or lacks the layer of the key type.
    """
    decoder: Any = getattr(model, "decoder", None)
    if not is_supported(model):
        raise ModelError(
            "this model's keys cannot be read",
            expected="a language model with fairseq's Transformer decoder, such as transformer_lm",
            found=type(model).__name__,
        )
    if KEY_TYPES[key_type](decoder) is None:
        raise ModelError(
            f"the model has no layer for --knn-keytype {key_type}",
            expected="decoder_output needs a final layer norm; last_attn_input_before_norm "
            "needs two layers where the norm comes after",
            found=f"{len(decoder.layers)} layers, "
            + ("no final norm" if _prenorm(decoder) else "norm after each block"),
            do="choose another --knn-keytype; the paper's is last_ffn_input",
        )
    return int(decoder.embed_dim)


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the weights' names, shapes and values.

    Values count as float16, so that a model evaluated with ``--fp16`` is the same model.

    Raises:
        ModelError: where a weight is NaN or infinite.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        values = weight.detach().half().cpu().contiguous()
        if not values.isfinite().all():  # or only too large for float16
            _check_finite(name, weight)
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(values.numpy().data)
    return digest.hexdigest()


def check_finite(model: nn.Module) -> None:
    """Refuses a model with weights that are no numbers, as ``model_fingerprint`` does.

    Raises:
        ModelError: where a weight is NaN or infinite.
    """
    for name, weight in model.named_parameters():
        _check_finite(name, weight)


def _check_finite(name: str, weight: Tensor) -> None:
    bad = weight.numel() - int(weight.detach().isfinite().sum())
    if bad:
        raise ModelError(
            "the language model's weights are not all numbers",
            expected="finite weights",
            found=f"{bad:,} that are NaN or infinite in {name}",
            do="use another checkpoint; one whose training went astray cannot be mended",
        )


def dictionary_fingerprint(symbols: Sequence[str]) -> str:
    """SHA-256 over a dictionary's symbols in order."""
    return hashlib.sha256("\n".join(symbols).encode()).hexdigest()


class TargetLM:
    """A language model asked for its targets' log-probabilities and its keys.

    Args:
        model: a fairseq language model with a Transformer decoder.
        pad: the padding token's id; targets that equal it are not scored.
        key_type: one of ``KEY_TYPES``, or None to capture no keys.
    """

    def __init__(self, model: nn.Module, pad: int, key_type: str | None = None) -> None:
        model.eval()  # returns None once fairseq has prepared the model for inference
        self.model = model
        self.decoder: Any = model.decoder
        self.pad = pad
        self.key_type = key_type

    @torch.no_grad()
    def score(self, sample: dict[str, Any]) -> Scored:
        """Runs the model over one of fairseq's batches and keeps the scored positions."""
        target = sample["target"]
        mask = target.ne(self.pad)
        captured: list[Tensor] = []
        start = _first_scored(mask)
        with _reading(self.decoder, self.key_type, captured), _last_layer_from(self.decoder, start):
            features, _ = self.model(**sample["net_input"], features_only=True)
        context = _tokens_before(sample["net_input"]["src_tokens"])[mask]
        target, mask = target[:, -features.shape[1] :], mask[:, -features.shape[1] :]
        # fairseq's layers run time first: T x B x C. What lies before the last layer has all of T.
        keys = captured[-1][-features.shape[1] :].transpose(0, 1)[mask] if captured else None
        return Scored(target[mask], features[mask], keys, mask, context)

    @torch.no_grad()
    def target_log_probs(self, scored: Scored) -> Tensor:
        """log p_LM of each target, (N,) float32, natural log."""
        adaptive = self.decoder.adaptive_softmax
        if adaptive is None:
            return _log_softmax_at(self.decoder.output_layer, scored.features, scored.targets)
        return _adaptive_log_softmax_at(adaptive, scored.features, scored.targets)

    @torch.no_grad()
    def shape(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """Entropy and log of the largest probability of p_LM, (N,) float32 each, natural log."""
        entropies, tops = [], []
        for features in scored.features.split(256):
            log_probs = self._log_probs(features)
            entropies.append(torch.special.entr(log_probs.exp()).sum(dim=1))
            tops.append(log_probs.amax(dim=1))
        return torch.cat(entropies), torch.cat(tops)

    def _log_probs(self, features: Tensor) -> Tensor:
        """(N, V) float32, natural log."""
        adaptive = self.decoder.adaptive_softmax
        if adaptive is None:
            return self.decoder.output_layer(features).float().log_softmax(dim=1)
        return adaptive.get_log_prob(features[None], None)[0].float()


def _tokens_before(inputs: Tensor) -> Tensor:
    """(B, T, CONTEXT): the inputs up to each position of (B, T), the nearest first, else -1."""
    # The input at a position is the token before that position's target.
    return nn.functional.pad(inputs, (CONTEXT - 1, 0), value=-1).unfold(1, CONTEXT, 1).flip(2)


def _first_scored(mask: Tensor) -> int:
    """The first column of a (B, T) mask in which any row is True; 0 where there is none."""
    return int(mask.any(dim=0).int().argmax())


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

    def narrow(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, *rest = args
        everything[:] = [layer.self_attn_layer_norm(x) if layer.normalize_before else x]
        return (x[start:], *rest), kwargs

    def attend_to_everything(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attn_mask"]
        (kv,) = everything
        return args, kwargs | {"key": kv, "value": kv, "attn_mask": mask[start:]}

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
        f"{type(layer).__module__}.{type(layer).__name__}" in PLAIN_LAYERS
        and not layer.cross_self_attention
        # These two ways of computing attention take keys and values from the queries.
        and not attention.use_xformers
        and not attention.skip_embed_dim_check
    )


@contextmanager
def _reading(decoder: Any, key_type: str | None, into: list[Tensor]) -> Iterator[None]:
    """While the block runs, appends to ``into`` what the key's spot sees."""
    if key_type is None:
        yield
        return
    spot = KEY_TYPES[key_type](decoder)
    assert spot is not None  # check_model has seen to that

    def keep_input(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        into.append(args[0] if args else kwargs["query"])  # attention is called by name

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


def _log_softmax_at(layer: Callable[[Tensor], Tensor], inputs: Tensor, columns: Tensor) -> Tensor:
    """log_softmax(layer(inputs)) at one column a row, (N,) float32, in bounded memory."""
    out = torch.empty(len(inputs), dtype=torch.float32, device=inputs.device)
    start, step = 0, 256  # the first slice tells how wide the layer is
    while start < len(inputs):
        part = slice(start, start + step)
        logits = layer(inputs[part]).float()
        out[part] = -cross_entropy(logits, columns[part], reduction="none")
        start += step
        step = max(1, LOGITS_AT_A_TIME // logits.shape[1])
    return out


def _adaptive_log_softmax_at(adaptive: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    """The same for fairseq's AdaptiveSoftmax: the head, and the one tail that holds the target.

    A target in tail i has log p = log p_head(tail i) + log p_tail(target) (Grave et al., 2017).
    """
    first = adaptive.cutoff[0]
    edges = torch.tensor(adaptive.cutoff, device=targets.device)
    tails = torch.bucketize(targets, edges, right=True) - 1  # -1: in the head
    columns = torch.where(tails < 0, targets, first + tails)
    out = _log_softmax_at(adaptive.head, inputs, columns)
    for number, tail in enumerate(adaptive.tail):
        rows = (tails == number).nonzero().squeeze(1)
        if len(rows):
            inside = targets[rows] - adaptive.cutoff[number]
            out[rows] += _log_softmax_at(tail, inputs[rows], inside)
    return out
