"""What is read from a fairseq language model: the target's log-probability, and the keys.

The model runs unmodified, up to its features; a hook sees the representation that serves as key.
From the features only the scored positions and only their targets' log-probabilities are
computed, never the whole vocabulary for a position of context.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_knnlm.errors import ModelError

#: Logits held at a time, in numbers: bounds the memory of the output layer.
LOGITS_AT_A_TIME = 2**25


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
        mask: (B, T) bool, which positions of the batch these are.
    """

    targets: Tensor
    features: Tensor
    keys: Tensor | None
    mask: Tensor


def is_supported(model: nn.Module) -> bool:
    """True for a decoder built of fairseq's Transformer layers."""
    decoder: Any = getattr(model, "decoder", None)
    layers: Any = getattr(decoder, "layers", None)
    return bool(layers) and hasattr(layers[-1], "fc1") and hasattr(decoder, "adaptive_softmax")


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
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().half().cpu().contiguous().numpy().data)
    return digest.hexdigest()


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
        with _reading(self.decoder, self.key_type, captured):
            features, _ = self.model(**sample["net_input"], features_only=True)
        # fairseq's layers run time first: T x B x C.
        keys = captured[0].transpose(0, 1)[mask] if captured else None
        return Scored(target[mask], features[mask], keys, mask)

    @torch.no_grad()
    def target_log_probs(self, scored: Scored) -> Tensor:
        """log p_LM of each target, (N,) float32, natural log."""
        adaptive = self.decoder.adaptive_softmax
        if adaptive is None:
            return _log_softmax_at(self.decoder.output_layer, scored.features, scored.targets)
        return _adaptive_log_softmax_at(adaptive, scored.features, scored.targets)


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
        chosen = logits.gather(1, columns[part, None]).squeeze(1)
        out[part] = chosen - torch.logsumexp(logits, dim=1)
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
