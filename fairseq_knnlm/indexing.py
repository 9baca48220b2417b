"""Building an index: train on a sample, add in chunks, choose nprobe, measure recall."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import faiss
import numpy as np
from tqdm import tqdm

from fairseq_knnlm.errors import IndexFileError
from fairseq_knnlm.index import METRICS, IndexCard, SearchIndex, first_line, has_lists, is_exact
from fairseq_knnlm.recipes import Recipe, choose

logger = logging.getLogger(__name__)
logging.getLogger("faiss.contrib.exhaustive_search").setLevel(logging.WARNING)

#: Bytes of float32 keys that are in memory at a time while an index is filled.
CHUNK_BYTES = 64 * 2**20
#: Doubling nprobe goes on while it finds at least this share of the true neighbours more.
WORTHWHILE = 0.01


def build(
    keys: np.ndarray,
    recipe_name: str,
    *,
    metric: str = "l2",
    nprobe: int | None = None,
    train_rows: int | None = None,
    recall_queries: int = 100,
    recall_at: int = 1024,
    seed: int = 0,
    gpu: bool = False,
    progress: bool = True,
) -> tuple[Any, IndexCard]:
    """Trains and fills an index.

    Args:
        keys: (N, D) float16 or float32, possibly memory-mapped; read in chunks of 64 MiB.
        recipe_name: ``auto``, ``paper`` or a FAISS factory string.
        metric: ``"l2"`` or ``"ip"``.
        nprobe: lists visited a query, where not the recipe's.
        train_rows: size of the training sample, where not the recipe's.
        recall_queries: sampled keys on which recall is measured; 0 skips that.
        recall_at: neighbours in that measurement.
        seed: of the samples.
        gpu: choose a recipe that a GPU can search.
        progress: show bars.

    Returns:
        The FAISS index and its card.

    Raises:
        IndexFileError: where FAISS refuses the recipe.
    """
    rows, width = keys.shape
    started = time.perf_counter()
    recipe = choose(recipe_name, rows, width, gpu=gpu)
    index = _create(recipe, width, metric)
    rng = np.random.default_rng(seed)
    if not index.is_trained:
        _train(index, keys, train_rows or recipe.train_rows, recipe, rng)
    for chunk in _chunks(keys, "adding", progress):
        with _refusals(f"FAISS cannot add keys to {recipe.factory!r}"):
            index.add(chunk)
    card = IndexCard(
        factory=recipe.factory,
        metric=metric,
        rows=rows,
        width=width,
        nprobe=0,
        exact=is_exact(index),
        faiss=faiss.__version__,
    )
    recall_at = min(recall_at, rows - 1)
    queries = 0 if recall_at < 1 else min(recall_queries, rows)
    exam = None
    if queries and not card.exact:
        exam = Exam(keys, queries, recall_at, metric, rng, progress=progress)
    if has_lists(index):
        lists = faiss.extract_index_ivf(index).nlist
        chosen = nprobe or recipe.nprobe or (choose_nprobe(index, card, exam, lists) if exam else 0)
        card = replace(card, nprobe=min(chosen or 32, lists))
    if queries:
        recall = exam.recall(SearchIndex(index, card)) if exam else 1.0
        card = replace(card, recall=recall, recall_at=recall_at)
    return index, replace(card, seconds=time.perf_counter() - started)


def _create(recipe: Recipe, width: int, metric: str) -> Any:
    with _refusals(f"FAISS cannot make the index {recipe.factory!r} for keys of width {width}"):
        return faiss.index_factory(width, recipe.factory, METRICS[metric])


def _train(
    index: Any, keys: np.ndarray, wanted: int, recipe: Recipe, rng: np.random.Generator
) -> None:
    rows = len(keys)
    sample = np.sort(rng.choice(rows, size=min(wanted, rows), replace=False))
    logger.info("training %s on %s of %s keys", recipe.factory, f"{len(sample):,}", f"{rows:,}")
    with _refusals(f"FAISS cannot train {recipe.factory!r} on {len(sample):,} keys"):
        index.train(np.ascontiguousarray(keys[sample], dtype=np.float32))


@contextmanager
def _refusals(problem: str) -> Iterator[None]:
    """Turns what FAISS throws at a recipe into an ``IndexFileError``."""
    try:
        yield
    except (RuntimeError, TypeError, AssertionError) as error:
        raise IndexFileError(
            problem,
            expected="auto, paper, or a factory string such as Flat or IVF1024,PQ32x4fs; code "
            "sizes divide the width, and there are more keys than centroids",
            found=first_line(error),
            do="build with --recipe auto, or see FAISS's index factory",
        ) from None


def _chunks(keys: np.ndarray, what: str, progress: bool) -> Iterator[np.ndarray]:
    """The keys in float32, a chunk at a time, with a bar that says ``what`` is done to them."""
    step = max(1, CHUNK_BYTES // (keys.shape[1] * 4))
    with tqdm(
        total=len(keys), unit=" keys", unit_scale=True, desc=what, disable=not progress
    ) as bar:
        for start in range(0, len(keys), step):
            chunk = np.ascontiguousarray(keys[start : start + step], dtype=np.float32)
            yield chunk
            bar.update(len(chunk))


class Exam:
    """Sampled keys with their true nearest neighbours, to examine an index with.

    A key is its own nearest neighbour, so one more is asked for and the key itself left out.

    Args:
        keys: (N, D), read once in chunks.
        queries: how many to sample.
        k: true neighbours of each.
        metric: ``"l2"`` or ``"ip"``.
        rng: draws the sample.
        progress: show a bar.
    """

    def __init__(
        self,
        keys: np.ndarray,
        queries: int,
        k: int,
        metric: str,
        rng: np.random.Generator,
        *,
        progress: bool = False,
    ) -> None:
        from faiss.contrib.exhaustive_search import knn_ground_truth

        self.k = k
        self._rows = np.sort(rng.choice(len(keys), size=queries, replace=False))
        self._queries = np.ascontiguousarray(keys[self._rows], dtype=np.float32)
        _, true = knn_ground_truth(
            self._queries,
            _chunks(keys, "measuring recall", progress),
            k + 1,
            metric_type=METRICS[metric],
        )
        self._true = [set(ids.tolist()) for ids in true]

    def recall(self, searcher: SearchIndex) -> float:
        """Share of the true k nearest that the index finds."""
        _, found = searcher.index.search(self._queries, self.k + 1)
        shares = [
            len((true & set(ids.tolist())) - {row}) / len(true - {row})
            for row, true, ids in zip(self._rows.tolist(), self._true, found, strict=True)
        ]
        return float(np.mean(shares))


def choose_nprobe(index: Any, card: IndexCard, exam: Exam, lists: int) -> int:
    """The lists to visit: doubled for as long as that is worthwhile.

    Args:
        index: a FAISS index with inverted lists.
        card: what it is.
        exam: what to measure recall with.
        lists: how many it has.
    """
    nprobe, recall = 1, 0.0
    while True:
        found = exam.recall(SearchIndex(index, replace(card, nprobe=nprobe)))
        if nprobe > 1 and found - recall < WORTHWHILE:
            return nprobe // 2
        if 2 * nprobe > lists:
            return nprobe
        nprobe, recall = 2 * nprobe, found
