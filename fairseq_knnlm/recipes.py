"""Which FAISS index to build: a name or a factory string, made concrete for a datastore."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fairseq_knnlm.errors import IndexFileError

#: Below this many rows exact search is as fast as any index, and needs no training.
EXACT_BELOW = 65_536
#: Training points a centroid that are enough (FAISS warns below 39).
POINTS_PER_CENTROID = 50


@dataclass(frozen=True)
class Recipe:
    """A concrete index.

    Attributes:
        factory: FAISS's factory string.
        nprobe: inverted lists visited a query; 0 to measure which number is worthwhile.
        train_rows: keys in the training sample.
    """

    factory: str
    nprobe: int
    train_rows: int


def choose(name: str, rows: int, width: int, *, gpu: bool = False) -> Recipe:
    """The recipe behind a name.

    Args:
        name: ``auto``, ``paper``, or a FAISS factory string.
        rows: entries of the datastore, N.
        width: dimensions of a key, D.
        gpu: the search will run on a GPU, which knows fewer kinds of index.

    Raises:
        IndexFileError: where the paper's index does not fit the datastore.
    """
    if name == "auto":
        return _auto(rows, width, gpu)
    if name == "paper":
        return _paper(rows, width)
    lists = lists_of(name)
    return Recipe(name, 0, max(POINTS_PER_CENTROID * lists, 100_000))


def lists_of(factory: str) -> int:
    """Inverted lists in a factory string, ``"OPQ64,IVF4096,PQ64"`` -> 4096; 0 without any."""
    for part in factory.split(","):
        digits = part[3:].split("_")[0].split("(")[0]
        if part.startswith("IVF") and digits.isdigit():
            return int(digits)
    return 0


def _paper(rows: int, width: int) -> Recipe:
    """4,096 centroids, 64-byte codes, nprobe 32, trained on a million keys (section 4)."""
    if width % 64 or rows < 4096:
        raise IndexFileError(
            "the paper's index does not fit this datastore",
            expected="at least 4,096 keys of a width that 64 divides",
            found=f"{rows:,} keys of width {width}",
            do="build with --recipe auto",
        )
    return Recipe("IVF4096,PQ64", 32, 1_000_000)


def _auto(rows: int, width: int, gpu: bool) -> Recipe:
    if rows < EXACT_BELOW:
        return Recipe("Flat", 0, 0)
    lists = _power_of_two(2.5 * rows**0.5)
    train_rows = POINTS_PER_CENTROID * lists
    if gpu:  # 8-bit codes only, of a few sizes
        codes = next(size for size in (64, 48, 32, 16, 8, 4, 2, 1) if width % size == 0)
        return Recipe(f"IVF{lists},PQ{codes}", 0, train_rows)
    if width % 2:
        return Recipe(f"IVF{lists},SQ8", 0, train_rows)
    # 4-bit codes of two dimensions each, or four in wide keys, scanned in registers ("fast scan").
    codes = width // 2 if width <= 256 or width % 4 else width // 4
    return Recipe(f"IVF{lists},PQ{codes}x4fs", 0, train_rows)


def _power_of_two(number: float) -> int:
    """The nearest power of two, between 64 and 262,144."""
    return 2 ** round(min(18.0, max(6.0, math.log2(number))))
