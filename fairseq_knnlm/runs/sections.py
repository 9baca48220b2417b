"""Sums of a run over sections of its text, exact, so that those of shares add up to the whole's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fairseq_knnlm.calibration.sections import SECTIONS, Sections, borders
from fairseq_knnlm.calibration.share import SectionParts
from fairseq_knnlm.runs.sums import ExactSum, added


def section_rows(sizes: np.ndarray) -> np.ndarray:
    """Where the sections of a text begin, and where the last one ends.

    Args:
        sizes: (B,) tokens of each block, in the order of the text; one block at least.

    Returns:
        (S + 1,) int64 rows, at the borders of blocks; S is ``SECTIONS``, or B where that is less.
    """
    edges = np.append(0, np.cumsum(sizes))
    return edges[borders(np.asarray(sizes), min(SECTIONS, len(sizes)))]


class SectionSums:
    """Adds up log-probabilities by the section that a token stands in.

    Args:
        rows: (S + 1,) as ``section_rows`` gives them.
    """

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows
        size = len(rows) - 1
        self._tokens = np.zeros(size, np.int64)
        self._base = [ExactSum() for _ in range(size)]
        self._mixed = [ExactSum() for _ in range(size)]

    def take(self, rows: np.ndarray, base: np.ndarray, mixed: np.ndarray) -> None:
        """Takes some tokens.

        Args:
            rows: (N,) int64, where in the text they stand.
            base, mixed: (N,) float32, natural log.
        """
        sections = np.searchsorted(self.rows, rows, side="right") - 1
        for section in np.unique(sections).tolist():
            here = sections == section
            self._tokens[section] += int(here.sum())
            self._base[section].add(base[here])
            self._mixed[section].add(mixed[here])

    @property
    def parts(self) -> dict[str, Any]:
        """All of it without rounding, as JSON: ``SectionParts``."""
        return {
            "tokens": self._tokens.tolist(),
            "base_log_prob": [one.parts for one in self._base],
            "log_prob": [one.parts for one in self._mixed],
        }

    @property
    def sections(self) -> Sections:
        """The sums, each rounded once."""
        base, mixed = ([one.value for one in some] for some in (self._base, self._mixed))
        return Sections(self._tokens.copy(), np.array(base), np.array(mixed))


def joined(shares: Sequence[SectionParts]) -> Sections:
    """The sections of a whole run, from those of its shares, each of which has all of them."""
    base, mixed = (
        np.array([added(parts) for parts in zip(*some, strict=True)])
        for some in ([one.base_log_prob for one in shares], [one.log_prob for one in shares])
    )
    return Sections(np.sum([one.tokens for one in shares], axis=0), base, mixed)
