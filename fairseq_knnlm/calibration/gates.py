"""Trains gates on the loss of the mixture that they weigh."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_knnlm.mixture.components import Abstain, Component
from fairseq_knnlm.mixture.mix import mix
from fairseq_knnlm.mixture.mixers import Gate

BATCH = 2048
#: Steps an epoch at least: little text makes smaller batches, not fewer steps.
LEAST_BATCHES = 10
EPOCHS = 30
#: Epochs without a better loss on the tokens kept aside, after which training ends.
PATIENCE = 6
LEARNING_RATE = 3e-3
#: A probability of 0 has no gradient; nothing is lost where another component has the token.
FLOOR = -60.0


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

    def split(self, parts: int) -> Iterator[Examples]:
        """As many parts, one after the other."""
        pairs = zip(
            self.log_probs.tensor_split(parts), self.inputs.tensor_split(parts), strict=True
        )
        return (Examples(*pair) for pair in pairs)


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
    optimizer = torch.optim.AdamW(
        gate.parameters(), lr=LEARNING_RATE, weight_decay=weight_decay, fused=True
    )
    batches = max(LEAST_BATCHES, len(fit) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=EPOCHS * batches + 1, pct_start=0.1
    )
    best, state, waited = math.inf, copy.deepcopy(gate.state_dict()), 0
    for _ in range(EPOCHS):
        gate.train()
        for examples in fit[torch.randperm(len(fit))].split(batches):
            loss = gate_loss(gate, examples)
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
