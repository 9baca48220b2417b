"""Trains gates on the loss of the mixture that they weigh."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fairseq_knnlm.calibration.side_by_side import go_on
from fairseq_knnlm.lm.products import layer
from fairseq_knnlm.mixture.components import Abstain, Component
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


@dataclass(frozen=True)
class _Prepared:
    """Examples with all that a step needs and that the gate's weights do not change.

    Attributes:
        inputs: (N, F) float32, standardised.
        probs: (N, E) float32, over that of the likeliest in its row; 0 where one abstains whose
            weight goes to all others.
        absent: (N, E) float32, -inf there, and 0 elsewhere; None where nobody abstains like that.
    """

    inputs: Tensor
    probs: Tensor
    absent: Tensor | None

    def __getitem__(self, rows: Tensor) -> _Prepared:
        absent = None if self.absent is None else self.absent.index_select(0, rows)
        return _Prepared(
            self.inputs.index_select(0, rows), self.probs.index_select(0, rows), absent
        )

    def __len__(self) -> int:
        return len(self.inputs)


#: The first weights of a network are drawn by the process's own generator, which threads share.
_drawing = threading.Lock()


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
        seed: of initial weights, order and dropout; the process's own generator is left as it was.
        after_epoch: told the loss on ``stop`` after each, in natural log.
        dropout: share of hidden units left out in training.
        weight_decay: of AdamW.
        abstain: where the weight of an expert that abstains goes.
    """
    width, drawn = fit.inputs.shape[1], torch.Generator()
    with _drawing, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gate = Gate(components, features, width, dropout=dropout, abstain=abstain)
        drawn.set_state(torch.random.get_rng_state())
    gate.standardize(fit.inputs)
    _train(gate, fit, stop, after_epoch, weight_decay, drawn)
    return gate.eval()


def _train(
    gate: Gate,
    fit: Examples,
    stop: Examples,
    after_epoch: Callable[[float], None],
    weight_decay: float,
    drawn: torch.Generator,
) -> None:
    (prepared, _), (aside, top) = _prepare(gate, fit), _prepare(gate, stop)
    optimizer = torch.optim.AdamW(
        gate.parameters(), lr=LEARNING_RATE, weight_decay=weight_decay, fused=True
    )
    batches = max(LEAST_BATCHES, len(prepared) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=EPOCHS * batches + 1, pct_start=0.1
    )
    best, state, waited = math.inf, copy.deepcopy(gate.state_dict()), 0
    for _ in range(EPOCHS):
        gate.train()
        with gate.drawing(drawn):
            for rows in torch.randperm(len(prepared), generator=drawn).tensor_split(batches):
                go_on()
                loss = _loss(gate, prepared[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        gate.eval()
        with torch.no_grad():
            reached = float(_loss(gate, aside) - top)
        after_epoch(reached)
        if reached < best:
            best, state, waited = reached, copy.deepcopy(gate.state_dict()), 0
        elif (waited := waited + 1) == PATIENCE:
            break
    gate.load_state_dict(state)


def gate_loss(gate: Gate, examples: Examples) -> Tensor:
    """Mean loss of the gated mixture as ``mix`` computes it, natural log."""
    prepared, top = _prepare(gate, examples)
    return _loss(gate, prepared) - top


def _prepare(gate: Gate, examples: Examples) -> tuple[_Prepared, Tensor]:
    """Prepared for ``_loss``, and the mean log-probability of the likeliest in each row."""
    log_probs = examples.log_probs.clamp_min(FLOOR)  # which leaves NaN what it is
    abstains, absent = log_probs.isnan(), None
    if gate.abstain == "lm":
        log_probs = log_probs.where(~abstains, log_probs[:, :1])
    elif abstains.any():
        log_probs.masked_fill_(abstains, -math.inf)
        absent = torch.zeros_like(log_probs).masked_fill_(abstains, -math.inf)
    tops = log_probs.amax(dim=1, keepdim=True)
    inputs, probs = gate.standardized(examples.inputs), (log_probs - tops).exp()
    return _Prepared(inputs, probs, absent), tops.mean()


def _loss(gate: Gate, examples: _Prepared) -> Tensor:
    """What ``gate_loss`` is, but for the likeliest in each row.

    It is written out here because the mixture of probabilities takes one exponential where that of
    their logarithms takes three.
    """
    scores = examples.inputs
    for one in gate.layers:
        scores = layer(scores, one.weight, one.bias) if isinstance(one, nn.Linear) else one(scores)
    if examples.absent is not None:
        scores = scores + examples.absent
    return -(scores.softmax(dim=1) * examples.probs).sum(dim=1).log().mean()
