"""Fits mixers to columns of log-probabilities: no language model, no index.

All of it maximises the mixture's likelihood, the mean of log sum_e w_e p_e(token).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fairseq_knnlm.mixers import Bins, Component, Fixed, Gate
from fairseq_knnlm.mixing import mix, safe_log

#: Rounds of expectation and maximisation.
ROUNDS = 100
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
        A number in [0, 1].
    """
    ratio = np.nan_to_num(expert.astype(np.float64) - lm, nan=0.0, neginf=-np.inf)
    gain = np.exp(np.clip(ratio, None, 200.0)) - 1.0

    def slope(lmbda: float) -> float:
        return float(np.mean(gain / (1.0 + lmbda * gain)))

    low, high = 0.0, 1.0 - 1e-9  # at 1 a token without neighbours would divide by zero
    if slope(low) <= 0:
        return 0.0
    if slope(high) >= 0:
        return 1.0
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


def best_weights(log_probs: np.ndarray, rounds: int = ROUNDS) -> np.ndarray:
    """(E,) float64, the weights that make a mixture likeliest, by expectation maximisation.

    Args:
        log_probs: (N, E) natural log, the language model first; NaN is taken for its word.
        rounds: each raises the likelihood; it has no other maxima.
    """
    known = np.where(np.isnan(log_probs), log_probs[:, :1], log_probs)
    top = known.max(axis=1, keepdims=True)
    # float32 halves the time; responsibilities need no more.
    probs = torch.from_numpy(np.exp(known - top).astype(np.float32))
    weights = torch.full((probs.shape[1],), 1 / probs.shape[1])
    for _ in range(rounds):
        weights = weights * (probs.T @ (1 / (probs @ weights))) / len(probs)
        weights /= weights.sum()
    return weights.double().numpy()


def fit_fixed(components: Sequence[Component], log_probs: np.ndarray, kind: str = "fixed") -> Fixed:
    """The same weights for all tokens; of two components the exact optimum."""
    if len(components) == 2:
        lmbda = best_lambda(log_probs[:, 0], log_probs[:, 1])
        weights = [1 - lmbda, lmbda]
    else:
        weights = _sum_to_one(best_weights(log_probs, 4 * ROUNDS))
    return Fixed(components, weights, kind=kind)


def fit_bins(
    components: Sequence[Component], log_probs: np.ndarray, feature: str, values: np.ndarray
) -> Bins:
    """Weights for each of ``BINS`` bins, which hold equally many tokens (Drozdov et al., 2022).

    Args:
        components: E of them.
        log_probs: (N, E).
        feature: name of the feature that is binned.
        values: (N,) its values.
    """
    values = np.nan_to_num(values, nan=np.inf)
    edges = np.unique(np.quantile(values[np.isfinite(values)], np.arange(1, BINS) / BINS))
    bins = np.digitize(values, edges, right=True)  # as ``Bins`` has it
    overall = fit_fixed(components, log_probs).weights
    rows = [
        fit_fixed(components, log_probs[here]).weights if here.any() else overall
        for here in (bins == number for number in range(len(edges) + 1))
    ]
    return Bins(components, edges.tolist(), rows, (feature,))


def _sum_to_one(weights: np.ndarray) -> list[float]:
    weights = np.where(weights < 1e-6, 0.0, weights)
    return (weights / weights.sum()).tolist()


def worth_mixing(log_probs: np.ndarray) -> list[int]:
    """Places of the columns, of many, that the best fixed mixture of all gives weight."""
    weights = best_weights(log_probs)
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
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gate = Gate(components, features, fit.inputs.shape[1], dropout=dropout)
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
    return -mix(log_probs, gate(examples.inputs)).mean()
