"""Sections of a text, and how far a figure would go another way on other text like it.

Tokens of a text depend on each other, so that the deviation of single ones says too little. Here a
text is cut into sections long enough to be nearly independent, and the sums over them are compared:
the method of batch means (Schmeiser, 1982), which is the block jackknife (Kuensch, 1989) of a ratio
in its first order, and a standard error clustered by sections (Miller, 2024, arXiv:2411.00640).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

#: Sections of a text. Batch means want 10 to 30 at least, and each as long as tokens remember.
SECTIONS = 64
#: What is done, for those who read the figures.
METHOD = "batch means over sections of the text"


@dataclass(frozen=True)
class Sections:
    """Log-probabilities summed over sections of a text.

    Attributes:
        tokens: (S,) int64, scored in each.
        base: (S,) float64, natural log, of the language model.
        mixed: (S,) float64, natural log, of the mixture; -inf where a token is impossible.
    """

    tokens: np.ndarray
    base: np.ndarray
    mixed: np.ndarray

    @classmethod
    def of_tokens(cls, base: np.ndarray, mixed: np.ndarray) -> Sections:
        """Of a text whose tokens' log-probabilities (N,) are given in its order, natural log."""
        edges = borders(np.ones(len(base), np.int64), min(SECTIONS, len(base)))
        sums = (np.add.reduceat(one.astype(np.float64), edges[:-1]) for one in (base, mixed))
        return cls(np.diff(edges), *sums)

    @property
    def base_error(self) -> float | None:
        """Standard error of the language model's loss, in bits a token."""
        return standard_error(self.base, self.tokens)

    @property
    def error(self) -> float | None:
        """Standard error of the mixture's loss, in bits a token."""
        return standard_error(self.mixed, self.tokens)

    @property
    def gain_error(self) -> float | None:
        """Standard error of what the mixture gains over the language model, in bits a token.

        Both are of the same text, and rise and fall with it; their difference does so less.
        """
        return standard_error(self.mixed - self.base, self.tokens)


def standard_error(sums: np.ndarray, tokens: np.ndarray) -> float | None:
    """Standard error of a mean over tokens, from its sums over sections.

    With m the mean over all N tokens, and s_i over n_i tokens the sums of S sections, it is
    sqrt(S / (S - 1) sum (s_i - m n_i)^2) / N.

    Args:
        sums: (S,) natural log.
        tokens: (S,) in each section; those without any do not count.

    Returns:
        In bits a token; None where fewer than two sections have tokens, or a sum is no number.
    """
    counted = tokens > 0
    sums, tokens = sums[counted], tokens[counted]
    size = len(sums)
    if size < 2 or not np.isfinite(sums).all():
        return None
    apart = sums - sums.sum() / tokens.sum() * tokens
    error = math.sqrt(size / (size - 1) * float(apart @ apart)) / float(tokens.sum())
    return error / math.log(2)


def borders(tokens: np.ndarray, of: int) -> np.ndarray:
    """Where parts of a row of things begin: one thing at least in each, and tokens shared evenly.

    Args:
        tokens: (B,) of each thing, such as a block or a batch; B at least ``of``.
        of: parts.

    Returns:
        (of + 1,) int64: part i is of the things from the i-th number up to the next.
    """
    ends, numbers = np.cumsum(tokens), np.arange(1, of)
    nearest = np.searchsorted(ends - tokens / 2, ends[-1] * (numbers / of))
    further = np.maximum.accumulate(nearest - numbers).clip(0, len(tokens) - of)
    return np.array([0, *(further + numbers), len(tokens)])
