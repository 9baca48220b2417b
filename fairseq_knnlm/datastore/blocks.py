"""Blocks: stretches of a text, each a datastore of its own, that together are one.

A block is made by one process, published whole and never changed. What a datastore of several
blocks says of them stands in its manifest alone, so that replacing this one file adds a block,
leaves one out, or forgets rows: whoever opens the datastore sees all of a change or nothing of it.

Rows of the datastore are those that its blocks keep, numbered through; what is forgotten has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fairseq_knnlm.datastore.manifest import BLOCKS, MANIFEST, Manifest, Stretch, damaged
from fairseq_knnlm.errors import DatastoreError


@dataclass(frozen=True)
class Block:
    """A block in its place.

    Attributes:
        path: its folder, a datastore of its own.
        first: the row of the whole datastore at which its own begin.
        stretch: what the datastore says of it.
    """

    path: Path
    first: int
    stretch: Stretch

    @property
    def fingerprint(self) -> str:
        """Of its own manifest."""
        return self.stretch.fingerprint

    @property
    def rows(self) -> int:
        """Entries that it holds, with those that were forgotten."""
        return self.stretch.rows

    @property
    def kept(self) -> list[tuple[int, int]]:
        """Those of its rows that count, as (first, behind the last), ascending."""
        return self.stretch.kept

    @property
    def stop(self) -> int:
        """The row of the datastore behind its last one."""
        return self.first + sum(stop - start for start, stop in self.kept)

    def rows_before(self, own: Sequence[int] | np.ndarray) -> np.ndarray:
        """How many of its rows that count stand before rows of its own.

        Args:
            own: (n,) integers, from 0 to ``rows``.

        Returns:
            (n,) int64.
        """
        starts = np.array([start for start, _ in self.kept])
        stops = np.array([stop for _, stop in self.kept])
        own = np.asarray(own, np.int64)[:, None]
        return np.clip(own - starts, 0, stops - starts).sum(axis=1)

    def own_rows(self, rows: np.ndarray) -> np.ndarray:
        """Rows of the datastore (n,) that lie in the block, as rows of its own, (n,) int64."""
        kept = np.array(self.kept)
        ends = np.cumsum(kept[:, 1] - kept[:, 0])
        places = np.asarray(rows, np.int64) - self.first
        homes = np.searchsorted(ends, places, side="right")
        return kept[homes, 1] - (ends[homes] - places)


def blocks_of(path: Path, manifest: Manifest) -> tuple[Block, ...]:
    """The blocks of a datastore in their places; none where it is a single one itself."""
    found: list[Block] = []
    first = 0
    for stretch in manifest.blocks:
        found.append(Block(path / BLOCKS / stretch.name, first, stretch))
        first = found[-1].stop
    return tuple(found)


def breaks_of(blocks: Sequence[Block], manifest: Manifest) -> np.ndarray:
    """The rows of a datastore that do not follow the row before them in a text.

    Where a text begins, and behind what was forgotten.

    Returns:
        (n,) int64, ascending; the first is 0.
    """
    found = [np.zeros(1, np.int64)]
    goes_on = True
    for block in blocks:
        edges = [*block.stretch.breaks, *(start for start, _ in block.kept if start)]
        edges += [] if goes_on else [0]
        found.append(block.first + block.rows_before(edges))
        goes_on = block.kept[-1][1] == block.rows
    rows = np.unique(np.concatenate(found))
    return rows[rows < manifest.rows]


def check_block(block: Block, found: Manifest, fingerprint: str, whole: Manifest) -> None:
    """Refuses a block that is another than the datastore says, or of another making.

    Args:
        block: in its place.
        found: its own manifest, and ``fingerprint`` that one's.
        whole: the datastore's.

    Raises:
        DatastoreError: naming the difference.
    """
    if fingerprint != block.fingerprint:
        raise damaged(
            block.path / MANIFEST,
            f"block {block.fingerprint[:12]}..., as the datastore's manifest says",
            f"block {fingerprint[:12]}...",
        )
    if found.rows != block.rows:
        raise damaged(
            block.path.parents[1] / MANIFEST,
            f"{found.rows:,} rows of the block {block.path.name}, as that says itself",
            f"{block.rows:,}",
        )
    check_alike(block.path, found, whole)


def check_alike(path: Path, found: Manifest, whole: Manifest) -> None:
    """Refuses a block that cannot stand beside the others of a datastore.

    Raises:
        DatastoreError: naming the first difference.
    """
    for what, ours, theirs in (
        ("dictionary", whole.origin.dictionary, found.origin.dictionary),
        ("checkpoint", whole.origin.model, found.origin.model),
        ("vocabulary", whole.origin.vocabulary, found.origin.vocabulary),
        ("key type", whole.origin.key_type, found.origin.key_type),
        ("width", whole.width, found.width),
        ("type of keys", whole.key_dtype or "none", found.key_dtype or "none"),
        ("type of values", whole.value_dtype, found.value_dtype),
    ):
        if ours != theirs:
            raise DatastoreError(
                f"the block {path} is of another making than the datastore",
                expected=f"{what} {ours}",
                found=f"{what} {theirs}",
                do="save it again, with the checkpoint, dictionary and flags of the others",
            )
    if found.blocks or found.compressions:
        raise DatastoreError(
            f"the block {path} is no block",
            expected="a datastore of one block, as it was saved",
            found="one that was compressed" if found.compressions else "one of several blocks",
        )
