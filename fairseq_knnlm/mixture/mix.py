"""The arithmetic of the mixture: pure functions on tensors, everything in natural log.

p_kNN(y) is proportional to the sum over the neighbours with value y of exp(-d / T), with d the
squared L2 distance and T the temperature (Khandelwal et al., 2020, equation 2, where T = 1). A
neighbour that stands for s merged entries counts s times (He et al., 2021). The mixture is the sum
over experts of their weights times their probabilities (equation 3), computed as a logsumexp. An
expert that abstains, having nothing to go by, says NaN: its weight goes to all the others ("share")
or to the language model ("lm").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def knn_log_probs(
    distances: Tensor,
    matches: Tensor,
    valid: Tensor,
    temperatures: Sequence[float],
    log_weights: Tensor | None = None,
) -> Tensor:
    """log p_kNN of one token a query, at several temperatures.

    Args:
        distances: (N, K) float32, squared L2 (or negative inner product).
        matches: (N, K) bool, the neighbour's value is the token asked for.
        valid: (N, K) bool, False where a neighbour is missing or does not count.
        temperatures: M numbers above 0.
        log_weights: (N, K) float32, log s, natural log; None where every s is 1.

    Returns:
        (N, M) float32, natural log; -inf where no neighbour matches, NaN where none is valid.
    """
    # Shifting by the nearest keeps small differences exact where distances are large, and the
    # nearest's own weight of 1 in every sum of all.
    scores = _shifted((-distances).masked_fill_(~valid, -math.inf))
    if log_weights is not None:
        log_weights = log_weights.masked_fill(~valid, 0.0)
    # Few neighbours agree: their logsumexp is taken over them alone, so that none underflows.
    rows, places = (matches & valid).nonzero(as_tuple=True)
    nobody = scores.new_full((len(scores),), -math.inf)
    anybody = valid.any(dim=1)
    columns = []
    for temperature in temperatures:
        weighed = scores / temperature
        if log_weights is not None:  # then the nearest need not be the heaviest
            weighed = _shifted(weighed.add_(log_weights))
        agreeing = weighed[rows, places]
        best = nobody.scatter_reduce(0, rows, agreeing, "amax")
        weights = (agreeing - best[rows]).exp_()
        agreed = torch.zeros_like(best).index_add_(0, rows, weights).log_() + best
        total = weighed.exp_().sum(dim=1).log_()
        columns.append((agreed - total).where(anybody, math.nan))
    return torch.stack(columns, dim=1)


def _shifted(scores: Tensor) -> Tensor:
    """Scores (N, K), in place less the greatest of each row; -inf throughout stays as it is."""
    return scores.sub_(scores.amax(dim=1, keepdim=True).nan_to_num_(neginf=0.0))


def safe_log(value: float) -> float:
    """Natural log, -inf of 0."""
    return math.log(value) if value > 0 else -math.inf


def mix(
    log_probs: Tensor, log_weights: Tensor, abstain: Literal["share", "lm"] = "share"
) -> Tensor:
    """The mixture's log-probability. Whatever is fitted is fitted for this very function.

    Args:
        log_probs: (N, E) float32, natural log, one column an expert, the language model first; NaN
            where an expert abstains.
        log_weights: (E,) or (N, E), natural log, exp sums to 1 a row.
        abstain: where the weight of one that abstains goes: ``share``, to all others in proportion
            to theirs; ``lm``, to the language model.

    Returns:
        (N,) float32, natural log.
    """
    silent = log_probs.isnan()
    if abstain == "lm":
        return torch.logsumexp(log_probs.where(~silent, log_probs[:, :1]) + log_weights, dim=1)
    weights = log_weights.expand_as(log_probs).masked_fill(silent, -math.inf)
    norm = torch.logsumexp(weights, dim=1)
    # Rows in which every weight is -inf (lambda 1 and no neighbours) fall back on the LM.
    nobody = torch.isneginf(norm)
    mixed = torch.logsumexp(log_probs.masked_fill(silent, -math.inf) + weights, dim=1) - norm
    return torch.where(nobody, log_probs[:, 0], mixed)
