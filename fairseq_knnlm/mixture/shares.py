"""What made up the probability of a token: by whom, how much, and from which entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_knnlm.experts.knn import KnnPrediction
from fairseq_knnlm.retrieval.neighbours import Neighbours


@dataclass(frozen=True)
class Shares:
    """The experts' parts in the mixture's probability of one token (N,) each.

    Attributes:
        experts: E names, the language model's first.
        weights: (N, E) float32, 0 to 1, a row sums to 1; 0 of who abstains, whose weight went to
            others.
        log_probs: (N, E) float32, natural log, of the token; NaN of who abstains or was not asked.
            The sum of ``weights * exp(log_probs)`` is the mixture's probability.
    """

    experts: Sequence[str]
    weights: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class Found:
    """The neighbours of some of N contexts.

    Attributes:
        rows: (n,) int64, which of the contexts they are of.
        near: K for each of these.
        shares: (n, K) float32, of the expert's probability, a row sums to 1, or to 0 where no
            neighbour counts.
    """

    rows: Tensor
    near: Neighbours
    shares: Tensor


def by_expert(
    names: Sequence[str], experts: Sequence[str], log_weights: Tensor, log_probs: Tensor
) -> Shares:
    """Components added up by their expert.

    Args:
        names: E, of the experts, the language model's first.
        experts: C of these, whose each component is.
        log_weights: (N, C) float32, natural log, as ``effective``.
        log_probs: (N, C) float32, natural log; NaN of who abstains.
    """
    weights, spoken = [], []
    for name in names:
        ours = [place for place, expert in enumerate(experts) if expert == name]
        theirs, said = log_weights[:, ours], log_probs[:, ours]
        total = theirs.logsumexp(dim=1)
        mixed = (theirs + said.masked_fill(said.isnan(), -torch.inf)).logsumexp(dim=1) - total
        weights.append(total.exp())
        # Where it weighs nothing, what it says in its first setting.
        spoken.append(torch.where(total.isneginf(), said[:, 0], mixed))
    return Shares(names, torch.stack(weights, dim=1), torch.stack(spoken, dim=1))


def entries_found(prediction: KnnPrediction, settings: Sequence[int], weights: Tensor) -> Found:
    """Neighbours, and how much of the expert's probability each gave.

    Args:
        prediction: of N contexts.
        settings: S of its settings that count.
        weights: (N, S) float32, of each; 0 where it abstains.
    """
    total = weights.sum(dim=1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    shares = torch.zeros_like(prediction.near.distances)
    for setting, weight in zip(settings, (weights / total).unbind(dim=1), strict=True):
        share = prediction.log_probs(setting).log_probs.exp()
        shares += share.nan_to_num(nan=0.0) * weight[:, None]
    rows = torch.arange(len(shares), device=shares.device)
    return Found(rows, prediction.near, shares)


def over(fewer: Shares, names: Sequence[str]) -> Shares:
    """The same over more experts, which weigh nothing and say nothing."""
    like = fewer.weights[:, 0]
    weights = dict(zip(fewer.experts, fewer.weights.unbind(dim=1), strict=True))
    spoken = dict(zip(fewer.experts, fewer.log_probs.unbind(dim=1), strict=True))
    zero, none = torch.zeros_like(like), torch.full_like(like, torch.nan)
    return Shares(
        names,
        torch.stack([weights.get(name, zero) for name in names], dim=1),
        torch.stack([spoken.get(name, none) for name in names], dim=1),
    )
