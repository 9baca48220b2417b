"""FAISS itself, or one clear message where it is missing; and what any index of it can be asked."""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Iterator
from typing import Any

from fairseq_knnlm.errors import KnnlmError

logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it reports every attempt
try:
    import faiss
except ImportError:
    raise KnnlmError(
        "FAISS is not installed",
        expected="the Python package faiss",
        found="none",
        do="pip install faiss-cpu, or on a machine with a GPU faiss-gpu",
    ) from None

#: FAISS's number of each metric.
METRICS = {"l2": faiss.METRIC_L2, "ip": faiss.METRIC_INNER_PRODUCT}

#: glibc's numbers of what it can be told, and the bytes up to which freed memory is kept.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, KEPT = -1, -3, 256 * 2**20


def has_lists(index: Any) -> bool:
    """Whether the index, or one within it, has inverted lists."""
    return faiss.try_extract_index_ivf(index) is not None


def is_exact(index: Any) -> bool:
    """Whether the index compares full keys, all of them."""
    return isinstance(faiss.downcast_index(index), faiss.IndexFlat)


def innermost(index: Any) -> Any:
    """The index behind transforms and id maps."""
    index = faiss.downcast_index(index)
    while isinstance(index, faiss.IndexPreTransform | faiss.IndexIDMap):
        index = faiss.downcast_index(index.index)
    return index


def set_nprobe(index: Any, nprobe: int) -> None:
    """Has so many lists visited a query, where there are lists; 0 changes nothing."""
    if nprobe:
        faiss.ParameterSpace().set_index_parameter(index, "nprobe", nprobe)


def keep_freed_memory() -> None:
    """Has the C library keep what a search frees, for the next one.

    FAISS takes tens of MB for some hundred queries. glibc hands so much back to the system at once,
    which clears each page again for the next search: an eighth to a fifth of its time.
    """
    with contextlib.suppress(AttributeError):  # another C library
        for what in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            ctypes.CDLL(None).mallopt(what, KEPT)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Has FAISS use this thread alone: its others would wait for more work, on cores of theirs."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
