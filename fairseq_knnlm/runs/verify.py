"""Whether all that lies in a datastore's folder is as it was written: ``fairseq-knnlm verify``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fairseq_knnlm.calibration.stored import read_calibration
from fairseq_knnlm.calibration.table import read_table
from fairseq_knnlm.datastore import (
    INDEX,
    KEYS,
    MANIFEST,
    VALUES,
    Datastore,
    check_numbers,
    open_array,
    read_documents,
)
from fairseq_knnlm.datastore.boundaries import after_empty_lines
from fairseq_knnlm.datastore.documents import check_text
from fairseq_knnlm.errors import DatastoreError, KnnlmError, NGramError
from fairseq_knnlm.experts.ngram_file import counted_from, load_counts
from fairseq_knnlm.files.arrays import kind_of
from fairseq_knnlm.index.storage import load as load_index

WRONG = "not as it should be"
BEFORE = "this datastore before it was changed"
#: What names of temporary files hold, and what is said of them.
LEFT = (".partial-", ".building", ".lock")
LEFT_OVER = "of a run that has not ended, or did not end well; the next one removes it"


@dataclass(frozen=True)
class Finding:
    """What was found of one thing.

    Attributes:
        path: the thing.
        summary: what was found, in a line.
        errors: what is wrong with it.
    """

    path: Path
    summary: str
    errors: tuple[KnnlmError, ...] = ()


def verified(store: Datastore) -> Iterator[Finding]:
    """Reads every byte that belongs to a datastore, and names what does not.

    Args:
        store: the outline of a datastore in a folder, or one of urvashik/knnlm.

    Yields:
        What was found, wrong or not: the arrays together, then one for each other file.
    """
    values = None
    if store.manifest.files:
        arrays, finding = _arrays(store)
        values = arrays.get(VALUES)
    else:
        finding = _old_arrays(store)
    yield finding
    parts: dict[Path, Callable[[], str]] = {
        store.index_path: lambda: _index(store),
        store.ngram_path: lambda: _ngrams(store, values),
        store.calibration_path: lambda: _calibration(store),
        store.documents_path: lambda: _documents(store, values),
    }
    for path, look in parts.items():
        if path.exists() or path.is_symlink():
            yield _judged(path, look)
    if store.manifest.files:
        known = {MANIFEST, *store.manifest.files, *(path.name for path in parts)}
        yield from _others(store.path, known)


def _judged(path: Path, look: Callable[[], str]) -> Finding:
    try:
        if (kind := kind_of(path)) != "a file":
            raise DatastoreError(
                f"{path} is damaged",
                expected="a file",
                found=kind,
                do="remove it, and make it again",
            )
        return Finding(path, look())
    except KnnlmError as error:
        return Finding(path, WRONG, (error,))
    except OSError as error:
        unread = DatastoreError(
            f"{path} cannot be read", found=error.strerror, do="check whose it is, and the disk"
        )
        return Finding(path, WRONG, (unread,))


def _arrays(store: Datastore) -> tuple[dict[str, np.ndarray], Finding]:
    """Those that are as they were written, and what was found of them all."""
    manifest, arrays, errors = store.manifest, {}, []
    for name in manifest.arrays():
        try:
            arrays[name] = open_array(store.path, name, manifest, everything=True)
        except DatastoreError as error:
            errors.append(error)
            continue
        faults = check_numbers(name, arrays[name], manifest.origin.vocabulary)
        errors += [_unsound(store.path / name, fault) for fault in faults]
    summary = WRONG
    if not errors:
        summary = f"{len(store):,} entries, every byte as it was written ({', '.join(arrays)})"
    return arrays, Finding(store.path, summary, tuple(errors))


def _old_arrays(store: Datastore) -> Finding:
    """Of files of urvashik/knnlm, which carry no checksums."""
    errors = [
        _unsound(store.path.with_name(f"{store.path.name}_keys.npy"), fault)
        for fault in check_numbers(KEYS, store.full_keys(), 0, empty_keys=False)
    ]
    summary = WRONG if errors else "of the right length; no checksums"
    return Finding(store.path, f"{len(store):,} entries, {summary}", tuple(errors))


def _unsound(file: Path, fault: str) -> DatastoreError:
    return DatastoreError(
        f"{file} holds what no language model has written",
        expected="finite keys, values of the vocabulary, weights of 1 or more",
        found=fault,
        do="save the datastore again, with a checkpoint whose losses are finite",
    )


def _index(store: Datastore) -> str:
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
    if values is not None:
        if documents.boundary is None:
            right = np.array_equal(
                documents.starts, after_empty_lines(values, documents.eos).starts
            )
        else:  # which lines match only the dictionary could tell
            right = bool((values[documents.starts[1:] - 1] == documents.eos).all())
        if not right:
            raise DatastoreError(
                f"{store.documents_path} was not made of this datastore's values",
                expected="the first row of each document, which begins a line",
                found="other rows",
                do="make it anew: fairseq-knnlm verify --documents",
            )
    return f"documents of this datastore: {documents.describe()}"


def _others(folder: Path, known: set[str]) -> Iterator[Finding]:
    for path in sorted(folder.iterdir()):
        name = path.name
        if name in known or name == f"{INDEX}.json" or _with_calibration(path):
            continue
        if name.startswith(".") and any(part in name for part in LEFT):
            yield Finding(path, LEFT_OVER)
        elif path.suffix == ".npz":
            yield _judged(path, lambda path=path: _table(path))  # type: ignore[misc]
        else:
            yield Finding(path, f"{kind_of(path)} that fairseq-knnlm does not know")


def _with_calibration(path: Path) -> bool:
    """Gates and curves, and what was fitted together with other datastores."""
    return path.stem.startswith("calibration") and path.suffix in (".json", ".safetensors", ".png")


def _table(path: Path) -> str:
    table = read_table(path)
    return f"score table of {table.card['split']}, {len(table):,} tokens"
