"""Building an index: train on a sample, add in chunks, choose nprobe, measure recall."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import faiss
import numpy as np
from msgspec.structs import replace
from tqdm import tqdm

from fairseq_knnlm.background import ahead
from fairseq_knnlm.errors import DatastoreError, IndexFileError
from fairseq_knnlm.files import check_mapped
from fairseq_knnlm.index.recall import Exam
from fairseq_knnlm.index.recipes import RECALL, Recipe
from fairseq_knnlm.index.snapshots import Snapshots
from fairseq_knnlm.index.stored import (
    METRICS,
    RECIPES,
    IndexCard,
    SearchIndex,
    has_lists,
    is_exact,
)
from fairseq_knnlm.index.trial import reason

logger = logging.getLogger(__name__)

#: Bytes of float32 keys that are in memory at a time while an index is filled.
CHUNK_BYTES = 64 * 2**20
#: The paper's nprobe, for lists that are not examined.
UNEXAMINED_NPROBE = 32


@dataclass(frozen=True)
class Wishes:
    """What is asked of an index beside its recipe.

    Attributes:
        metric: ``"l2"`` or ``"ip"``.
        nprobe: lists visited a query; None for the recipe's, or as many as ``recall`` needs.
        recall: share of the true neighbours that the visited lists should hold.
        train_rows: size of the training sample; None for the recipe's.
        queries: sampled keys to examine the index with; 0 for no examination.
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
        wishes: what else is asked of it.

    Raises:
        IndexFileError: where FAISS refuses the recipe.
    """

    def __init__(self, recipe: Recipe, width: int, rows: int, wishes: Wishes) -> None:
        self.recipe = recipe
        self.width = width
        self.rows = rows
        self.wishes = wishes
        self.exam: Exam | None = None
        with _refusals(f"FAISS cannot make the index {recipe.factory!r} for keys of width {width}"):
            self.index = faiss.index_factory(width, recipe.factory, METRICS[wishes.metric])
        exam = 0 if is_exact(self.index) else wishes.queries
        training = 0 if self.index.is_trained else wishes.train_rows or recipe.train_rows
        #: Keys to train and examine with.
        self.sample_rows = min(max(exam, training), rows)

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
        """Trains the index, unless it is trained, and sets the exam.

        Args:
            sample: (n, D) float32, keys drawn evenly from all.
            rows: (n,) int64, which ones.
        """
        _check_finite(sample)
        if not self.index.is_trained:
            factory = self.recipe.factory
            logger.info(
                "training %s on %s of %s keys",
                factory,
                *(f"{number:,}" for number in (len(sample), self.rows)),
            )
            with _refusals(f"FAISS cannot train {factory!r} on {len(sample):,} keys"):
                self.index.train(sample)
        k = min(self.wishes.k, self.rows - 1)
        asked = min(self.wishes.queries, len(sample))
        if asked and k > 0 and not is_exact(self.index):
            drawn = np.random.default_rng(self.wishes.seed).choice(len(sample), asked, False)
            self.exam = Exam(sample[drawn], rows[drawn], k, self.wishes.metric)

    def see(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """Shows the exam keys (n, D) float32, which are rows (n,) of the datastore."""
        if self.exam is not None:
            self.exam.see(keys, rows)

    def add(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """Adds keys (n, D) float32, which are rows (n,) of the datastore."""
        _check_finite(keys)
        with _refusals(f"FAISS cannot add keys to {self.recipe.factory!r}"):
            if len(rows) and rows[0] == self.index.ntotal and (np.diff(rows) == 1).all():
                self.index.add(keys)
            else:
                self.index.add_with_ids(keys, rows)

    def finish(self) -> tuple[Any, IndexCard]:
        """The FAISS index and its card, examined."""
        assert self.index.ntotal == self.rows, (self.index.ntotal, self.rows)
        card = IndexCard(
            factory=self.recipe.factory,
            metric=self.wishes.metric,
            rows=self.rows,
            width=self.width,
            nprobe=0,
            exact=is_exact(self.index),
            threads=faiss.omp_get_max_threads(),
            faiss=faiss.__version__,
        )
        if has_lists(self.index):
            card = self._with_nprobe(card)
        if self.exam is not None:
            recall = self.exam.recall(SearchIndex(self.index, card))
            card = replace(card, recall=recall, recall_at=self.exam.k)
        elif card.exact:
            card = replace(card, recall=1.0, recall_at=min(self.wishes.k, self.rows))
        return self.index, card

    def _with_nprobe(self, card: IndexCard) -> IndexCard:
        lists = faiss.extract_index_ivf(self.index).nlist
        nprobe = self.wishes.nprobe or self.recipe.nprobe
        if self.exam is None:
            return replace(card, nprobe=min(nprobe or UNEXAMINED_NPROBE, lists))
        coverage = self.exam.coverage(self.index)
        # The last list completes the share, whatever rounding makes of it.
        enough = min(int(np.searchsorted(coverage, self.wishes.recall)) + 1, lists)
        nprobe = min(nprobe or enough, lists)
        return replace(card, nprobe=nprobe, coverage=float(coverage[nprobe - 1]))


def build(
    keys: np.ndarray,
    recipe: Recipe,
    wishes: Wishes,
    *,
    snapshots: Snapshots | None = None,
    progress: bool = True,
) -> tuple[Any, IndexCard]:
    """Trains and fills an index with a datastore's keys.

    Args:
        keys: (N, D) float16 or float32, possibly memory-mapped; read in chunks of 64 MiB.
        recipe: which index.
        wishes: what else is asked of it.
        snapshots: from which a build that was stopped goes on; None for none.
        progress: show a bar.

    Returns:
        The FAISS index and its card.

    Raises:
        IndexFileError: where FAISS refuses the recipe.
    """
    rows, width = keys.shape
    builder = IndexBuilder(recipe, width, rows, wishes)
    snapshot = snapshots.latest() if snapshots else None
    done = 0
    if snapshot is not None:
        builder.index, done = snapshot
        logger.info("going on from key %d of %d", done, rows)
    rng = np.random.default_rng(wishes.seed)
    drawn = np.sort(rng.choice(rows, builder.sample_rows, replace=False))
    check_mapped(keys, "keys")
    builder.train(np.ascontiguousarray(keys[drawn], dtype=np.float32), drawn)
    for chunk, at in ahead(_chunks(keys, progress)):
        builder.see(chunk, at)
        fresh = at >= done
        if fresh.any():
            builder.add(chunk[fresh], at[fresh])
            if snapshots:
                snapshots.take(builder.index, builder.index.ntotal)
    return builder.finish()


def _check_finite(keys: np.ndarray) -> None:
    if not np.isfinite(keys).all():
        raise DatastoreError(
            "there are keys that are no numbers",
            expected="finite numbers",
            found="NaN or infinity",
            do="check the datastore with `fairseq-knnlm verify`, and save it again",
        )


def plan(recipe: Recipe, wishes: Wishes, fingerprint: str) -> dict[str, Any]:
    """What a snapshot must agree with: all that decides which index is built."""
    return {
        "recipe": asdict(recipe),
        "wishes": asdict(wishes),
        "datastore": fingerprint,
        "faiss": faiss.__version__,
    }


def _chunks(keys: np.ndarray, progress: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The keys in float32, a chunk at a time, and their rows, with a bar."""
    step = max(1, CHUNK_BYTES // (keys.shape[1] * 4))
    bar = tqdm(total=len(keys), unit=" keys", unit_scale=True, desc="adding", disable=not progress)
    with bar:
        for start in range(0, len(keys), step):
            check_mapped(keys, "keys")
            chunk = np.ascontiguousarray(keys[start : start + step], dtype=np.float32)
            yield chunk, np.arange(start, start + len(chunk))
            bar.update(len(chunk))


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
