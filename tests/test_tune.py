"""Fitting lambda and temperature from a score table, against grids and planted answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fairseq_knnlm.errors import TableError
from fairseq_knnlm.tables import ScoreTable
from fairseq_knnlm.tune import best_lambda, fit, mixture_loss

CARD = {
    "datastore": "d" * 64,
    "model": "m" * 64,
    "split": "valid",
    "k": 8,
    "index": "Flat",
    "distances": "exact squared L2",
}
ROWS = 3000


def log_probs(seed: int, impossible: float = 0.0) -> np.ndarray:
    """(ROWS,) float32 like an expert's: mostly unlikely, some certain, a share of -inf."""
    rng = np.random.default_rng(seed)
    found = np.log(rng.beta(0.5, 2.0, ROWS) + 1e-8).astype(np.float32)
    found[rng.random(ROWS) < impossible] = -math.inf
    return found


def plain_loss(lm: np.ndarray, expert: np.ndarray, lmbda: float) -> float:
    p = (1 - lmbda) * np.exp(lm.astype(np.float64)) + lmbda * np.exp(expert.astype(np.float64))
    with np.errstate(divide="ignore"):
        return float(-np.log(p).mean())


@pytest.mark.parametrize("lmbda", [0.0, 0.3, 1.0])
def test_loss_is_that_of_the_mixed_probabilities(lmbda: float) -> None:
    lm, expert = log_probs(1), log_probs(2)
    assert mixture_loss(lm, expert, lmbda) == pytest.approx(plain_loss(lm, expert, lmbda))


def test_loss_with_impossible_tokens() -> None:
    lm, expert = log_probs(1), log_probs(2, impossible=0.3)
    assert mixture_loss(lm, expert, 0.3) == pytest.approx(plain_loss(lm, expert, 0.3))
    assert mixture_loss(lm, expert, 0.0) == pytest.approx(-lm.mean(dtype=np.float64))
    assert mixture_loss(lm, expert, 1.0) == math.inf


@pytest.mark.parametrize("impossible", [0.0, 0.2, 0.6, 0.95])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_best_lambda_beats_a_fine_grid(seed: int, impossible: float) -> None:
    lm, expert = log_probs(seed), log_probs(seed + 10, impossible)
    grid = np.linspace(0, 1, 1001)
    losses = [plain_loss(lm, expert, lmbda) for lmbda in grid]
    found = best_lambda(lm, expert)
    assert abs(found - grid[int(np.argmin(losses))]) <= 1e-3
    assert plain_loss(lm, expert, found) <= min(losses) + 1e-9


def test_useless_neighbours_get_no_weight() -> None:
    lm = log_probs(1)
    assert best_lambda(lm, np.full(ROWS, -math.inf, np.float32)) == 0.0
    assert best_lambda(lm, lm - 1) == 0.0
    assert best_lambda(lm, lm) == 0.0


def test_neighbours_that_always_know_better_get_all_weight() -> None:
    lm = log_probs(1)
    assert best_lambda(lm, np.minimum(lm + 1, 0)) == pytest.approx(1.0)


def test_hopeless_language_model_does_not_overflow() -> None:
    """exp(log p_kNN - log p_LM) would be infinite."""
    lm = np.array([-1e4, -1.0], np.float32)
    expert = np.array([0.0, -math.inf], np.float32)
    assert best_lambda(lm, expert) == pytest.approx(0.5)


def planted(temperatures: list[float], true: float, lmbda: float) -> ScoreTable:
    """Tokens drawn from the mixture at one temperature and one lambda, nothing else fits."""
    rng = np.random.default_rng(8)
    vocabulary, k = 12, 10
    distances = 40 * rng.random((ROWS, k))
    values = rng.integers(vocabulary, size=(ROWS, k))
    lm = rng.dirichlet(np.full(vocabulary, 0.5), size=ROWS)

    def knn(temperature: float) -> np.ndarray:
        weights = np.exp(-distances / temperature)
        spread = np.zeros((ROWS, vocabulary))
        np.add.at(spread, (np.arange(ROWS)[:, None], values), weights)
        return spread / spread.sum(axis=1, keepdims=True)

    mixed = lmbda * knn(true) + (1 - lmbda) * lm
    tokens = np.array([rng.choice(vocabulary, p=row / row.sum()) for row in mixed])
    at = (np.arange(ROWS), tokens)
    with np.errstate(divide="ignore"):
        columns = np.log(np.stack([knn(t)[at] for t in temperatures], axis=1))
    return ScoreTable(
        {"lm": np.log(lm[at]), "knn_by_temperature": columns},
        {**CARD, "temperatures": temperatures},
    )


@pytest.mark.parametrize(("true", "lmbda"), [(1.0, 0.6), (5.0, 0.4), (40.0, 0.8)])
def test_fit_finds_what_was_planted(true: float, lmbda: float) -> None:
    temperatures = [0.2, 1.0, 5.0, 40.0, 1000.0]
    table = planted(temperatures, true, lmbda)
    found = fit(table)
    assert found.temperature == true
    assert found.lmbda == pytest.approx(lmbda, abs=0.06)


def test_fit_is_the_best_of_the_grid_and_reports_its_perplexity() -> None:
    temperatures = [0.5, 3.0, 20.0]
    table = planted(temperatures, 3.0, 0.5)
    found = fit(table)
    losses = {
        (temperature, lmbda): plain_loss(table["lm"], table["knn_by_temperature"][:, i], lmbda)
        for i, temperature in enumerate(temperatures)
        for lmbda in np.linspace(0, 0.99, 100)
    }
    best = min(losses, key=losses.__getitem__)
    assert found.temperature == best[0]
    assert found.lmbda == pytest.approx(best[1], abs=0.01)
    assert found.perplexity == pytest.approx(math.exp(losses[best]), rel=1e-4)
    assert found.base_perplexity == pytest.approx(math.exp(-table["lm"].mean()))
    assert (found.tokens, found.split, found.k) == (ROWS, "valid", 8)
    assert (found.datastore, found.model) == (CARD["datastore"], CARD["model"])


def test_fit_gives_useless_neighbours_no_weight() -> None:
    lm = log_probs(1)
    table = ScoreTable(
        {"lm": lm, "knn_by_temperature": np.stack([lm - 1, lm - 2], axis=1)},
        {**CARD, "temperatures": [1.0, 2.0]},
    )
    found = fit(table)
    assert found.lmbda == 0.0
    assert found.perplexity == found.base_perplexity


def test_fit_needs_neighbours() -> None:
    with pytest.raises(TableError, match="no neighbours"):
        fit(ScoreTable({"lm": log_probs(1)}, CARD))
