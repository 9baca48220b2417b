"""Building an index: train on a sample, add in chunks, choose nprobe, measure recall."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from msgspec.structs import replace
from tqdm import tqdm

from fairseq_knnlm.background import ahead
from fairseq_knnlm.datastore import Rows, check_finite
from fairseq_knnlm.errors import IndexFileError
from fairseq_knnlm.files import check_mapped
from fairseq_knnlm.index.card import IndexCard
from fairseq_knnlm.index.library import METRICS, faiss, has_lists, is_exact
from fairseq_knnlm.index.recall import TrueNeighbours
from fairseq_knnlm.index.recipes import RECALL, Recipe
from fairseq_knnlm.index.search import SearchIndex
from fairseq_knnlm.index.snapshots import Snapshots
from fairseq_knnlm.index.specification import RECIPES
from fairseq_knnlm.index.trial import reason

logger = logging.getLogger(__name__)

#: Bytes of float32 keys that are in memory at a time while an index is filled.
CHUNK_BYTES = 64 * 2**20
#: The paper's nprobe, for lists of which nothing is measured.
UNMEASURED_NPROBE = 32


@dataclass(frozen=True)
class BuildOptions:
    """What is asked of an index beside its recipe.

    Attributes:
        metric: ``"l2"`` or ``"ip"``.
        nprobe: lists visited a query; None for the recipe's, or as many as ``recall`` needs.
        recall: share of the true neighbours that the visited lists should hold.
        train_rows: size of the training sample; None for the recipe's.
        queries: sampled keys that recall is measured with; 0 to measure none.
        k: neighbours of each that are looked for.
        seed: of the samples.
    """

    metric: str = "l2"
    nprobe: int | None = None
    recall: float = RECALL
    train_rows: int | None = None
    queries: int = 100
    k: int = 1024
    seed: int = 0


class IndexBuilder:
    """An index in the making.

    Args:
        recipe: which index.
        width: dimensions of a key, D.
        rows: keys that will be added, N.
        options: what else is asked of it.

    Raises:
        IndexFileError: where FAISS refuses the recipe.
    """

    def __init__(self, recipe: Recipe, width: int, rows: int, options: BuildOptions) -> None:
        self.recipe = recipe
        self.width = width
        self.rows = rows
        self.options = options
        self.truth: TrueNeighbours | None = None
        with _refusals(f"FAISS cannot make the index {recipe.factory!r} for keys of width {width}"):
            self.index = faiss.index_factory(width, recipe.factory, METRICS[options.metric])
        measured = 0 if is_exact(self.index) else options.queries
        training = 0 if self.index.is_trained else options.train_rows or recipe.train_rows
        #: Keys to train with and to measure recall with.
        self.sample_rows = min(max(measured, training), rows)

    def check_any_order(self) -> None:
        """Refuses an index that must be given its rows in order and cannot be streamed into.

        Raises:
            IndexFileError: saying so.
        """
        index = faiss.downcast_index(self.index)
        if isinstance(index, faiss.IndexPreTransform):
            index = faiss.downcast_index(index.index)
        if not isinstance(index, faiss.IndexIVF):
            raise IndexFileError(
                f"keys cannot be streamed into {self.recipe.factory!r}",
                expected="an index with inverted lists and no refinement",
                found=self.recipe.factory,
                do="leave --recipe out, or save the keys and build the index from them",
            )

    def train(self, sample: np.ndarray, rows: np.ndarray) -> None:
        """Trains the index, unless it is trained, and draws the keys to measure recall with.

        Args:
            sample: (n, D) float32, keys drawn evenly from all.
            rows: (n,) int64, which ones.
        """
        check_finite(sample)
        if not self.index.is_trained:
            factory = self.recipe.factory
            logger.info(
                "training %s on %s of %s keys",
                factory,
                *(f"{number:,}" for number in (len(sample), self.rows)),
            )
            with _refusals(f"FAISS cannot train {factory!r} on {len(sample):,} keys"):
                self.index.train(sample)
        k = min(self.options.k, self.rows - 1)
        asked = min(self.options.queries, len(sample))
        if asked and k > 0 and not is_exact(self.index):
            drawn = np.random.default_rng(self.options.seed).choice(len(sample), asked, False)
            self.truth = TrueNeighbours(sample[drawn], rows[drawn], k, self.options.metric)

    def see(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """Looks for true neighbours among keys (n, D) float32, rows (n,) of the datastore."""
        if self.truth is not None:
            self.truth.see(keys, rows)

    def add(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """Adds keys (n, D) float32, which are rows (n,) of the datastore."""
        check_finite(keys)
        with _refusals(f"FAISS cannot add keys to {self.recipe.factory!r}"):
            if len(rows) and rows[0] == self.index.ntotal and (np.diff(rows) == 1).all():
                self.index.add(keys)
            else:
                self.index.add_with_ids(keys, rows)

    def finish(self) -> tuple[Any, IndexCard]:
        """The FAISS index and its card, with what was measured.

        Where nothing is to be measured, the index may be empty: its entries lie elsewhere.
        """
        there = self.index.ntotal
        assert there == self.rows or not (there or self.truth), (there, self.rows)
        card = IndexCard(
            factory=self.recipe.factory,
            metric=self.options.metric,
            rows=self.rows,
            width=self.width,
            nprobe=0,
            exact=is_exact(self.index),
            threads=faiss.omp_get_max_threads(),
            faiss=faiss.__version__,
        )
        if has_lists(self.index):
            card = self._with_nprobe(card)
        if self.truth is not None:
            recall = self.truth.recall(SearchIndex(self.index, card))
            card = replace(card, recall=recall, recall_at=self.truth.k)
        elif card.exact:
            card = replace(card, recall=1.0, recall_at=min(self.options.k, self.rows))
        return self.index, card

    def _with_nprobe(self, card: IndexCard) -> IndexCard:
        lists = faiss.extract_index_ivf(self.index).nlist
        nprobe = self.options.nprobe or self.recipe.nprobe
        if self.truth is None:
            return replace(card, nprobe=min(nprobe or UNMEASURED_NPROBE, lists))
        coverage = self.truth.coverage(self.index)
        # The last list completes the share, whatever rounding makes of it.
        enough = min(int(np.searchsorted(coverage, self.options.recall)) + 1, lists)
        nprobe = min(nprobe or enough, lists)
        return replace(card, nprobe=nprobe, coverage=float(coverage[nprobe - 1]))


def build(
    keys: Rows,
    recipe: Recipe,
    options: BuildOptions,
    *,
    snapshots: Snapshots | None = None,
    progress: bool = True,
) -> tuple[Any, IndexCard]:
    """Trains and fills an index with a datastore's keys.

    Args:
        keys: (N, D) float16 or float32, possibly memory-mapped; read in chunks of 64 MiB.
        recipe: which index.
        options: what else is asked of it.
        snapshots: from which a build that was stopped goes on; None for none.
        progress: show a bar.

    Returns:
        The FAISS index and its card.

    Raises:
        IndexFileError: where FAISS refuses the recipe.
    """
    rows, width = keys.shape
    builder = IndexBuilder(recipe, width, rows, options)
    snapshot = snapshots.latest() if snapshots else None
    done = 0
    if snapshot is not None:
        builder.index, done = snapshot
        logger.info("going on from key %d of %d", done, rows)
    train_on(builder, keys)
    bar = tqdm(total=rows, unit=" keys", unit_scale=True, desc="adding", disable=not progress)
    with bar:
        for chunk, at in ahead(chunks(keys)):
            builder.see(chunk, at)
            fresh = at >= done
            if fresh.any():
                builder.add(chunk[fresh], at[fresh])
                if snapshots:
                    snapshots.take(builder.index, builder.index.ntotal)
            bar.update(len(chunk))
    return builder.finish()


def train_on(builder: IndexBuilder, keys: Rows) -> None:
    """Trains on a sample of a datastore's keys (N, D), the same whenever it is drawn."""
    rng = np.random.default_rng(builder.options.seed)
    drawn = np.sort(rng.choice(builder.rows, builder.sample_rows, replace=False))
    check_mapped(keys, "keys")
    builder.train(np.ascontiguousarray(keys[drawn], dtype=np.float32), drawn)


def plan(recipe: Recipe, options: BuildOptions, fingerprint: str) -> dict[str, Any]:
    """What a snapshot must agree with: all that decides which index is built."""
    return {
        "recipe": asdict(recipe),
        "options": asdict(options),
        "datastore": fingerprint,
        "faiss": faiss.__version__,
    }


def chunks(keys: Rows) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Keys (n, D) in float32, ``CHUNK_BYTES`` of them at a time, and their rows (n,) int64."""
    step = max(1, CHUNK_BYTES // (keys.shape[1] * 4))
    for start in range(0, len(keys), step):
        check_mapped(keys, "keys")
        chunk = np.ascontiguousarray(keys[start : start + step], dtype=np.float32)
        yield chunk, np.arange(start, start + len(chunk))


@contextmanager
def _refusals(problem: str) -> Iterator[None]:
    """Turns what FAISS throws at a recipe into an ``IndexFileError``."""
    try:
        yield
    except (RuntimeError, TypeError, AssertionError) as error:
        raise IndexFileError(
            problem,
            expected=RECIPES,
            found=reason(error),
            do="build with --recipe auto, or see FAISS's index factory",
        ) from None
