"""Builds the index of a datastore: chooses a recipe, fills it, writes it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fairseq_knnlm.bounds import check_range
from fairseq_knnlm.datastore import Datastore, Rows, open_datastore
from fairseq_knnlm.errors import IndexFileError
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


@dataclass(frozen=True)
class Pieces:
    """The pieces of an index that is trained, to be written by whoever likes.

    Attributes:
        path: the datastore.
        folder: where what was trained lies.
        plan: what is being built.
        count: blocks, each of which gets a piece.
    """

    path: Path
    folder: Path
    plan: dict[str, Any]
    count: int

    def write(self, number: int) -> None:
        """Writes the piece of one block, unless it is there.

        Raises:
            KnnlmError: where the datastore or what was trained is another by now.
        """
        trained = Snapshots(self.folder, self.plan).latest()
        if trained is None:
            raise IndexFileError(
                f"what was trained of {self.path} is not there any more",
                expected=f"a snapshot in {self.folder}",
                found="none, or one of another build",
                do="build the index again",
            )
        store = open_datastore(self.path)
        write_pieces(trained[0], [store.blocks[number]], progress=False)


#: Has others write pieces.
Spread = Callable[[Pieces], object]


def build_index(
    store: Datastore,
    path: Path,
    options: BuildOptions,
    *,
    recipe: str = "auto",
    max_bytes: int | None = None,
    device: str = "auto",
    spread: Spread | None = None,
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
        spread: has others write pieces; None where this process writes them all.

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
        if not inside:
            return _built_whole(store, keys, path, chosen, options)
        return _built_inside(store, path, chosen, options, spread)


def _check_recipe(recipe: Recipe, width: int, options: BuildOptions) -> None:
    """Refuses what FAISS would, or crash on, before keys are read."""
    if lists := lists_of(recipe.factory):
        check_range("--probe", options.nprobe, 1, lists, f"exceeds the lists of {recipe.factory}")
    check_factory(recipe.factory, width, options.metric)


def _built_whole(
    store: Datastore, keys: Rows, path: Path, recipe: Recipe, options: BuildOptions
) -> IndexCard:
    """One file with all entries."""
    snapshots = Snapshots(_building(path), plan(recipe, options, store.fingerprint))
    index, card = build(keys, recipe, options, snapshots=snapshots)
    card = _saved(store, index, card, path, options)
    snapshots.clear()
    return card


def _built_inside(
    store: Datastore, path: Path, recipe: Recipe, options: BuildOptions, spread: Spread | None
) -> IndexCard:
    """The datastore's own index, whose entries lie in its blocks where that can be."""
    if not goes_in_pieces(store, recipe, options.metric):
        _check_alone(store, spread)
        card = _built_whole(store, store.full_keys(), path, recipe, options)
        remove_pieces(store.blocks)  # of the index that was there before
        return card
    what = {**plan(recipe, options, store.fingerprint), "pieces": True}
    snapshots = Snapshots(_building(path), what)
    pieces = Pieces(store.path.resolve(), snapshots.folder.resolve(), what, len(store.blocks))
    others = partial(spread, pieces) if spread is not None else None
    index, card = build_in_blocks(store, recipe, options, snapshots, spread=others)
    card = _saved(store, index, card, path, options)
    remove_pieces(store.blocks, but=training_of(index))
    snapshots.clear()
    return card


def _check_alone(store: Datastore, spread: Spread | None) -> None:
    if spread is not None:
        raise IndexFileError(
            f"the index of {store.path} cannot be shared out",
            expected="a datastore of several blocks, and a recipe of codes or inverted lists",
            found="an index in one file",
            do="build it with `fairseq-knnlm build-index`",
        )


def _building(path: Path) -> Path:
    return path.with_name(f".{path.name}.building")


def _saved(
    store: Datastore, index: Any, card: IndexCard, path: Path, options: BuildOptions
) -> IndexCard:
    if options.nprobe is not None and not card.nprobe:
        logger.warning("--probe does nothing: %s has no inverted lists", card.factory)
    return save(index, card, path, store.fingerprint)


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
