"""Fits lambda and temperature from a score table: no language model, no index, seconds."""

from __future__ import annotations

import math

import numpy as np

from fairseq_knnlm.calibration import Calibration
from fairseq_knnlm.errors import TableError
from fairseq_knnlm.tables import ScoreTable


def best_lambda(lm: np.ndarray, expert: np.ndarray) -> float:
    """The weight that makes the mixture likeliest.

    With r = p_expert / p_LM the mean of log(1 + lambda (r - 1)) is concave in lambda, so its
    slope falls and bisection finds where it is zero.

    Args:
        lm: (N,) log p_LM, natural log.
        expert: (N,) log p of the expert, natural log; -inf allowed.

    Returns:
        A number in [0, 1].
    """
    gain = np.exp(np.clip(expert.astype(np.float64) - lm, None, 200.0)) - 1.0

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
    """Mean of -log((1 - lambda) p_LM + lambda p_expert), natural log."""
    if lmbda == 0:
        return -float(np.mean(lm, dtype=np.float64))
    base = lm.astype(np.float64) + (math.log1p(-lmbda) if lmbda < 1 else -math.inf)
    return -float(np.mean(np.logaddexp(base, expert.astype(np.float64) + math.log(lmbda))))


def fit(table: ScoreTable) -> Calibration:
    """The best temperature of the table's grid with its best lambda.

    Raises:
        TableError: where the table has no neighbours' columns.
    """
    if "knn_by_temperature" not in table.columns:
        raise TableError(
            "the score table has no neighbours in it",
            expected="a table written with --knnlm",
            found=", ".join(table.columns),
            do="write it with --knnlm --dstore-filename DSTORE --score-table FILE.npz",
        )
    lm, card = table["lm"], table.card
    best = (mixture_loss(lm, lm, 0.0), 0.0, 1.0)
    for column, temperature in enumerate(card["temperatures"]):
        expert = table["knn_by_temperature"][:, column]
        lmbda = best_lambda(lm, expert)
        best = min(best, (mixture_loss(lm, expert, lmbda), lmbda, float(temperature)))
    loss, lmbda, temperature = best
    return Calibration(
        lmbda=lmbda,
        temperature=temperature,
        datastore=card["datastore"],
        model=card["model"],
        split=card["split"],
        tokens=len(table),
        k=card["k"],
        index=card["index"],
        distances=card["distances"],
        base_perplexity=math.exp(mixture_loss(lm, lm, 0.0)),
        perplexity=math.exp(loss),
    )
