"""Which FAISS index to build: a name or a factory string, made concrete for a datastore."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fairseq_knnlm.errors import IndexFileError

#: Below this many rows exact search is as fast as any index, and needs no training.
EXACT_BELOW = 65_536
#: Training points a centroid that are enough (FAISS warns below 39).
POINTS_PER_CENTROID = 50
#: Keys in a training sample, at least, where there are as many.
LEAST_TRAINING = 100_000
#: Bytes that FAISS keeps for each key's row number in an inverted list.
ID_BYTES = 8
#: Bytes of an index for each key, where nothing else is asked: about those of the paper's.
DEFAULT_BYTES = 72
#: Share of the true neighbours that the visited lists should hold, where nothing else is said.
RECALL = 0.9
#: Dimensions that 64-byte codes follow well; wider keys are cut to these.
WIDTH_TO_KEEP = 256


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


def choose(
    name: str,
    rows: int,
    width: int,
    *,
    metric: str = "l2",
    gpu: bool = False,
    max_bytes: int | None = None,
    lists: bool = False,
) -> Recipe:
    """The recipe behind a name.

    Args:
        name: ``auto``, ``paper``, or a FAISS factory string.
        rows: entries of the datastore, N.
        width: dimensions of a key, D.
        metric: ``"l2"`` or ``"ip"``.
        gpu: the search will run on a GPU, which knows fewer kinds of index.
        max_bytes: bytes of the index for each key that ``auto`` may spend.
        lists: only an index with inverted lists will do, whatever the size.

    Raises:
        IndexFileError: where the paper's index does not fit the datastore, or no index is as small
            as asked.
    """
    if name == "auto":
        return _auto(rows, width, metric, gpu, max_bytes, lists)
    if name == "paper":
        return _paper(rows, width)
    return Recipe(name, 0, max(POINTS_PER_CENTROID * lists_of(name), 100_000))


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


def _auto(
    rows: int, width: int, metric: str, gpu: bool, max_bytes: int | None, only_lists: bool
) -> Recipe:
    budget = max_bytes if max_bytes is not None else DEFAULT_BYTES
    if rows < EXACT_BELOW and not only_lists and (max_bytes is None or 4 * width <= max_bytes):
        return Recipe("Flat", 0, 0)
    lists = _power_of_two(rows**0.5)
    if budget <= ID_BYTES:
        raise IndexFileError(
            "no index is that small",
            expected=f"--max-bytes-per-key above {ID_BYTES}, which every key's row number takes",
            found=budget,
            do="leave it out: auto then takes about 72",
        )
    if gpu:  # 8-bit codes only, of a few sizes
        sizes = (96, 64, 48, 32, 16, 8, 4, 2, 1)
        codes = next(s for s in sizes if width % s == 0 and s <= max(budget - ID_BYTES, 1))
        factory = f"IVF{lists},PQ{codes}"
    else:
        factory = _fast_scan(lists, width, metric, budget - ID_BYTES)
    return Recipe(factory, 0, max(POINTS_PER_CENTROID * lists, LEAST_TRAINING))


def _fast_scan(lists: int, width: int, metric: str, code_bytes: int) -> str:
    """4-bit codes of the residuals, which are scanned in registers ("fast scan").

    The keys are turned to their principal axes and then at random, so that every code has as much
    to tell, and cut to as many dimensions as the codes can follow at two dimensions each.
    """
    if width == 1:
        return f"IVF{lists},SQ8"
    codes = min(2 * code_bytes, width // 2)
    if metric == "ip":  # centring, as principal axes do, would change inner products
        codes = next(number for number in range(codes, 0, -1) if width % number == 0)
        return f"IVF{lists},PQ{codes}x4fs"
    most = min(width, max(WIDTH_TO_KEEP, 2 * codes))
    return f"PCAR{codes * (most // codes)},IVF{lists},PQ{codes}x4fsr"


def _power_of_two(number: float) -> int:
    """The nearest power of two, between 64 and 262,144."""
    return 2 ** round(min(18.0, max(6.0, math.log2(number))))
