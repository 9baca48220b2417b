"""Which searches are not worth their while: what tells it, and what skipping them costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fairseq_knnlm.calibration.fitter import QUERY, Fitter
from fairseq_knnlm.calibration.gates import fit_gate
from fairseq_knnlm.calibration.losses import mixture_losses, tensors
from fairseq_knnlm.calibration.stored import Calibration
from fairseq_knnlm.calibration.table import ScoreTable
from fairseq_knnlm.mixture.components import searches
from fairseq_knnlm.mixture.mixers import Skip

#: A gate that skips searches reads the query itself, which is wide and soon learned by heart.
DROPOUT, DECAY = 0.5, 0.1
#: Shares of the searches for which a table tells what skipping them does.
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
#: Above the columns of ``skipping_costs``.
COSTS = ("experts", *(f"{share:.0%}" for share in SHARES))


def fit_skip(fitter: Fitter, experts: Sequence[str]) -> Skip | None:
    """What tells before a search if it is worth its while; None where there is no telling.

    A search is worth the weight that a gate gives to neighbours which it has not seen.

    Args:
        fitter: of a score table.
        experts: names of those to mix, without the language model.
    """
    features = fitter.features([name for name in experts if not searches(name)])
    features += [name for name in fitter.table.card["features"] if name == QUERY]
    if not features or not any(map(searches, experts)):
        return None
    components = fitter.singles(experts)
    fit, stop = fitter.examples(components, features)
    gate = fit_gate(
        *(components, features, fit, stop),
        seed=fitter.seed,
        dropout=DROPOUT,
        weight_decay=DECAY,
    )
    # Of text that it did not learn from, nor is measured on.
    rows = fitter.parts.compared
    scores = Skip(gate, ()).scores(tensors(fitter.table.features(features, rows))).numpy()
    return Skip(gate, np.quantile(scores, np.linspace(0, 1, 101)).tolist())


def skipping_costs(
    calibration: Calibration, table: ScoreTable, rows: np.ndarray | slice = slice(None)
) -> list[tuple[str, ...]]:
    """What skipping shares of the searches does to perplexity, as the rows of a table to read.

    A row each for the sets of experts whose columns the table has, under ``COSTS``.

    Args:
        calibration: what was fitted.
        table: the tokens' columns.
        rows: of the table, which of them count.
    """
    found = []
    for skip in calibration.skips:
        if set(table.columns) >= {*skip.experts, *skip.gate.features}:
            pairs = skipped(calibration, skip, table, rows)
            cells = (f"{perplexity:.2f} ({share:.1%})" for share, perplexity in pairs)
            found.append(("+".join(skip.experts), *cells))
    return found


def skipped(
    calibration: Calibration, skip: Skip, table: ScoreTable, rows: np.ndarray | slice = slice(None)
) -> list[tuple[float, float]]:
    """The share of the searches really skipped, and perplexity, for each of ``SHARES``."""
    mixtures = calibration.find(skip.experts), calibration.find(skip.rest)
    searched, rest = (mixture_losses(table, mixture.mixer, rows) for mixture in mixtures if mixture)
    scores = skip.scores(tensors(table.features(skip.gate.features, rows))).numpy()
    found = []
    for share in SHARES:
        out = scores < skip.threshold(share)
        loss = np.where(out, rest, searched).mean()
        found.append((float(out.mean()), math.exp(loss)))
    return found
