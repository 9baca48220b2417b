"""Sums that come out the same to the last digit, whichever way their terms are grouped."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

#: A float32 is a whole number of 24 bits times a power of two: this one, or a multiple of it.
SMALLEST = 2**-172
#: The exponent that NumPy's ``frexp`` gives the least float32 above 0.
LOWEST = -148


class ExactSum:
    """A sum of float32 numbers of which none is rounded away: a whole number of ``SMALLEST``."""

    def __init__(self) -> None:
        self._whole = 0
        self._infinite = False

    def add(self, terms: np.ndarray) -> None:
        """Adds (N,) float32 numbers; -inf may be among them."""
        finite = np.isfinite(terms)
        self._infinite |= not finite.all()
        mantissas, exponents = np.frexp(terms[finite].astype(np.float64))
        # Whole numbers below 2**24: so many of them as a batch has add up exactly in float64.
        sums = np.bincount(exponents - LOWEST, weights=mantissas * 2**24)
        self._whole += sum(int(total) << place for place, total in enumerate(sums))

    @property
    def value(self) -> float:
        """The sum, rounded once; -inf where a term is."""
        return added([self.parts])

    @property
    def parts(self) -> list[float] | None:
        """A few float64 numbers that add up to it exactly; None where it is -inf."""
        if self._infinite:
            return None
        parts, rest = [], self._whole
        while rest:
            parts.append(rest / 2**172)  # whole numbers divide to the nearest float there is
            rest -= int(parts[-1] / SMALLEST)
        return parts


def added(sums: Sequence[list[float] | None]) -> float:
    """What several sums come to, rounded once.

    Args:
        sums: ``ExactSum.parts`` of each.
    """
    known = [parts for parts in sums if parts is not None]
    if len(known) < len(sums):
        return -math.inf
    return math.fsum(part for parts in known for part in parts)
