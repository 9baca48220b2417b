"""Whether all that lies in a datastore's folder is as it was written: ``fairseq-knnlm verify``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fairseq_knnlm.calibration.stored import read_calibration
from fairseq_knnlm.calibration.table import read_table
from fairseq_knnlm.datastore import (
    BLOCKS,
    DOCUMENTS,
    INDEX,
    KEYS,
    MANIFEST,
    VALUES,
    Datastore,
    Documents,
    check_numbers,
    read_documents,
)
from fairseq_knnlm.datastore.documents import check_text
from fairseq_knnlm.datastore.making import MAKING, Plan, is_in_the_making, made_at, read_plan
from fairseq_knnlm.errors import DatastoreError, KnnlmError, NGramError
from fairseq_knnlm.experts.ngram_file import counted_from, load_counts
from fairseq_knnlm.index.card import of_another, read_card
from fairseq_knnlm.index.storage import load as load_index
from fairseq_knnlm.index.trained import read_trained
from fairseq_knnlm.runs.documents import find_documents
from fairseq_knnlm.runs.findings import (
    WRONG,
    Finding,
    check_arrays,
    judged,
    strangers,
    unsound,
)
from fairseq_knnlm.runs.verify_blocks import (
    CheckedBlocks,
    blocks_made,
    of_datastore,
    of_plan,
    training_at,
    unlisted,
)

BEFORE = "this datastore before it was changed"


def verified(store: Datastore) -> Iterator[Finding]:
    """Reads every byte that belongs to a datastore, and names what does not.

    Args:
        store: the outline of a datastore in a folder, or one of urvashik/knnlm.

    Yields:
        What was found, wrong or not: the arrays or blocks, then one for each other file.
    """
    values = None
    if store.blocks:
        blocks = CheckedBlocks(
            store.path,
            store.blocks,
            of_datastore(store.manifest),
            training_at(store.index_path),
        )
        yield from blocks.findings()
        values = blocks.values
    elif store.manifest.has_checksums:
        arrays, finding = _arrays(store)
        values = arrays.get(VALUES)
        yield finding
    else:
        yield _old_arrays(store)
    parts: dict[Path, Callable[[], str]] = {
        store.index_path: lambda: _index(store),
        store.ngram_path: lambda: _ngrams(store, values),
        store.calibration_path: lambda: _calibration(store),
    }
    if not store.blocks:
        parts[store.documents_path] = lambda: _documents(store, values)
    for path, look in parts.items():
        if path.exists() or path.is_symlink():
            yield judged(path, look)
    if any((block.path / DOCUMENTS).exists() for block in store.blocks):
        yield _of_blocks(store, values)
    if store.manifest.has_checksums:
        known = {MANIFEST, *store.manifest.files, *(path.name for path in parts)}
        yield from _in_folder(store.path, known, {block.path.name for block in store.blocks})


def verified_making(path: Path) -> Iterator[Finding]:
    """The same of a datastore in the making, which has no manifest yet."""
    index = path / INDEX  # that keys are streamed into
    if index.exists() or index.is_symlink():
        yield judged(index, lambda: _trained(index))
    yield from _in_folder(path, {INDEX}, set())


def _trained(path: Path) -> str:
    read_trained(path, everything=True)
    card = read_card(path)
    assert card is not None  # only with --indexfile
    return f"{card.describe()}, trained; its entries come with the blocks"


def _in_folder(folder: Path, known: set[str], listed: set[str]) -> Iterator[Finding]:
    """What else lies in a datastore's folder: blocks in the making, leftovers, unknown things."""
    if is_in_the_making(folder):
        try:
            plan = read_plan(folder)
        except DatastoreError as error:
            yield Finding(folder / MAKING, WRONG, (error,))
        else:
            yield from _being_made(folder, plan)
            listed = listed | {made_at(folder, block).name for block in plan.blocks}
        known = known | {MAKING}
    if listed:
        known = known | {BLOCKS}
        yield from unlisted(folder, listed)
    yield from _others(folder, known)


def _being_made(folder: Path, plan: Plan) -> Iterator[Finding]:
    there = blocks_made(folder, plan)
    training = training_at(folder / INDEX) if plan.recipe is not None else None
    yield from CheckedBlocks(folder, there, of_plan(plan), training).findings()
    what = "blocks are there of what is being " + ("added" if plan.onto else "made")
    yield Finding(folder / MAKING, f"{len(there):,} of {len(plan.blocks):,} {what}")


def _arrays(store: Datastore) -> tuple[dict[str, np.ndarray], Finding]:
    """Those that are as they were written, and what was found of them all."""
    arrays, errors = check_arrays(store)
    summary = WRONG
    if not errors:
        summary = f"{len(store):,} entries, every byte as it was written ({', '.join(arrays)})"
    return arrays, Finding(store.path, summary, tuple(errors))


def _old_arrays(store: Datastore) -> Finding:
    """Of files of urvashik/knnlm, which carry no checksums."""
    errors = [
        unsound(store.path.with_name(f"{store.path.name}_keys.npy"), fault)
        for fault in check_numbers(KEYS, store.full_keys(), 0, empty_keys=False)
    ]
    summary = WRONG if errors else "of the right length; no checksums"
    return Finding(store.path, f"{len(store):,} entries, {summary}", tuple(errors))


def _index(store: Datastore) -> str:
    if (card := read_card(store.index_path)) is not None and card.in_pieces and store.blocks:
        index = read_trained(store.index_path, everything=True)  # its pieces are with the blocks
        if index.d != store.manifest.width:
            raise of_another(store.index_path, len(store), store.manifest.width, card.rows, index.d)
        return f"{card.describe()}, of this datastore, its entries in the blocks"
    checked = load_index(
        store.index_path,
        datastore=store.fingerprint,
        rows=len(store),
        width=store.manifest.width,
        blocks=store.blocks,
        everything=True,
    )
    return f"{checked.card.describe()}, of this datastore"


def _ngrams(store: Datastore, values: np.ndarray | None) -> str:
    path = store.ngram_path
    if counted_from(path) in store.manifest.before:
        return f"n-grams of {BEFORE}; they are counted anew when they are asked for"
    model = load_counts(path, store.fingerprint, breaks=store.breaks)
    types = None if values is None else np.unique(values)
    same = types is None or np.array_equal(model.orders[0].keys, types)
    if not same or (model.vocabulary, model.tokens) != (
        store.manifest.origin.vocabulary,
        len(store),
    ):
        raise NGramError(
            f"{path} was not counted from this datastore's values",
            expected=f"{len(store):,} tokens below {store.manifest.origin.vocabulary:,}",
            found=f"{model.tokens:,} tokens below {model.vocabulary:,}, or others",
            do=f"delete {path}, so that the datastore is counted again",
        )
    return f"n-grams up to {model.order} tokens, of this datastore"


def _calibration(store: Datastore) -> str:
    seals, before = [store.fingerprint], [store.manifest.before]
    calibration = read_calibration(store.calibration_path, seals, before)
    if calibration is None:
        return "of other datastores than this alone"
    if list(calibration.datastores) != seals:
        return f"{calibration.best.name}, fitted for {BEFORE}"
    return f"{calibration.best.name}, fitted for this datastore"


def _documents(store: Datastore, values: np.ndarray | None) -> str:
    check_text(store)
    documents = read_documents(store)
    assert documents is not None  # only of a file that is there
    if values is not None and not _are_of(documents, values, store):
        raise DatastoreError(
            f"{store.documents_path} was not made of this datastore's values",
            expected="the first row of each document, which begins a line",
            found="other rows",
            do="make it anew: fairseq-knnlm verify --documents",
        )
    return f"documents of this datastore: {documents.describe()}"


def _are_of(documents: Documents, values: np.ndarray, store: Datastore) -> bool:
    """Whether documents begin where they do in the text of the values (N,).

    Which lines match an expression only the dictionary could tell, and how a document began of
    which a part was forgotten nobody could: these only have to begin a line.
    """
    changed = store.manifest.before or any(block.stretch.forgotten for block in store.blocks)
    if documents.boundary is None and not changed:
        found = find_documents(values, documents.eos, None, (), store.breaks)
        return np.array_equal(documents.starts, found.starts)
    inside = np.setdiff1d(documents.starts, store.breaks)
    return bool((values[inside - 1] == documents.eos).all())


def _of_blocks(store: Datastore, values: np.ndarray | None) -> Finding:
    """The documents of all blocks, put together."""
    try:
        if read_documents(store) is None:
            return Finding(store.path / BLOCKS, "documents of some of the blocks, and not of all")
        return Finding(store.path / BLOCKS, _documents(store, values))
    except KnnlmError as error:
        return Finding(store.path / BLOCKS, WRONG, (error,))


def _others(folder: Path, known: set[str]) -> Iterator[Finding]:
    for finding in strangers(folder, known):
        path = finding.path
        if path.name == f"{INDEX}.json" or _with_calibration(path):
            continue
        if path.suffix == ".npz" and not path.name.startswith("."):
            yield judged(path, lambda path=path: _table(path))  # type: ignore[misc]
        else:
            yield finding


def _with_calibration(path: Path) -> bool:
    """Gates and curves, and what was fitted together with other datastores."""
    return path.stem.startswith("calibration") and path.suffix in (".json", ".safetensors", ".png")


def _table(path: Path) -> str:
    table = read_table(path)
    return f"score table of {table.card['split']}, {len(table):,} tokens"
