"""Cuts a score table into parts: to fit on, to stop and to choose on, and to report."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Tokens of a stretch. Neighbouring tokens are alike, so the parts must not alternate quickly.
STRETCH = 2000
#: Of ten stretches, how many to fit on, to stop on and to choose on; the other is held out.
FIT, STOP, CHOOSE = 7, 1, 1
#: Tokens without which there is no telling them apart: four rounds of ten stretches of one token.
LEAST_ROWS = 40


@dataclass(frozen=True)
class Parts:
    """Rows of a table, (M,) int64 each.

    Attributes:
        fit: what weights are fitted on.
        stop: what tells a gate when to stop.
        choose: what nothing is fitted on before the choice.
        report: what nothing is fitted or chosen on.
    """

    fit: np.ndarray
    stop: np.ndarray
    choose: np.ndarray
    report: np.ndarray

    @property
    def settings(self) -> np.ndarray:
        """What tells an expert's best setting, of few."""
        return np.concatenate([self.fit, self.stop])

    @property
    def compared(self) -> np.ndarray:
        """What it is chosen by between mixtures.

        With the stretches to stop on there are twice as many, so that chance chooses less: all that
        is learnt of them before is settings, and after how many rounds a gate stops.
        """
        return np.concatenate([self.stop, self.choose])

    @property
    def unreported(self) -> np.ndarray:
        """What weights are fitted on once more when nothing is left to choose."""
        return np.concatenate([self.fit, self.stop, self.choose])

    @classmethod
    def of(cls, rows: int) -> Parts:
        """Cuts a table: into shorter stretches where ten would not fit into it."""
        stretch = max(1, min(STRETCH, rows // LEAST_ROWS))
        turn = np.arange(rows) // stretch % 10
        part = np.searchsorted(np.cumsum([FIT, STOP, CHOOSE]), turn, side="right")
        return cls(*(np.flatnonzero(part == number) for number in range(4)))
