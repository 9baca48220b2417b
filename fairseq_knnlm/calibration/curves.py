"""Curves of a score table: perplexity against lambda, temperature and k."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from fairseq_knnlm.calibration.fitting import best_lambda, mixture_loss
from fairseq_knnlm.calibration.table import ScoreTable
from fairseq_knnlm.files import publish
from fairseq_knnlm.mixture.components import searches

#: Tokens that a curve is drawn from, evenly spaced: enough for the eye.
TOKENS = 20000
LAMBDAS = np.linspace(0, 0.9, 46)


def draw_curves(table: ScoreTable, path: Path) -> bool:
    """Draws perplexity against lambda, temperature and k, one expert a line, as PNG.

    Returns:
        False where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, sharey=True)
    rows = np.linspace(0, len(table) - 1, min(TOKENS, len(table))).astype(int)
    lm = table["lm"][rows]
    base = math.exp(mixture_loss(lm, lm, 0))
    for name, settings in table.experts.items():
        _lambda_curve(axes[0], name, lm, table[name][rows])
        if searches(name):
            _temperature_curve(axes[1], name, lm, table[name][rows], settings)
            _k_curve(axes[2], name, lm, table[name][rows], settings, table.card["k"])
    titles = (
        "weight λ, each in its best setting",
        "temperature T, each at its best λ",
        "k, each at its best T and λ",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.axhline(base, color="0.5", linestyle=":", label="language model")
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("perplexity")
    # Far above the language model there is nothing to see.
    axes[0].set_ylim(top=1.15 * base)
    axes[0].legend()
    figure.suptitle(f"{table.card['split']}, {len(rows):,} of {len(table):,} tokens")
    with publish(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return True


def _perplexity(lm: np.ndarray, column: np.ndarray) -> float:
    """At the best lambda."""
    return math.exp(mixture_loss(lm, column, best_lambda(lm, column)))


def _lambda_curve(axis: Any, name: str, lm: np.ndarray, columns: np.ndarray) -> None:
    best = min(columns.T, key=lambda column: _perplexity(lm, column))
    curve = [math.exp(mixture_loss(lm, best, float(lmbda))) for lmbda in LAMBDAS]
    axis.plot(LAMBDAS, curve, label=name)


def _temperature_curve(
    axis: Any, name: str, lm: np.ndarray, columns: np.ndarray, settings: list[dict]
) -> None:
    points = {
        setting["temperature"]: _perplexity(lm, columns[:, place])
        for place, setting in enumerate(settings)
        if not setting["suffix"] and not setting["k"]
    }
    axis.semilogx(points.keys(), points.values(), marker=".", base=2)


def _k_curve(
    axis: Any, name: str, lm: np.ndarray, columns: np.ndarray, settings: list[dict], k: int
) -> None:
    points: dict[int, float] = {}
    for place, setting in enumerate(settings):
        if not setting["suffix"]:
            here = _perplexity(lm, columns[:, place])
            fewer = setting["k"] or k
            points[fewer] = min(here, points.get(fewer, math.inf))
    ascending = sorted(points)
    values = [points[fewer] for fewer in ascending]
    axis.semilogx(ascending, values, marker=".", base=2)
