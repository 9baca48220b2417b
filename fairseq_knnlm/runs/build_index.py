"""Builds the index of a datastore: chooses a recipe, fills it, writes it."""

from __future__ import annotations

import logging
from pathlib import Path

from fairseq_knnlm.bounds import check_range
from fairseq_knnlm.datastore import Datastore, Rows
from fairseq_knnlm.files import Claim, check_outputs
from fairseq_knnlm.index.build import BuildOptions, build, plan
from fairseq_knnlm.index.card import IndexCard
from fairseq_knnlm.index.device import wants_gpu
from fairseq_knnlm.index.in_blocks import build_in_blocks, goes_in_pieces, write_pieces
from fairseq_knnlm.index.pieces import remove_pieces, training_of
from fairseq_knnlm.index.recipes import Recipe, choose, lists_of
from fairseq_knnlm.index.snapshots import Snapshots
from fairseq_knnlm.index.specification import check_factory
from fairseq_knnlm.index.storage import save
from fairseq_knnlm.index.trained import read_trained
from fairseq_knnlm.runs.places import OF_INDEX, check_apart

logger = logging.getLogger(__name__)


def build_index(
    store: Datastore,
    path: Path,
    options: BuildOptions,
    *,
    recipe: str = "auto",
    max_bytes: int | None = None,
    device: str = "auto",
) -> IndexCard:
    """Builds an index, measures its recall, and writes it.

    Args:
        store: with keys.
        path: the file; what a link leads to is replaced, not the link. Where it is the datastore's
            own, and that is in blocks, it holds what is trained alone, if the recipe allows: the
            entries lie in pieces, one in the folder of each block.
        options: what is asked of the index.
        recipe: ``auto``, ``paper`` or a FAISS factory string.
        max_bytes: of the index for each key that ``auto`` may spend; None for its own choice.
        device: where it will be searched: ``auto``, ``cpu``, ``cuda`` or ``cuda:i,j``.

    Returns:
        What was built.

    Raises:
        ConfigError: where ``options.nprobe`` exceeds the lists.
        DatastoreError: where the datastore has no keys, or some are no numbers.
        IndexFileError: where FAISS refuses the recipe, or it does not fit the datastore.
        OutputError: where the file cannot be written, is part of something else, or another
            process is writing it.
    """
    check_outputs({"--indexfile": path})
    check_apart({"--indexfile": path}, {}, allowed=OF_INDEX)
    own = store.index_path
    inside = path.parent.resolve() / path.name == own.parent.resolve() / own.name
    path = path.resolve() if path.is_symlink() else path
    with Claim(path):
        keys, width = store.full_keys(), store.manifest.width
        chosen = choose(
            recipe,
            len(store),
            width,
            metric=options.metric,
            gpu=wants_gpu(device),
            max_bytes=max_bytes,
        )
        _check_recipe(chosen, width, options)
        return _built(store, keys, path, chosen, options, inside)


def _check_recipe(recipe: Recipe, width: int, options: BuildOptions) -> None:
    """Refuses what FAISS would, or crash on, before keys are read."""
    if lists := lists_of(recipe.factory):
        check_range("--probe", options.nprobe, 1, lists, f"exceeds the lists of {recipe.factory}")
    check_factory(recipe.factory, width, options.metric)


def _built(
    store: Datastore, keys: Rows, path: Path, recipe: Recipe, options: BuildOptions, inside: bool
) -> IndexCard:
    folder = path.with_name(f".{path.name}.building")
    what = plan(recipe, options, store.fingerprint)
    if inside and goes_in_pieces(store, recipe, options.metric):
        snapshots = Snapshots(folder, {**what, "pieces": True})
        index, card = build_in_blocks(store, recipe, options, snapshots)
        training: str | None = training_of(index)
    else:
        snapshots = Snapshots(folder, what)
        index, card = build(keys, recipe, options, snapshots=snapshots)
        training = None
    if options.nprobe is not None and not card.nprobe:
        logger.warning("--probe does nothing: %s has no inverted lists", card.factory)
    card = save(index, card, path, store.fingerprint)
    if inside:
        remove_pieces(store.blocks, but=training)  # of the index that was there before
    snapshots.clear()
    return card


def extend_index(store: Datastore) -> int:
    """Writes the pieces that blocks lack, of the index that the datastore has.

    So an index goes on to hold all entries when blocks were added, without being trained again.
    Nothing is done where the index is in one file, or there is none.

    Args:
        store: in blocks, with keys.

    Returns:
        How many pieces were written.

    Raises:
        DatastoreError: where the datastore has no keys.
        IndexFileError: where the index is damaged.
        BusyError: where another process is building it, or writing a piece.
        OSError: where a piece cannot be written.
    """
    path = store.index_path
    if not store.blocks or not path.exists():
        return 0
    with Claim(path.resolve()):
        index = read_trained(path)
        if index is None:
            return 0
        store.full_keys()
        return write_pieces(index, store.blocks)
