"""Whether a score table is one that mixtures can be fitted or measured on."""

from __future__ import annotations

import numpy as np

from fairseq_knnlm.calibration.parts import LEAST_ROWS
from fairseq_knnlm.calibration.table import ScoreTable
from fairseq_knnlm.errors import TableError

#: The feature in which the nearest neighbour is told.
DISTANCES = "knn_distances"
#: A nearest neighbour this much nearer than the farthest is the token itself, but for rounding.
ITSELF = 1e-3
#: Of text that the datastore does not hold fewer tokens find themselves.
MOST_ITSELF = 0.2


def check_columns(table: ScoreTable) -> None:
    """Refuses a table of too few tokens, or in which an expert has nothing but NaN or infinity.

    Raises:
        TableError: saying which.
    """
    if len(table) < LEAST_ROWS:
        raise TableError(
            "the score table has too few tokens",
            expected=f"{LEAST_ROWS} at least, "
            "and tens of thousands for figures that mean something",
            found=len(table),
            do="write it of a longer text",
        )
    if count := int((~np.isfinite(table["lm"])).sum()):
        raise TableError(
            "the language model gives tokens of the score table no probability",
            expected="a finite number in every row of lm",
            found=f"{count:,} rows of {len(table):,} that are infinite or NaN",
            do="look for NaN in the checkpoint, or write the table without --fp16",
        )
    if wrong := [name for name in table.experts if np.isposinf(table[name]).any()]:
        raise TableError(
            f"{', '.join(wrong)} gives tokens of the score table more than certainty",
            expected="log-probabilities",
            found="infinity",
            do="write the table again",
        )
    if absent := [name for name in table.experts if np.isnan(table[name]).all()]:
        raise TableError(
            f"{', '.join(absent)} abstains from every token of the score table",
            expected="log-probabilities",
            found="NaN in every row",
            do="write the table without it, or of a longer text",
        )


def itself(table: ScoreTable) -> float:
    """Share of the tokens whose nearest neighbour is where they stand, but for rounding."""
    if DISTANCES not in table.columns or not len(table):
        return 0.0
    distances = table[DISTANCES].reshape(len(table), -1)
    return float(np.mean(np.abs(distances[:, 0]) <= ITSELF * distances[:, -1]))
