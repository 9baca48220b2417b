"""A shard: a process that holds the index of some blocks, and searches it.

What is in here runs in Ray's workers. It loads neither torch nor fairseq.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fairseq_knnlm.cluster.agreement import check_needed
from fairseq_knnlm.cluster.entries import Entries
from fairseq_knnlm.cluster.merging import Found
from fairseq_knnlm.datastore import Block, Datastore, outline
from fairseq_knnlm.datastore.manifest import INDEX
from fairseq_knnlm.errors import IndexFileError, KnnlmError, told
from fairseq_knnlm.index.card import read_card
from fairseq_knnlm.index.codes import assemble
from fairseq_knnlm.index.library import faiss, innermost, keep_freed_memory
from fairseq_knnlm.index.pieces import pieces_of, training_in
from fairseq_knnlm.index.trained import read_trained
from fairseq_knnlm.versions import versions

#: Rows up to which int32 holds them.
NARROW = 2**31


class Asked(NamedTuple):
    """What shards are asked.

    Attributes:
        queries: (N, D) float32, behind the index's transforms.
        lists: (N, nprobe) int32, the inverted lists to visit; None where the index has none.
        nearness: (N, nprobe) float32, how near these are.
        keys: (N, W) float32, the queries as the datastore's keys are; None where no distances are
            to be recomputed.
        similarity: how, as ``LocalRetriever`` has it; empty for not at all.
        values: whether to tell the values of what is found.
    """

    queries: np.ndarray
    lists: np.ndarray | None = None
    nearness: np.ndarray | None = None
    keys: np.ndarray | None = None
    similarity: str = ""
    values: bool = False

    def some(self, which: slice | np.ndarray) -> Asked:
        """The same of some queries."""
        return Asked(
            self.queries[which],
            None if self.lists is None else self.lists[which],
            None if self.nearness is None else self.nearness[which],
            None if self.keys is None else self.keys[which],
            self.similarity,
            self.values,
        )


@dataclass(frozen=True)
class Part:
    """What a shard holds.

    Attributes:
        store: folder of the datastore.
        fingerprint: of the datastore.
        training: fingerprint of the trained part of its index.
        blocks: that it holds, in their places.
        number: of the shard, from 0.
        shards: in all.
    """

    store: Path
    fingerprint: str
    training: str
    blocks: tuple[Block, ...]
    number: int
    shards: int

    @property
    def rows(self) -> int:
        """Entries that it holds."""
        return self.blocks[-1].stop - self.blocks[0].first


def parts_of(store: Datastore, training: str, shards: int) -> list[Part]:
    """What each of so many shards holds of a datastore.

    Args:
        store: in blocks.
        training: fingerprint of the trained part of its index.
        shards: at most as many as blocks.
    """
    # A shard has another working folder than the process that asks.
    path = store.path.resolve()
    groups = grouped([replace(one, path=one.path.resolve()) for one in store.blocks], shards)
    return [
        Part(path, store.fingerprint, training, tuple(blocks), number, shards)
        for number, blocks in enumerate(groups)
    ]


def name_of(part: Part) -> str:
    """What all shards of one index have in common, in a name."""
    return f"{part.fingerprint}/{part.training[:16]}"


def grouped(blocks: Sequence[Block], shards: int) -> list[Sequence[Block]]:
    """Blocks in their order, in as many groups, of about as many entries each.

    Args:
        blocks: of a datastore.
        shards: groups, at most as many as blocks.
    """
    ends = np.array([block.stop for block in blocks])
    cuts = [0]
    for number in range(1, shards):
        wanted = int(np.abs(ends - ends[-1] * number / shards).argmin()) + 1
        least, most = cuts[-1] + 1, len(blocks) - (shards - number)
        cuts.append(min(max(wanted, least), most))
    return [blocks[start:stop] for start, stop in zip(cuts, [*cuts[1:], len(blocks)], strict=True)]


class Shard:
    """Holds the index of some blocks, and searches it. Ray makes an actor of it.

    A problem is kept and told to whoever asks, since what a constructor raises does not reach
    anybody as it was.

    Args:
        part: which blocks.
        libraries: versions in the process that asks.
        neighbours: shards on the same machine, with which it shares the cores.
        threads: of FAISS; 0 for an equal share of the machine's cores.
    """

    def __init__(
        self, part: Part, libraries: Mapping[str, str], neighbours: int = 1, threads: int = 0
    ) -> None:
        self._part = part
        self._problem: KnnlmError | None = None
        cores = len(os.sched_getaffinity(0))
        self._threads = threads or max(1, cores // neighbours)
        faiss.omp_set_num_threads(self._threads)
        try:
            check_needed(libraries, versions(), _here())
            self._whole = _opened(part)  # FAISS does not keep it for what lies within
            self._index = innermost(self._whole)
            keep_freed_memory()
            self._entries = Entries(part.blocks)
        except KnnlmError as problem:
            self._problem = problem
        except Exception as error:
            self._problem = KnnlmError(
                f"a shard cannot be loaded on {_here()}",
                expected="room in memory, and files that can be read",
                found=" ".join(told(error)[0].split()),
                do="free some memory there, or spread the datastore over more machines",
            )

    def about(self) -> dict[str, Any]:
        """What it is and where it runs.

        Raises:
            KnnlmError: what kept it from being loaded.
        """
        self._check()
        return {
            "datastore": self._part.fingerprint,
            "store": str(self._part.store),
            "training": self._part.training,
            "rows": self._part.rows,
            "number": self._part.number,
            "shards": self._part.shards,
            "threads": self._threads,
            "bytes": _memory(),
            "node": _here(),
            "pid": os.getpid(),
            "versions": versions(),
        }

    def search(self, asked: Asked, k: int) -> Found:
        """The k nearest of its entries.

        Args:
            asked: the queries, and what is to be told of what is found.
            k: neighbours a query.

        Returns:
            (N, k); rows are int32 where that holds them, else int64.

        Raises:
            KnnlmError: what kept it from being loaded, or keys that are missing or damaged.
        """
        self._check()
        queries, lists, nearness = asked.queries, asked.lists, asked.nearness
        if lists is None:
            distances, rows = self._index.search(queries, k)
        else:
            self._index.nprobe = lists.shape[1]
            found = self._index.search_preassigned(queries, k, lists.astype(np.int64), nearness)
            distances, rows = found
        values = exact = None
        if asked.values or asked.keys is not None:
            missing = rows < 0
            own = np.where(missing, 0, rows)
            values = self._entries.values(own) if asked.values else None
            if asked.keys is not None:
                exact = self._entries.distances(asked.keys, own, asked.similarity)
            rows = np.where(missing, -1, own + self._part.blocks[0].first)
        else:
            rows[rows >= 0] += self._part.blocks[0].first
        narrow = rows.astype(np.int32) if self._part.blocks[-1].stop < NARROW else rows
        return Found(distances, narrow, values, exact)

    def check_files(self) -> int:
        """As ``Entries.check_files`` does."""
        self._check()
        return self._entries.check_files()

    def _check(self) -> None:
        if self._problem is not None:
            raise self._problem


def _opened(part: Part) -> Any:
    """The index of a part, in memory; ids count from 0."""
    path = part.store / INDEX
    try:
        trained = read_trained(path)
        card = read_card(path)
        if trained is None or card is None or training_in(path, card.bytes) != part.training:
            raise IndexFileError(
                f"{path} is another index on {_here()}",
                expected=f"training {part.training[:12]}...",
                found="another one",
                do="put the datastore into a folder that all machines share",
            )
        pieces = list(pieces_of(part.blocks, part.training, card.piece_bytes))
    except KnnlmError:
        _check_shared(part)
        raise
    codes, start = [], 0
    for some, _ in pieces:
        codes.append((some, np.arange(start, start + len(some))))
        start += len(some)
    return assemble(trained, codes)


def _check_shared(part: Part) -> None:
    """Says of a datastore that is not the one asked for that it is not, or is not there at all."""
    try:
        found = outline(part.store).fingerprint
    except KnnlmError:
        raise KnnlmError(
            f"{_here()} does not see the datastore",
            expected=f"{part.store}, as on the machine that asks",
            found="nothing that can be opened",
            do="put it into a folder that all machines share, under the same path",
        ) from None
    if found != part.fingerprint:
        raise KnnlmError(
            f"on {_here()} another datastore lies at {part.store}",
            expected=f"datastore {part.fingerprint[:12]}...",
            found=f"datastore {found[:12]}...",
            do="put it into a folder that all machines share; one that was changed meanwhile has "
            "to be opened anew",
        )


def _here() -> str:
    return platform.node() or "an unnamed machine"


def _memory() -> int:
    """Bytes that this process has in memory."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
