"""Saving in blocks: what is there already is kept, what is missing is made, by as many as like.

A block of a datastore is made of the blocks of text (fairseq's samples) whose first token lies in
it. These are read in batches of their own, so that its bytes depend on nothing else but how large
batches are and what computes them, which its manifest says.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from fairseq_knnlm.background import Behind
from fairseq_knnlm.datastore import Datastore, DatastoreWriter, Documents, outline
from fairseq_knnlm.datastore.boundaries import after_empty_lines
from fairseq_knnlm.datastore.making import Making, Plan, is_in_the_making, read_plan
from fairseq_knnlm.datastore.writer import tidy_made
from fairseq_knnlm.errors import BusyError, ConfigError
from fairseq_knnlm.index.build import IndexBuilder
from fairseq_knnlm.index.streaming import PieceStream
from fairseq_knnlm.runs.build_index import extend_index
from fairseq_knnlm.runs.documents import EOS, keep_documents
from fairseq_knnlm.runs.scorer import Batch
from fairseq_knnlm.runs.streaming import Streaming

logger = logging.getLogger(__name__)

#: Finds the documents of values (N,).
Find = Callable[[np.ndarray], Documents]


@dataclass(frozen=True)
class Worker:
    """One of the processes that share the saving of a datastore: this one.

    Attributes:
        number: of the process, from 0.
        of: processes that share the work.
    """

    number: int = 0
    of: int = 1


#: No other process.
ALONE = Worker()


def cut(starts: np.ndarray, rows: int, block_rows: int) -> list[range]:
    """Which blocks of text each block of a datastore is made of.

    Args:
        starts: (B,) int64, the row of the first token of each block of text.
        rows: tokens of the text.
        block_rows: entries of a block of the datastore, about.

    Returns:
        Numbers of blocks of text, one range after another.
    """
    _, firsts = np.unique(starts[starts < rows] // block_rows, return_index=True)
    edges = [*firsts.tolist(), len(starts)]
    return [range(start, stop) for start, stop in pairwise(edges)]


def check_shards(worker: Worker, blocks: int) -> None:
    """Refuses processes that would have nothing to do.

    Raises:
        ConfigError: where there are more of them than blocks.
    """
    if worker.of > blocks:
        raise ConfigError(
            "there are more shards than blocks to save",
            expected=f"--num-shards up to {blocks}, the number of blocks",
            found=f"--num-shards {worker.of}",
            do="pass fewer shards, or a smaller --block-rows",
        )


class BlockSaving:
    """Takes the scored batches of blocks that are missing, and writes these one by one.

    Args:
        making: the datastore in the making.
        texts: which blocks of text each block is made of.
        worker: which blocks are this process's: every ``of``-th.
        find: the documents of all values.
        streaming: the index that keys go into, where they are not kept.

    Raises:
        DatastoreError: where a block that is there is of another making.
    """

    def __init__(
        self,
        making: Making,
        texts: list[range],
        worker: Worker,
        find: Find,
        streaming: Streaming | None = None,
    ) -> None:
        self._making = making
        self._find = find
        self._streaming = streaming
        mine = list(making.plan.blocks)[worker.number :: worker.of]
        there = set(making.there())
        sound = making.check(
            [block for block in mine if block in there],
            streaming.is_sound if streaming is not None else None,
        )
        self.blocks = [block for block in mine if block not in sound]
        first = making.plan.number
        #: Which blocks of text are to be read, a range for each block that is missing.
        self.texts = [texts[block - first] for block in self.blocks]
        #: Whether there is something to go on with, so that not all of the text is read.
        self.goes_on = bool(sound)
        if sound:
            logger.info(
                "going on with %s: %d of %d blocks are there, and as they were written; %d to make",
                *(making.path, len(sound), len(mine), len(self.blocks)),
            )
        self._open: tuple[int, DatastoreWriter, PieceStream | None] | None = None
        self._write = Behind(_write)

    @property
    def builder(self) -> IndexBuilder | None:
        """Of the index that is to be trained first; None where nothing is."""
        return self._streaming.builder if self._streaming is not None else None

    def learn(self, rows: np.ndarray, keys: np.ndarray) -> None:
        """Trains the index on keys (n, D) float32, drawn evenly, of these rows (n,)."""
        assert self._streaming is not None
        self._streaming.learn(rows, keys)

    def take(self, batch: Batch) -> None:
        """Writes a batch, whose rows all lie in one block."""
        counted = batch.rows >= 0
        rows = batch.rows[counted]
        if not len(rows):
            return
        plan = self._making.plan
        block = plan.number + int(np.searchsorted(plan.starts, rows[0], side="right")) - 1
        if self._open is None or self._open[0] != block:
            self._close()
            piece = self._streaming.piece() if self._streaming is not None else None
            self._open = block, self._making.writer(block), piece
        assert batch.contexts.keys is not None
        keys = batch.contexts.keys.cpu().numpy()[counted]
        values = batch.targets.cpu().numpy()[counted]
        self._write(*self._open[1:], rows - plan.rows(block).start, keys, values)

    def _close(self) -> None:
        """Publishes the block that is being written."""
        if self._open is not None:
            block, writer, piece = self._open
            self._write.wait()
            writer.publish(piece.write if piece is not None else None)
            self._open = None
            left = len(self._making.missing())
            logger.info("block %d is made, %d of all are missing", block, left)

    def publish(self) -> str:
        """Joins the blocks once all of them are there, whoever made them; says what is there."""
        self._close()
        return join(self._making, self._find)


def _write(
    writer: DatastoreWriter,
    piece: PieceStream | None,
    rows: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
) -> None:
    writer.write(rows, keys, values)
    if piece is not None:
        piece.add(keys)


def join(making: Making, find: Find | None) -> str:
    """Makes a datastore of blocks, if all of them are there, and says what it did.

    Args:
        making: the datastore in the making.
        find: the documents of all values; None to leave these out.
    """
    blocks = making.plan.blocks
    if missing := making.missing():
        return (
            f"{len(blocks) - len(missing)} of {len(blocks)} blocks are in {making.path}; whoever "
            "makes the last of them makes a datastore of them"
        )
    try:
        path = making.join(partial(_finish, making.plan, find))
    except BusyError:
        return f"another process makes a datastore of the blocks in {making.path}"
    entries = f"{making.plan.starts[-1]:,} entries"
    if making.plan.onto:
        return f"added {entries} to {path}, {len(outline(path)):,} in all"
    return f"saved {entries} in {path}, {len(blocks)} blocks"


def _finish(plan: Plan, find: Find | None, store: Datastore) -> None:
    """What is left to do to new blocks before they are part of the datastore."""
    if find is not None:
        keep_documents(store, find, store.blocks[-len(plan.blocks) :])
    if plan.onto and plan.key_dtype is not None:
        extend_index(store)


def join_there(path: Path) -> str:
    """Makes a datastore of blocks that were saved before, and says what it did.

    Where documents begin is found too, unless they begin with lines that only the dictionary can
    spell.

    Args:
        path: the datastore in the making.

    Raises:
        DatastoreError: where none is, or blocks are missing or of another making.
    """
    if not is_in_the_making(path):
        tidy_made(path)
    making = Making(path, read_plan(path))
    if making.missing():
        making.join()  # which says what is missing
    boundary = making.plan.boundary
    if boundary is not None:
        logger.warning(
            "where documents begin is left out: add it with `fairseq-knnlm verify --dstore %s "
            "--documents --document-boundary %r --data DATA`",
            *(path, boundary),
        )
    return join(making, None if boundary else partial(after_empty_lines, eos=EOS))
