"""Forgetting rows of a datastore in blocks: its manifest leaves them out, no block changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from fairseq_knnlm.datastore.blocks import Block, blocks_of
from fairseq_knnlm.datastore.documents import read_documents, write_documents
from fairseq_knnlm.datastore.into_blocks import claimed, into_blocks
from fairseq_knnlm.datastore.making import settle
from fairseq_knnlm.datastore.manifest import MANIFEST, Manifest, Stretch, write_manifest
from fairseq_knnlm.datastore.reader import Datastore, outline, outlined
from fairseq_knnlm.errors import DatastoreError

#: Rows from the first to the one behind the last.
Range = tuple[int, int]


def forget(path: Path, ranges: Sequence[Range]) -> Datastore:
    """Forgets rows of a datastore. Their bytes stay in its blocks until these are written anew.

    Args:
        path: its folder; one that is flat is turned into one of blocks.
        ranges: rows, as (first, behind the last), in any order; they may overlap.

    Returns:
        The outline of what is left.

    Raises:
        BusyError: where another process is changing it.
        DatastoreError: where it was compressed, there are no such rows, or nothing would be left.
    """
    with claimed(path):
        settle(path)
        check_rows(outline(path), ranges)
        store = into_blocks(path)
        left = without(store, ranges)
        _keep_documents(store, outlined(path, left), ranges)
        write_manifest(path / MANIFEST, left)
        return outline(path)


def _keep_documents(store: Datastore, left: Datastore, ranges: Sequence[Range]) -> None:
    """Says where documents begin that began in a block of which nothing is left."""
    if (documents := read_documents(store)) is None:
        return
    kept = documents.without(joined(ranges))
    found = read_documents(left)
    if found is not None and not np.array_equal(found.starts, kept.starts):
        write_documents(left, kept)


def check_rows(store: Datastore, ranges: Sequence[Range]) -> None:
    """Refuses rows that a datastore does not have, and all that it has.

    Raises:
        DatastoreError: naming them.
    """
    for start, stop in ranges:
        if not 0 <= start < stop <= len(store):
            raise DatastoreError(
                f"the datastore {store.path} has no rows {start}:{stop}",
                expected=f"rows from 0 to {len(store)}, the first below the last, as in 0:1",
                found=f"{start}:{stop}",
            )
    if sum(stop - start for start, stop in joined(ranges)) == len(store):
        raise DatastoreError(
            f"nothing would be left of the datastore {store.path}",
            expected="1 row or more that stays",
            found=f"all {len(store):,} to be forgotten",
            do="remove its folder",
        )


def without(store: Datastore, ranges: Sequence[Range]) -> Manifest:
    """The manifest of a datastore in blocks once rows of it are forgotten, which it has."""
    stretches: list[Stretch] = []
    goes_on = True
    for block in blocks_of(store.path, store.manifest):
        gone = joined([*block.stretch.forgotten, *_own_ranges(block, ranges)])
        # What follows a block that is left out altogether does not follow the one before that.
        breaks = block.stretch.breaks if goes_on else sorted({0, *block.stretch.breaks})
        left = replace(block.stretch, forgotten=gone, breaks=breaks)
        goes_on = bool(left.kept)
        stretches += [left] if left.kept else []
    rows = sum(stop - start for left in stretches for start, stop in left.kept)
    before = [*store.manifest.before, store.fingerprint]
    return replace(store.manifest, rows=rows, blocks=stretches, before=before)


def _own_ranges(block: Block, ranges: Iterable[Range]) -> list[Range]:
    """Those of the block's own rows that lie in ranges of the datastore's, and count so far."""
    found = []
    first = block.first
    for start, stop in block.kept:
        for low, high in ranges:
            own = max(low - first, 0) + start, min(high - first + start, stop)
            found += [own] if own[0] < own[1] else []
        first += stop - start
    return found


def joined(ranges: Iterable[Range]) -> list[Range]:
    """The same rows in ranges that ascend, and neither overlap nor touch."""
    found: list[Range] = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], stop)
        else:
            found.append((start, stop))
    return found
