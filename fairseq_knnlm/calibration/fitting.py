"""Fits weights to columns of log-probabilities: no language model, no index.

All of it maximises the likelihood of the mixture as ``mix`` computes it, the mean of
log sum_e w_e p_e(token), where an expert that abstains leaves its weight to others. What is
reported or compared is computed by ``mix`` itself; what climbs has its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fairseq_knnlm.calibration.side_by_side import go_on
from fairseq_knnlm.mixture.components import Abstain, Component
from fairseq_knnlm.mixture.mix import mix
from fairseq_knnlm.mixture.mixers import LEAST_LM, Bins, Fixed

#: Rounds of expectation and maximisation at most.
ROUNDS = 100
#: Rounds after which columns are left out that weigh next to nothing.
FIRST_ROUNDS = 20
#: What the likelihood may still gain, natural log a token, where these rounds end.
CLOSE = 1e-5
#: Columns that weigh less than this among all are left out of a gate.
LEAST = 0.004
#: A gate's columns at most.
MOST = 24
BINS = 16


def best_lambda(lm: np.ndarray, expert: np.ndarray) -> float:
    """The weight that makes the mixture of two likeliest.

    With r = p_expert / p_LM the likelihood of ``mix`` is that of the LM and the mean of
    log(1 + lambda (r - 1)), which is concave in lambda: its slope falls, and bisection finds where
    it is zero.

    Args:
        lm: (N,) log p_LM, natural log.
        expert: (N,) log p of the expert, natural log; -inf allowed, NaN left to the LM.

    Returns:
        A number from 0 to 1 - ``LEAST_LM``.
    """
    ratio = np.nan_to_num(expert.astype(np.float64) - lm, nan=0.0, neginf=-np.inf)
    gain = np.exp(np.clip(ratio, None, 200.0)) - 1.0

    def slope(lmbda: float) -> float:
        return float(np.mean(gain / (1.0 + lmbda * gain)))

    low, high = 0.0, 1.0 - LEAST_LM
    if slope(low) <= 0:
        return 0.0
    if slope(high) >= 0:
        return high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return (low + high) / 2


def mixture_loss(lm: np.ndarray, expert: np.ndarray, lmbda: float) -> float:
    """Mean of -log((1 - lambda) p_LM + lambda p_expert), natural log; NaN is left to the LM."""
    return _loss(np.stack([lm, expert], axis=1), np.array([1 - lmbda, lmbda]), "share")


def best_setting(lm: np.ndarray, columns: np.ndarray) -> tuple[int, float]:
    """The column, and its lambda, that makes the mixture with the language model likeliest.

    Args:
        lm: (N,) log p_LM, natural log.
        columns: (N, S) of an expert.
    """
    lambdas = [best_lambda(lm, column) for column in columns.T]
    losses = [mixture_loss(lm, *pair) for pair in zip(columns.T, lambdas, strict=True)]
    place = int(np.argmin(losses))
    return place, lambdas[place]


def best_weights(
    log_probs: np.ndarray, rounds: int = ROUNDS, abstain: Abstain = "share"
) -> np.ndarray:
    """(E,) float64, the weights that make a mixture likeliest, by expectation maximisation.

    Args:
        log_probs: (N, E) natural log, the language model first; NaN where an expert abstains.
        rounds: at most; each raises the likelihood.
        abstain: where the weight of one that abstains goes. With ``lm`` there are no other maxima;
            with ``share`` there may be, and the better of those above two starts is taken.
    """
    absent = np.isnan(log_probs)
    known = np.where(absent, log_probs[:, :1], log_probs)
    top = known.max(axis=1, keepdims=True)
    # float32 halves the time; responsibilities need no more.
    probs = torch.from_numpy(np.exp(known - top).astype(np.float32))
    equal = torch.full((probs.shape[1],), 1 / probs.shape[1])
    weights = climbed(probs, None, equal, rounds)
    if abstain == "share" and absent.any():
        present = torch.from_numpy((~absent).astype(np.float32))
        tops = [climbed(probs * present, present, start, rounds) for start in (weights, equal)]
        weights = min(tops, key=lambda found: _loss(log_probs, found.double().numpy(), abstain))
    return weights.double().numpy()


def _loss(log_probs: np.ndarray, weights: np.ndarray, abstain: Abstain) -> float:
    """Mean of -log p of the mixture, natural log: of (N, E) and (E,), as evaluation computes it."""
    log_weights = torch.from_numpy(weights).log().float()
    mixed = mix(torch.from_numpy(log_probs), log_weights, abstain)
    return -float(mixed.mean(dtype=torch.float64))


def climbed(probs: Tensor, present: Tensor | None, weights: Tensor, rounds: int) -> Tensor:
    """The weights to which steps uphill lead.

    What is climbed is the likelihood of ``mix``, but for a constant: the mean of
    log (sum_e w_e p_e / sum_e w_e), both sums over those present. It is written out here because
    both it and its gradient then take products of matrices, and no exponential in any round.

    The first log is minorised by its expectation (EM), minus the second by its tangent; what
    maximises the two together is w_e times ``pull``, which is 1 at the top for all that weigh
    anything. Steps beyond that are tried, and taken back where they lead downhill (Salakhutdinov
    and Roweis, 2003).

    Args:
        probs: (N, E), 0 where not present, each row to a scale of its own.
        present: (N, E), 1 or 0; None where all are, and the second sum is 1.
        weights: (E,) to start from.
        rounds: at most.
    """
    best, stride, from_here, pull = -math.inf, 1.0, weights, torch.ones_like(weights)
    for _ in range(rounds):
        go_on()
        mixed = probs @ weights
        reached = float(mixed.log().mean(dtype=torch.float64))
        divided: Tensor | int = len(probs)
        if present is not None:
            total = present @ weights
            reached -= float(total.log().mean(dtype=torch.float64))
            divided = (present.T @ (1 / total)).clamp_min(1e-30)
        if reached >= best:
            pull = (probs.T @ (1 / mixed)) / divided
            best, stride, from_here = reached, 1.2 * stride, weights
            if pull.max() < 1 + CLOSE:
                break
        elif stride == 1.0:  # no more than rounding is left to gain
            break
        else:
            stride = 1.0
        weights = from_here * pull**stride
        weights /= weights.sum()
        weights[0].clamp_(min=1e-9)  # it alone is present everywhere, and no total may be 0
    return from_here


def fit_fixed(
    components: Sequence[Component],
    log_probs: np.ndarray,
    kind: str = "fixed",
    abstain: Abstain = "share",
) -> Fixed:
    """The same weights for all tokens; of two components the exact optimum."""
    if len(components) == 2:  # the conventions are the same
        lmbda = best_lambda(log_probs[:, 0], log_probs[:, 1])
        weights = [1 - lmbda, lmbda]
    else:
        weights = _settled(best_weights(log_probs, 4 * ROUNDS, abstain))
    return Fixed(components, weights, kind=kind, abstain=abstain)


def fit_bins(
    components: Sequence[Component],
    log_probs: np.ndarray,
    feature: str,
    values: np.ndarray,
    abstain: Abstain = "share",
) -> Bins:
    """Weights for each of ``BINS`` bins, which hold equally many tokens (Drozdov et al., 2022).

    Args:
        components: E of them.
        log_probs: (N, E).
        feature: name of the feature that is binned.
        values: (N,) its values.
        abstain: where the weight of an expert that abstains goes.
    """
    values = np.nan_to_num(values, nan=np.inf)
    edges = np.unique(np.quantile(values[np.isfinite(values)], np.arange(1, BINS) / BINS))
    bins = np.digitize(values, edges, right=True)  # as ``Bins`` has it
    overall = fit_fixed(components, log_probs, abstain=abstain).weights
    rows = [
        fit_fixed(components, log_probs[here], abstain=abstain).weights if here.any() else overall
        for here in (bins == number for number in range(len(edges) + 1))
    ]
    return Bins(components, edges.tolist(), rows, (feature,), abstain=abstain)


def _settled(weights: np.ndarray) -> list[float]:
    """Without what weighs next to nothing, the language model at its floor at least; sum 1."""
    others = np.where(weights[1:] < 1e-6, 0.0, weights[1:])
    lm = max(float(weights[0] / (weights[0] + others.sum())), LEAST_LM)
    return [lm, *(others * ((1 - lm) / max(others.sum(), 1e-6))).tolist()]


def worth_mixing(log_probs: np.ndarray, abstain: Abstain = "share") -> list[int]:
    """Places of the columns, of many, that the best fixed mixture of all gives weight."""
    # Most of many columns are soon seen to weigh next to nothing.
    promising = np.flatnonzero(best_weights(log_probs, FIRST_ROUNDS, abstain) >= LEAST / 10)
    places = np.union1d([0], promising)
    weights = best_weights(log_probs[:, places], abstain=abstain)
    heaviest = np.argsort(-weights)[:MOST]
    return sorted(int(places[one]) for one in heaviest if weights[one] >= LEAST)
