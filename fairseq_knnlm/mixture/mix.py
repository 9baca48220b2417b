"""The arithmetic of the mixture: pure functions on tensors, everything in natural log.

The mixture is the sum over experts of their weights times their probabilities (Khandelwal et al.,
2020, equation 3), computed as a logsumexp. An expert that abstains, having nothing to go by, says
NaN: its weight goes to all the others ("share") or to the language model ("lm").
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fairseq_knnlm.experts.contract import Distribution
from fairseq_knnlm.mixture.components import Abstain


def mix(log_probs: Tensor, log_weights: Tensor, abstain: Abstain = "share") -> Tensor:
    """The mixture's log-probability, of one token each or of every token.

    Whatever is fitted is fitted for this very function.

    Args:
        log_probs: (N, E) or (N, E, V) float32, natural log, one column an expert, the language
            model first; NaN where an expert abstains.
        log_weights: (E,) or (N, E), natural log, exp sums to 1 a row.
        abstain: where the weight of one that abstains goes: ``share``, to all others in proportion
            to theirs; ``lm``, to the language model.

    Returns:
        (N,) or (N, V) float32, natural log.
    """
    weights = log_weights.expand(log_probs.shape[:2])
    if log_probs.dim() == 3:
        weights = weights[:, :, None]
    abstains = log_probs.isnan()
    if abstain == "lm":
        return torch.logsumexp(log_probs.where(~abstains, log_probs[:, :1]) + weights, dim=1)
    weights = weights.expand_as(log_probs).masked_fill(abstains, -math.inf)
    norm = torch.logsumexp(weights, dim=1)
    # Rows in which every weight is -inf (lambda 1 and no neighbours) fall back on the LM.
    nobody = torch.isneginf(norm)
    mixed = torch.logsumexp(log_probs.masked_fill(abstains, -math.inf) + weights, dim=1) - norm
    return torch.where(nobody, log_probs[:, 0], mixed)


def effective(log_probs: Tensor, log_weights: Tensor, abstain: Abstain = "share") -> Tensor:
    """What each expert weighs once the weights of those that abstain went elsewhere.

    Args:
        log_probs: (N, E) float32, as for ``mix``.
        log_weights: (E,) or (N, E), as for ``mix``.
        abstain: as for ``mix``.

    Returns:
        (N, E) float32, natural log; exp sums to 1 a row. The mixture is the logsumexp of these and
        of the log-probabilities of those that do not abstain.
    """
    weights, abstains = log_weights.expand_as(log_probs), log_probs.isnan()
    left = weights.masked_fill(abstains, -math.inf)
    if abstain == "lm":
        given = weights.masked_fill(~abstains, -math.inf).logsumexp(dim=1)
        lm = torch.logaddexp(left[:, 0], given)
        return torch.cat([lm[:, None], left[:, 1:]], dim=1)
    norm = left.logsumexp(dim=1, keepdim=True)
    alone = torch.full_like(left, -math.inf)
    alone[:, 0] = 0.0
    return torch.where(norm.isneginf(), alone, left - norm)


def abstaining(said: Tensor | Distribution) -> Tensor:
    """(N,) bool: of which contexts an expert says nothing."""
    return _log_probs(said)[:, 0].isnan()


def added(
    mixed: Tensor, said: Sequence[Tensor | Distribution], log_weights: Sequence[Tensor]
) -> Tensor:
    """What is mixed so far and one expert more: log(exp(mixed) + sum of w p), of every token.

    Args:
        mixed: (N, V) float32, natural log.
        said: the expert's log p in each of its settings, of every token; or of a few, then of the
            same ones in every setting.
        log_weights: (N,) float32 of each, natural log; -inf where it abstains.
    """
    pairs = zip(said, log_weights, strict=True)
    shares = torch.stack([_log_probs(one) + weight[:, None] for one, weight in pairs])
    # Where an expert abstains it says NaN.
    whole = shares.masked_fill_(shares.isnan(), -math.inf).logsumexp(dim=0)
    if isinstance(said[0], Tensor):
        return torch.logaddexp(mixed, whole)
    tokens = said[0].tokens.long()
    sums = Distribution(tokens, whole).sums(mixed.shape[1])
    # Those of the same token all write the same.
    return mixed.scatter(1, tokens, torch.logaddexp(mixed.gather(1, tokens), sums))


def _log_probs(said: Tensor | Distribution) -> Tensor:
    return said if isinstance(said, Tensor) else said.log_probs
