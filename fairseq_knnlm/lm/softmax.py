"""Log-probabilities from features: of one token each, or of all.

Where one token is asked for, only the part of the vocabulary that holds it is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

#: Logits held at a time, in numbers: bounds the memory of the output layer.
LOGITS_AT_A_TIME = 2**22
#: From features (N, C) to logits (N, V).
Layer = Callable[[Tensor], Tensor]


def log_prob(layer: Layer | None, adaptive: Any, features: Tensor, tokens: Tensor) -> Tensor:
    """log p of one token (N,) each, from features (N, C): (N,) float32, natural log.

    Args:
        layer: to logits; asked where the softmax is a plain one.
        adaptive: fairseq's AdaptiveSoftmax; None of a plain one.
        features, tokens: N of them.
    """
    if adaptive is not None:
        return _adaptive_log_softmax_at(adaptive, features, tokens)
    assert layer is not None
    return _log_softmax_at(layer, features, tokens)


def log_probs(layer: Layer | None, adaptive: Any, features: Tensor) -> Tensor:
    """log p of every token, from features (N, C): (N, V) float32, natural log; as ``log_prob``."""
    if adaptive is not None:
        found: Tensor = adaptive.get_log_prob(features[None], None)[0].float()
        return found
    assert layer is not None
    return layer(features).float().log_softmax(dim=1)


def _log_softmax_at(layer: Layer, inputs: Tensor, columns: Tensor) -> Tensor:
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
