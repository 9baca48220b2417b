"""Writing blocks anew without what was forgotten, so that its bytes are gone, too."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from msgspec.structs import replace
from tqdm import tqdm

from fairseq_knnlm.datastore.blocks import Block
from fairseq_knnlm.datastore.documents import read_documents, write_documents
from fairseq_knnlm.datastore.into_blocks import claimed, into_blocks
from fairseq_knnlm.datastore.making import is_in_the_making, read_plan, settle
from fairseq_knnlm.datastore.manifest import (
    BLOCKS,
    MANIFEST,
    Manifest,
    Stretch,
    read_manifest,
    write_manifest,
)
from fairseq_knnlm.datastore.reader import (
    CHECKED_ROWS,
    Datastore,
    open_datastore,
    outline,
    outlined,
)
from fairseq_knnlm.datastore.writer import DatastoreWriter
from fairseq_knnlm.files import Claim, check_mapped

#: A block's folder, or what is temporary of one.
OF_BLOCK = re.compile(r"\.?([0-9]{6,12})(\..+)?")


def compact(
    path: Path, finish: Callable[[Datastore, Datastore], object] | None = None
) -> Datastore | None:
    """Writes blocks anew of which rows were forgotten, and removes what the manifest does not list.

    Rows, keys and values stay what they are. A block is read and written as it is, of its bytes
    only those that stay. What is being added to the datastore meanwhile is left alone.

    Args:
        path: the datastore's folder.
        finish: does what is left to do to the new blocks, given the datastore as it is, and as it
            will be.

    Returns:
        Its outline; None where there is nothing to do.

    Raises:
        BusyError: where another process is changing it.
        DatastoreError: where a block is damaged, or the disk cannot hold the new ones.
    """
    with claimed(path):
        manifest, _ = read_manifest(path)
        if not manifest.blocks:
            return None
        settle(path)
        store = into_blocks(path)  # which removes what was left of the flat one
        if any(block.stretch.forgotten for block in store.blocks):
            # First, so that the new blocks are numbered as if nobody had been killed before.
            _remove_unlisted(path, manifest)
            whole = _written_anew(store)
            to_be = outlined(path, whole)
            if (documents := read_documents(store)) is not None:
                write_documents(to_be, documents)
            if finish is not None:
                finish(store, to_be)
            write_manifest(path / MANIFEST, whole)
        elif not _unlisted(path, manifest):
            return None
        compacted = outline(path)
        _remove_unlisted(path, compacted.manifest)
        return compacted


def next_number(path: Path) -> int:
    """The number of a block that neither is in a datastore's folder nor was, nor is being made."""
    numbers = [int(stretch.name) for stretch in read_manifest(path)[0].blocks]
    numbers += [int(name) for name in _names(path)]
    numbers += [read_plan(path).blocks.stop - 1] if is_in_the_making(path) else []
    return max(numbers, default=-1) + 1


def _written_anew(store: Datastore) -> Manifest:
    """The manifest of the same rows in blocks of which all count, once these are there."""
    number, stretches = next_number(store.path), []
    for block in store.blocks:
        within = (store.breaks >= block.first) & (store.breaks < block.stop)
        breaks = (store.breaks[within] - block.first).tolist()
        if not block.stretch.forgotten:
            stretches.append(replace(block.stretch, breaks=breaks))
            continue
        folder = _copied(block, store.path / BLOCKS / f"{number:06d}")
        rows = block.stop - block.first
        stretches.append(Stretch(folder.name, rows, read_manifest(folder)[1], breaks))
        number += 1
    return replace(
        store.manifest, blocks=stretches, before=[*store.manifest.before, store.fingerprint]
    )


def _copied(block: Block, folder: Path) -> Path:
    """What counts of a block, as one of its own."""
    whole = open_datastore(block.path)
    manifest = whole.manifest
    rows = block.stop - block.first
    writer = DatastoreWriter(folder, rows, manifest.width, manifest.origin, manifest.key_dtype)
    parts = [
        (start, min(start + CHECKED_ROWS, stop))
        for first, stop in block.kept
        for start in range(first, stop, CHECKED_ROWS)
    ]
    done = 0
    for start, stop in tqdm(parts, desc=f"writing {folder.name}", unit=" chunks", delay=2):
        check_mapped(whole.values, f"values of {block.path}")
        check_mapped(whole.keys, f"keys of {block.path}")
        keys = np.zeros((stop - start, 0)) if whole.keys is None else whole.keys[start:stop]
        writer.write(np.arange(done, done + stop - start), keys, whole.values[start:stop])
        done += stop - start
    return writer.publish()


def _names(path: Path) -> set[str]:
    """The blocks of which there is anything in a datastore's folder, listed or not."""
    matches = (OF_BLOCK.fullmatch(child.name) for child in (path / BLOCKS).glob("*"))
    return {match[1] for match in matches if match}


def _unlisted(path: Path, manifest: Manifest) -> set[str]:
    """Those that are neither part of the datastore nor being made."""
    listed = {stretch.name for stretch in manifest.blocks}
    if is_in_the_making(path):
        listed |= {f"{number:06d}" for number in read_plan(path).blocks}
    return _names(path) - listed


def _remove_unlisted(path: Path, manifest: Manifest) -> None:
    for name in sorted(_unlisted(path, manifest)):
        folder = path / BLOCKS / name
        with Claim(folder):  # which removes what is temporary
            if folder.exists():
                shutil.rmtree(folder)
