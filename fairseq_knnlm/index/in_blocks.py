"""Building the index of a datastore in blocks: trained once, then a piece for each block.

What is there already is not made again: neither what was trained, which is kept in a hidden place
until the index is published, nor pieces of the same training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from msgspec.structs import replace
from tqdm import tqdm

from fairseq_knnlm.background import ahead
from fairseq_knnlm.datastore import Block, Datastore, Rows, check_finite, open_datastore
from fairseq_knnlm.errors import DatastoreError, IndexFileError
from fairseq_knnlm.files import tidy
from fairseq_knnlm.index.build import BuildOptions, IndexBuilder, chunks, train_on
from fairseq_knnlm.index.card import IndexCard
from fairseq_knnlm.index.codes import assemble, can_be_cut, encode
from fairseq_knnlm.index.library import faiss
from fairseq_knnlm.index.pieces import open_piece, piece_path, pieces_of, training_of, write_piece
from fairseq_knnlm.index.recipes import Recipe
from fairseq_knnlm.index.snapshots import Snapshots

logger = logging.getLogger(__name__)

#: Takes keys (n, D) float32 and their rows (n,) in the datastore.
See = Callable[[np.ndarray, np.ndarray], None]


def goes_in_pieces(store: Datastore, recipe: Recipe, metric: str) -> bool:
    """Whether the index of this recipe lies in pieces, in the blocks of this datastore."""
    if not store.blocks:
        return False
    options = BuildOptions(metric=metric)
    return can_be_cut(IndexBuilder(recipe, store.manifest.width, len(store), options).index)


def build_in_blocks(
    store: Datastore,
    recipe: Recipe,
    options: BuildOptions,
    snapshots: Snapshots,
    *,
    spread: Callable[[], object] | None = None,
    progress: bool = True,
) -> tuple[Any, IndexCard]:
    """Trains an index and writes its pieces.

    Args:
        store: in blocks, with keys.
        recipe: which index; ``goes_in_pieces``.
        options: what else is asked of it.
        snapshots: where what was trained is kept, for a build that goes on.
        spread: has others write pieces with what was trained; those that they leave are written
            here.
        progress: show a bar.

    Returns:
        The trained, empty index and its card.

    Raises:
        DatastoreError: where keys are damaged, or no numbers.
        IndexFileError: where FAISS refuses the recipe.
        BusyError: where another process is writing a piece.
        OSError: where a piece cannot be written.
    """
    builder = IndexBuilder(recipe, store.manifest.width, len(store), options)
    if (snapshot := snapshots.latest()) is not None:
        builder.index, _ = snapshot
        logger.info("going on from an index that is trained")
    train_on(builder, store.full_keys())
    if snapshot is None:
        snapshots.take(builder.index, 0, now=True)
    if spread is not None:
        spread()
    training, width = training_of(builder.index), builder.index.sa_code_size()
    empty = faiss.deserialize_index(faiss.serialize_index(builder.index))
    write_pieces(builder.index, store.blocks, builder.see if builder.truth else None, progress)
    if builder.truth is not None:
        assemble(builder.index, pieces_of(store.blocks, training, width))
    _, card = builder.finish()
    return empty, replace(card, piece_bytes=width)


def write_pieces(
    index: Any, blocks: Sequence[Block], see: See | None = None, progress: bool = True
) -> int:
    """Writes the pieces that are missing or damaged.

    Args:
        index: trained and empty.
        blocks: of the datastore, with keys.
        see: shown all keys that were not forgotten; None where nobody asks.
        progress: show a bar.

    Returns:
        How many were written.

    Raises:
        DatastoreError, BusyError, OSError: as ``build_in_blocks`` does.
    """
    training, width = training_of(index), index.sa_code_size()
    missing = {block.path for block in blocks if not _is_there(block, training, width)}
    logger.info(
        "%d of %d blocks have their piece of this training already",
        len(blocks) - len(missing),
        len(blocks),
    )
    asked = [block for block in blocks if see or block.path in missing]
    rows = sum(block.rows for block in asked)
    bar = tqdm(total=rows, unit=" keys", unit_scale=True, desc="encoding", disable=not progress)
    with bar:
        for block in asked:
            keys = _shown(block, see, bar)
            if block.path in missing:
                write_piece(block, training, width, (encode(index, some) for some in keys))
            else:
                for _ in keys:
                    pass
    for block in blocks:
        tidy(block.path)
    return len(missing)


def _is_there(block: Block, training: str, width: int) -> bool:
    """Whether a block has its piece, which is as it was written."""
    try:
        open_piece(block, training, width)
    except IndexFileError as error:
        if piece_path(block, training).exists():
            logger.warning("made again: %s", str(error).splitlines()[0])
        return False
    return True


def _shown(block: Block, see: See | None, bar: tqdm[Any]) -> Iterator[np.ndarray]:
    """The keys (n, D) float32 of a block, a chunk at a time, once they were seen.

    Chunks begin with the block, so that its piece does not depend on those before it.
    """
    counts = np.zeros(block.rows, bool)
    for start, stop in block.kept:
        counts[start:stop] = True
    rows = block.first + np.cumsum(counts) - 1
    for keys, own in ahead(chunks(_keys(block))):
        check_finite(keys)
        kept = counts[own]
        if see is not None and kept.any():
            see(keys if kept.all() else keys[kept], rows[own][kept])
        yield keys
        bar.update(len(keys))


def _keys(block: Block) -> Rows:
    """The keys of a block, with those that were forgotten."""
    found = open_datastore(block.path)
    if found.fingerprint != block.fingerprint:
        raise DatastoreError(
            f"the block {block.path} was replaced while it was read",
            expected=f"block {block.fingerprint[:12]}...",
            found=f"block {found.fingerprint[:12]}...",
            do="let nobody write to a datastore that is in use",
        )
    return found.full_keys()
