"""Fits mixers to columns of log-probabilities: no language model, no index.

All of it maximises the likelihood of the mixture as ``mixing.mix`` computes it: the mean of
log sum_e w_e p_e(token), where an expert that abstains leaves its weight to others.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fairseq_knnlm.mixture.components import Abstain, Component
from fairseq_knnlm.mixture.mix import mix, safe_log
from fairseq_knnlm.mixture.mixers import LEAST_LM, Bins, Fixed, Gate

#: Rounds of expectation and maximisation at most.
ROUNDS = 100
#: What the likelihood may still gain, natural log a token, where these rounds end.
CLOSE = 1e-5
#: Columns that weigh less than this among all are left out of a gate.
LEAST = 0.004
#: A gate's columns at most.
MOST = 24
BINS = 16
BATCH = 2048
#: Steps an epoch at least: little text makes smaller batches, not fewer steps.
LEAST_BATCHES = 10
EPOCHS = 30
#: Epochs without a better loss on the tokens kept aside, after which training ends.
PATIENCE = 6
LEARNING_RATE = 3e-3
#: A probability of 0 has no gradient; nothing is lost where another component has the token.
FLOOR = -60.0


def best_lambda(lm: np.ndarray, expert: np.ndarray) -> float:
    """The weight that makes the mixture of two likeliest.

    With r = p_expert / p_LM the mean of log(1 + lambda (r - 1)) is concave in lambda, so its
    slope falls and bisection finds where it is zero.

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
    if lmbda == 0:
        return -float(np.mean(lm, dtype=np.float64))
    base = lm.astype(np.float64)
    expert = np.where(np.isnan(expert), base, expert)
    rest = base + safe_log(1 - lmbda)
    return -float(np.mean(np.logaddexp(rest, expert + math.log(lmbda))))


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
    silent = np.isnan(log_probs)
    known = np.where(silent, log_probs[:, :1], log_probs)
    top = known.max(axis=1, keepdims=True)
    # float32 halves the time; responsibilities need no more.
    probs = torch.from_numpy(np.exp(known - top).astype(np.float32))
    equal = torch.full((probs.shape[1],), 1 / probs.shape[1])
    weights, _ = _climbed(probs, None, equal, rounds)
    if abstain == "share" and silent.any():
        present = torch.from_numpy((~silent).astype(np.float32))
        tops = [_climbed(probs * present, present, start, rounds) for start in (weights, equal)]
        weights, _ = max(tops, key=lambda found: found[1])
    return weights.double().numpy()


def _climbed(
    probs: Tensor, present: Tensor | None, weights: Tensor, rounds: int
) -> tuple[Tensor, float]:
    """The weights to which steps uphill lead, and the likelihood there.

    The likelihood is the mean of log (sum_e w_e p_e / sum_e w_e), both sums over those present. The
    first log is minorised by its expectation (EM), minus the second by its tangent; what maximises
    the two together is w_e times ``pull``, which is 1 at the top for all that weigh anything. Steps
    beyond that are tried, and taken back where they lead downhill (Salakhutdinov and Roweis, 2003).

    Args:
        probs: (N, E), 0 where not present, each row to a scale of its own.
        present: (N, E), 1 or 0; None where all are, and the second sum is 1.
        weights: (E,) to start from.
        rounds: at most.
    """
    best, stride, from_here, pull = -math.inf, 1.0, weights, torch.ones_like(weights)
    for _ in range(rounds):
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
    return from_here, best


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
    weights = best_weights(log_probs, abstain=abstain)
    heaviest = np.argsort(-weights)[:MOST]
    return sorted(int(place) for place in heaviest if weights[place] >= LEAST)


@dataclass(frozen=True)
class Examples:
    """What a gate learns from.

    Attributes:
        log_probs: (N, E) float32.
        inputs: (N, F) float32.
    """

    log_probs: Tensor
    inputs: Tensor

    def __getitem__(self, rows: Tensor) -> Examples:
        return Examples(self.log_probs[rows], self.inputs[rows])

    def __len__(self) -> int:
        return len(self.log_probs)


def fit_gate(
    components: Sequence[Component],
    features: Sequence[str],
    fit: Examples,
    stop: Examples,
    *,
    seed: int,
    after_epoch: Callable[[float], None] = lambda loss: None,
    dropout: float = 0.1,
    weight_decay: float = 0.01,
    abstain: Abstain = "share",
) -> Gate:
    """Trains a gate, and keeps it as it was when it did best on the tokens kept aside.

    Args:
        components: E of them.
        features: names of the inputs.
        fit: to learn from.
        stop: to tell when to stop.
        seed: of initial weights, order and dropout; the process's own generator is left alone.
        after_epoch: told the loss on ``stop`` after each, in natural log.
        dropout: share of hidden units left out in training.
        weight_decay: of AdamW.
        abstain: where the weight of an expert that abstains goes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = fit.inputs.shape[1]
        gate = Gate(components, features, width, dropout=dropout, abstain=abstain)
        gate.standardize(fit.inputs)
        _train(gate, fit, stop, after_epoch, weight_decay)
    return gate.eval()


def _train(
    gate: Gate,
    fit: Examples,
    stop: Examples,
    after_epoch: Callable[[float], None],
    weight_decay: float,
) -> None:
    optimizer = torch.optim.AdamW(gate.parameters(), lr=LEARNING_RATE, weight_decay=weight_decay)
    batches = max(LEAST_BATCHES, len(fit) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=EPOCHS * batches + 1, pct_start=0.1
    )
    best, state, waited = math.inf, copy.deepcopy(gate.state_dict()), 0
    for _ in range(EPOCHS):
        gate.train()
        for rows in torch.randperm(len(fit)).tensor_split(batches):
            loss = gate_loss(gate, fit[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        gate.eval()
        with torch.no_grad():
            reached = float(gate_loss(gate, stop))
        after_epoch(reached)
        if reached < best:
            best, state, waited = reached, copy.deepcopy(gate.state_dict()), 0
        elif (waited := waited + 1) == PATIENCE:
            break
    gate.load_state_dict(state)


def gate_loss(gate: Gate, examples: Examples) -> Tensor:
    """Mean loss of the gated mixture, natural log."""
    log_probs = examples.log_probs.clamp_min(FLOOR)  # which leaves NaN what it is
    return -mix(log_probs, gate(examples.inputs), gate.abstain).mean()
