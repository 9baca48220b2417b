"""Bits that each expert moved a token by: against the average over all orders, one by one."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest

from fairseq_knnlm.explanation.attribution import LEAST_BITS, bits_moved

RNG = np.random.default_rng(3)


def value(weights: np.ndarray, probabilities: np.ndarray, asked: tuple[int, ...]) -> float:
    """log2 p of the language model and those who are asked."""
    there = [0, *asked]
    mass = weights[there].sum()
    mixed = weights[there] @ probabilities[there] / mass if mass else probabilities[0]
    return math.log2(mixed) if mixed else LEAST_BITS


def one_by_one(weights: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """What each adds to those before it, on average over all orders."""
    experts = range(1, len(weights))
    orders = list(permutations(experts))
    moved = np.zeros(len(weights))
    for order in orders:
        for place, expert in enumerate(order):
            before = order[:place]
            with_it = value(weights, probabilities, (*before, expert))
            moved[expert] += with_it - value(weights, probabilities, before)
    return moved / len(orders)


def random_mixtures(size: int, experts: int) -> tuple[np.ndarray, np.ndarray]:
    return RNG.dirichlet(np.ones(experts), size), RNG.random((size, experts))


@pytest.mark.parametrize("experts", [1, 2, 3, 4, 6])
def test_as_the_average_over_all_orders(experts: int) -> None:
    weights, probabilities = random_mixtures(9, experts)
    found = bits_moved(weights, np.log(probabilities))
    expected = [one_by_one(*rows) for rows in zip(weights, probabilities, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert not found[:, 0].any()


def test_they_add_up_to_what_was_moved() -> None:
    weights, probabilities = random_mixtures(200, 5)
    found = bits_moved(weights, np.log(probabilities)).sum(axis=1)
    mixed = (weights * probabilities).sum(axis=1)
    np.testing.assert_allclose(found, np.log2(mixed / probabilities[:, 0]), atol=1e-9)


def test_one_expert_moved_it_all() -> None:
    """0.75 * 0.1 + 0.25 * 0.9 = 0.3."""
    found = bits_moved(np.array([[0.75, 0.25]]), np.log([[0.1, 0.9]]))
    np.testing.assert_allclose(found, [[0.0, math.log2(3)]])


def test_who_does_the_same_gets_the_same() -> None:
    found = bits_moved(np.array([[0.4, 0.3, 0.3]]), np.log([[0.1, 0.5, 0.5]]))
    assert found[0, 1] == pytest.approx(found[0, 2])


def test_who_abstains_or_weighs_nothing_moved_nothing() -> None:
    weights = np.array([[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.5, 0.0]])
    log_probs = np.array([[-1.0, -2.0, np.nan, -0.1], [-1.0, -2.0, -3.0, np.nan]])
    found = bits_moved(weights, log_probs)
    assert found[0, 2:].tolist() == [0.0, 0.0]
    assert found[1, 3] == 0.0
    assert np.isfinite(found).all()


@pytest.mark.parametrize("spoken", [[-np.inf, -1.0, -2.0], [-1.0, -np.inf, -np.inf]])
@pytest.mark.parametrize("weights", [[0.5, 0.25, 0.25], [0.0, 0.5, 0.5], [1.0, 0.0, 0.0]])
def test_probabilities_of_0_are_finite_bits(spoken: list[float], weights: list[float]) -> None:
    """Of the language model, of the others, and where it weighs nothing."""
    found = bits_moved(np.array([weights]), np.array([spoken]))
    expected = one_by_one(np.array(weights), np.exp(spoken))
    np.testing.assert_allclose(found[0], expected, atol=1e-6)


def test_nothing_is_moved_where_nobody_is_asked() -> None:
    assert bits_moved(np.ones((2, 1)), np.array([[-1.0], [-np.inf]])).tolist() == [[0.0], [0.0]]
    assert bits_moved(np.ones((0, 3)), np.ones((0, 3))).shape == (0, 3)
