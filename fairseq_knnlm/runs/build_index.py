"""Builds the index of a datastore: chooses a recipe, fills it, writes it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from fairseq_knnlm.bounds import check_range
from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.files import Claim, check_outputs
from fairseq_knnlm.index import stored as indexes
from fairseq_knnlm.index.build import Wishes, build, plan
from fairseq_knnlm.index.recipes import RECALL, Recipe, choose, lists_of
from fairseq_knnlm.index.snapshots import Snapshots
from fairseq_knnlm.index.stored import IndexCard
from fairseq_knnlm.runs.places import OF_INDEX, check_apart

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class IndexOptions:
    """Which index to build.

    Attributes:
        recipe: ``auto``, ``paper`` or a FAISS factory string.
        metric: ``"l2"`` or ``"ip"``.
        max_bytes: of the index for each key that ``auto`` may spend; None for its own choice.
        recall: share of the true neighbours that the lists visited should hold.
        nprobe: the number of lists itself; None to let ``recall`` decide.
        train_rows: keys in the training sample; None for the recipe's.
        queries: sampled keys that recall is measured on; 0 for none.
        device: where it will be searched: ``auto``, ``cpu``, ``cuda`` or ``cuda:i,j``.
        seed: of the samples.
    """

    recipe: str = "auto"
    metric: str = "l2"
    max_bytes: int | None = None
    recall: float = RECALL
    nprobe: int | None = None
    train_rows: int | None = None
    queries: int = 100
    device: str = "auto"
    seed: int = 0


def build_index(store: Datastore, path: Path, options: IndexOptions) -> IndexCard:
    """Builds an index, measures its recall, and writes it.

    Args:
        store: with keys.
        path: the file; what a link leads to is replaced, not the link.
        options: which index.

    Returns:
        What was built.

    Raises:
        ConfigError: where ``nprobe`` exceeds the lists.
        DatastoreError: where the datastore has no keys, or some are no numbers.
        IndexFileError: where FAISS refuses the recipe, or it does not fit the datastore.
        OutputError: where the file cannot be written, is part of something else, or another
            process is writing it.
    """
    check_outputs({"--indexfile": path})
    check_apart({"--indexfile": path}, {}, allowed=OF_INDEX)
    path = path.resolve() if path.is_symlink() else path
    with Claim(path):
        return _build(store, path, options)


def _build(store: Datastore, path: Path, options: IndexOptions) -> IndexCard:
    keys = store.full_keys()
    recipe = _recipe(store, options)
    wishes = Wishes(
        metric=options.metric,
        nprobe=options.nprobe,
        recall=options.recall,
        train_rows=options.train_rows,
        queries=options.queries,
        seed=options.seed,
    )
    snapshots = Snapshots(
        path.with_name(f".{path.name}.building"), plan(recipe, wishes, store.fingerprint)
    )
    index, card = build(keys, recipe, wishes, snapshots=snapshots)
    if options.nprobe is not None and not card.nprobe:
        logger.warning("--probe does nothing: %s has no inverted lists", card.factory)
    card = indexes.save(index, card, path, store.fingerprint)
    snapshots.clear()
    return card


def _recipe(store: Datastore, options: IndexOptions) -> Recipe:
    width = store.manifest.width
    recipe = choose(
        options.recipe,
        len(store),
        width,
        metric=options.metric,
        gpu=indexes.wants_gpu(options.device),
        max_bytes=options.max_bytes,
    )
    if lists := lists_of(recipe.factory):
        check_range("--probe", options.nprobe, 1, lists, f"exceeds the lists of {recipe.factory}")
    indexes.check_factory(recipe.factory, width, options.metric)
    return recipe
