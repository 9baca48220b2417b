"""Who moved a token's probability from the language model's to the mixture's, and by how much.

An expert's part is its Shapley value (Shapley, 1953; of predictions, Lundberg & Lee, 2017): what it
adds to those who are asked before it, on average over all orders in which the experts can be asked.
No other division adds up to the whole, treats those alike who do the same, and gives nothing to who
changes nothing.
"""

from __future__ import annotations

from math import factorial

import numpy as np

#: log2 of the probability that stands for 0, about the least that float64 can hold.
LEAST_BITS = -1000.0


def bits_moved(weights: np.ndarray, log_probs: np.ndarray) -> np.ndarray:
    """What each expert moved the probability of a token by.

    The value of a set of experts is log2 p of the language model and them, mixed with the weights
    that they have in the mixture, which are made to add up to 1. Where none of them weighs
    anything the language model is alone.

    Args:
        weights: (N, E) of the experts in the mixture, the language model's first; a row sums to 1.
        log_probs: (N, E) of the token, natural log; NaN of who abstains and weighs nothing.

    Returns:
        (N, E) float64 in bits. The language model's are 0; a row sums to log2 p of the mixture less
        log2 p of the language model, with 2^-1000 in the place of a probability of 0.
    """
    weights, log_probs = (np.asarray(each, np.float64) for each in (weights, log_probs))
    moved = np.zeros_like(weights)
    # There are as many sets as two to the power of who takes part.
    asked = 1 + np.flatnonzero((weights[:, 1:] > 0).any(axis=0))
    sets = _sets(len(asked))
    values = _values(weights[:, [0, *asked]], log_probs[:, [0, *asked]], sets)
    moved[:, asked] = values @ _coefficients(sets)
    return moved


def _sets(size: int) -> np.ndarray:
    """(2^size, size) bool: which of them are in each set; the first is empty."""
    return (np.arange(2**size)[:, None] >> np.arange(size)) & 1 > 0


def _coefficients(sets: np.ndarray) -> np.ndarray:
    """(S, n), how much the value of each set counts for each of n: they follow all who come before.

    Of n! orders, s! (n - s - 1)! put a set of s others before one and the rest behind it.
    """
    size = sets.shape[1]
    behind = sets.sum(axis=1, keepdims=True) - sets  # of a set without the one that is looked at
    orders = [factorial(one) * factorial(size - one - 1) for one in range(size)]
    parts = np.array(orders, np.float64)[behind] / factorial(size) if size else sets * 1.0
    return np.where(sets, parts, -parts)


def _values(weights: np.ndarray, log_probs: np.ndarray, sets: np.ndarray) -> np.ndarray:
    """(N, S) log2 p of the language model with each set of the others."""
    members = np.concatenate([np.ones((len(sets), 1)), sets], axis=1).T
    spoken = np.exp(np.where(np.isnan(log_probs), -np.inf, log_probs))
    together, mass = (weights * spoken) @ members, weights @ members
    alone = np.broadcast_to(spoken[:, :1], mass.shape)
    mixed = np.divide(together, mass, out=alone.copy(), where=mass > 0)
    return np.log2(np.maximum(mixed, 2.0**LEAST_BITS))
