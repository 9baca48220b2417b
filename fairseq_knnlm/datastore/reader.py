"""Opening a datastore, checked: whole, unaltered, and of the model that asks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fairseq_knnlm.datastore.blocks import Block, blocks_of, breaks_of, check_block
from fairseq_knnlm.datastore.manifest import (
    DOCUMENTS,
    INDEX,
    KEYS,
    PROJECTION,
    VALUES,
    WEIGHTS,
    Manifest,
    damaged,
    read_manifest,
)
from fairseq_knnlm.datastore.stacked import Rows, Stacked
from fairseq_knnlm.errors import DatastoreError
from fairseq_knnlm.files import altered, check_mapped
from fairseq_knnlm.files.arrays import kind_of, read_header

#: Rows that are read at a time where every number is looked at.
CHECKED_ROWS = 65536


@dataclass(frozen=True)
class Datastore:
    """An opened datastore.

    Attributes:
        path: its folder, or the prefix of the two raw files of urvashik/knnlm.
        manifest: shape, types, origin.
        keys: (N, D) float16 or float32, memory-mapped unless asked otherwise; None where left out
            or not kept. Those of several blocks are a ``Stacked``, which reads like an array.
        values: (N,) integers.
        fingerprint: SHA-256 over the manifest, which holds checksums of the content.
        index_path: where its index lies unless said otherwise.
        projection: (D, P) float32, takes the language model's keys to those of the datastore;
            None where they are the same.
        weights: (N,) int32, entries that each one stands for; None where each is one.
    """

    path: Path
    manifest: Manifest
    keys: Rows | None
    values: np.ndarray
    fingerprint: str
    index_path: Path
    projection: np.ndarray | None = None
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return self.manifest.rows

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Its blocks; none where it has one, which is the folder itself."""
        return blocks_of(self.path, self.manifest)

    @cached_property
    def breaks(self) -> np.ndarray:
        """(n,) int64, the rows that do not follow the row before them in a text; 0 is the first.

        Where entries were merged no row can be told to follow another, and these say nothing.
        """
        return breaks_of(self.blocks, self.manifest)

    def texts_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The texts that entries are from, as far as each is there in one piece.

        Args:
            rows: (n,) integers, from 0 to below N.

        Returns:
            (n,) int64 the first row of each one's text, and (n,) that behind its last.
        """
        edges = np.append(self.breaks, len(self))
        texts = np.searchsorted(self.breaks, rows, side="right")
        return edges[texts - 1], edges[texts]

    @property
    def nbytes(self) -> int:
        """Bytes of what is opened."""
        arrays = (self.keys, self.values, self.projection, self.weights)
        return sum(array.nbytes for array in arrays if array is not None)

    @property
    def calibration_path(self) -> Path:
        """Where the fitted lambda and temperature lie."""
        return self.index_path.with_name(self.index_path.name.replace(INDEX, "calibration.json"))

    @property
    def ngram_path(self) -> Path:
        """Where the counts of its n-grams lie."""
        return self.index_path.with_name(self.index_path.name.replace(INDEX, "ngram.npz"))

    @property
    def documents_path(self) -> Path:
        """Where it is said where its documents begin."""
        return self.index_path.with_name(self.index_path.name.replace(INDEX, DOCUMENTS))

    def full_keys(self) -> Rows:
        """The keys.

        Raises:
            DatastoreError: where the datastore kept none.
        """
        if self.keys is None:
            raise DatastoreError(
                f"the datastore {self.path} holds no keys",
                expected="keys.npy, to build an index of or to recompute distances on",
                found="keys that went into its index only (--no-save-keys)",
                do="use that index with its own distances, or save the datastore with its keys",
            )
        return self.keys

    def check_origin(
        self,
        *,
        dictionary: str = "",
        key_type: str = "",
        width: int = 0,
        model: str = "",
    ) -> None:
        """Refuses a language model other than the one whose keys these are.

        Args:
            dictionary: fingerprint of the dictionary.
            key_type: the queries' representation.
            width: the queries' dimensions.
            model: fingerprint of the weights.

        What is left out is not compared, nor what the datastore does not know of itself.

        Raises:
            DatastoreError: naming the first difference.
        """
        origin, model_width = self.manifest.origin, self.manifest.query_width
        rows = (
            ("dictionary", origin.dictionary, dictionary, "binarise the text with its dictionary"),
            ("key type", origin.key_type, key_type, f"pass --knn-keytype {origin.key_type}"),
            ("key width", model_width, width, "evaluate the checkpoint that wrote it"),
            ("checkpoint", origin.model, model, "evaluate the checkpoint that wrote it"),
        )
        for what, ours, theirs, remedy in rows:
            if ours and theirs and ours != theirs:
                raise DatastoreError(
                    f"the datastore {self.path} is of another {what} than the language model",
                    expected=f"{what} {_short(ours)}, as the datastore's manifest says",
                    found=f"{what} {_short(theirs)}",
                    do=f"{remedy}, or save a datastore with this model",
                )


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text


def open_datastore(
    path: Path, *, load_keys: bool = True, in_memory: bool = False, verify: bool = False
) -> Datastore:
    """Opens a datastore and checks that it is whole and unaltered.

    Args:
        path: its folder.
        load_keys: False leaves the keys on the disk, unopened and unchecked.
        in_memory: read keys and values into memory instead of mapping them.
        verify: check every byte; otherwise files beyond 2 GiB are checked by a sample.

    Raises:
        DatastoreError: where there is none, or it is truncated, altered or of a newer version.
    """
    while True:
        manifest, seal = read_manifest(path)
        try:
            if manifest.blocks:
                return open_blocks(
                    path, manifest, seal, load_keys=load_keys, in_memory=in_memory, verify=verify
                )
            return _open_one(path, manifest, seal, load_keys, in_memory, verify)
        except (DatastoreError, FileNotFoundError):
            if not was_replaced(path, seal):
                raise


def was_replaced(path: Path, seal: str) -> bool:
    """Whether another manifest lies there than that of fingerprint ``seal``, so that what it names
    are other files.
    """
    try:
        return read_manifest(path)[1] != seal
    except DatastoreError:
        return False


def _open_one(
    path: Path, manifest: Manifest, seal: str, load_keys: bool, in_memory: bool, verify: bool
) -> Datastore:
    """A datastore whose arrays lie in its own folder."""
    arrays: dict[str, np.ndarray] = {
        name: open_array(path, name, manifest, in_memory=in_memory, everything=verify)
        for name in manifest.arrays()
        if load_keys or name != KEYS
    }
    return Datastore(
        path,
        manifest,
        arrays.get(KEYS),
        arrays[VALUES],
        seal,
        path / INDEX,
        arrays.get(PROJECTION),
        arrays.get(WEIGHTS),
    )


def open_blocks(
    path: Path,
    manifest: Manifest,
    seal: str,
    *,
    load_keys: bool = True,
    in_memory: bool = False,
    verify: bool = False,
) -> Datastore:
    """A datastore of several blocks, each of which is opened as one of its own.

    Args:
        path: its folder, whose manifest need not have been written yet.
        manifest: of all of it; ``seal`` is its fingerprint.
        load_keys, in_memory, verify: as for ``open_datastore``.

    Raises:
        DatastoreError: where a block is missing, damaged, or another than the manifest says.
    """
    keys: list[np.ndarray] = []
    values: list[np.ndarray] = []
    for block in blocks_of(path, manifest):
        part, own_seal = read_manifest(block.path)
        check_block(block, part, own_seal, manifest)
        found = _open_one(block.path, part, own_seal, load_keys, in_memory, verify)
        values += [found.values[start:stop] for start, stop in block.kept]
        if isinstance(found.keys, np.ndarray):
            keys += [found.keys[start:stop] for start, stop in block.kept]
    return Datastore(
        path,
        manifest,
        Stacked(keys) if keys else None,
        values[0] if len(values) == 1 else np.concatenate(values),
        seal,
        path / INDEX,
    )


def key_files(store: Datastore) -> dict[Path, Sequence[str]]:
    """The files of a datastore's keys, with the checksums of their chunks as they were written.

    Raises:
        DatastoreError: where a block's manifest is damaged by now.
    """
    folders = [block.path for block in store.blocks]
    files = {folder / KEYS: read_manifest(folder)[0].files.get(KEYS) for folder in folders}
    files[store.path / KEYS] = store.manifest.files.get(KEYS)
    return {file: sums.chunks for file, sums in files.items() if sums is not None}


def outline(path: Path) -> Datastore:
    """A datastore without its arrays, which are neither opened nor checked.

    Raises:
        DatastoreError: as ``read_manifest`` does.
    """
    return outlined(path, *read_manifest(path))


def outlined(path: Path, manifest: Manifest, seal: str = "") -> Datastore:
    """The same of a manifest that need not have been written yet."""
    nothing = np.empty(0, manifest.value_dtype)
    return Datastore(path, manifest, None, nothing, seal, path / INDEX)


def open_array(
    path: Path, name: str, manifest: Manifest, *, in_memory: bool = False, everything: bool = False
) -> np.ndarray:
    """One of the arrays that the manifest lists, mapped unless asked otherwise.

    Args:
        path: the datastore.
        name: of the file.
        manifest: of the datastore.
        in_memory: read it into memory.
        everything: check every byte, not a sample.

    Raises:
        DatastoreError: where it is missing, damaged or another.
    """
    file, expected = path / name, manifest.files[name]
    if not file.is_file():
        raise damaged(file, f"{expected.bytes:,} bytes", kind_of(file))
    size = file.stat().st_size
    if size != expected.bytes:
        raise damaged(file, f"{expected.bytes:,} bytes", f"{size:,} bytes")
    if altered(file, expected.chunks, everything=everything):
        raise damaged(file, "the bytes that were written", "other ones (checksums differ)")
    dtype, shape = manifest.arrays()[name]
    try:
        with file.open("rb") as raw:
            found = read_header(raw, size)
            if found != (np.dtype(dtype), shape):
                raise ValueError(f"{found[1]} {found[0]}")
            if in_memory:
                return np.fromfile(raw, dtype, math.prod(shape)).reshape(shape)
            return np.memmap(file, dtype, mode="r", offset=raw.tell(), shape=shape)
    except ValueError as error:
        raise damaged(file, f"{shape} {dtype}", str(error)) from None


def check_numbers(
    name: str, array: Rows, vocabulary: int, *, empty_keys: bool = True
) -> Iterator[str]:
    """Reads an array chunk by chunk, and says what no datastore holds.

    Args:
        name: of its file: keys and projection must be finite, values tokens, weights 1 or more.
        array: with N rows.
        vocabulary: values are below it.
        empty_keys: whether a key may be all zeros.

    Yields:
        At most one message for each kind of fault.
    """
    faults: dict[str, list[int]] = {}  # by kind, the first row and how many
    starts = range(0, len(array), CHECKED_ROWS)
    for start in tqdm(starts, desc=f"reading {name}", unit=" chunks", delay=2):
        check_mapped(array, name)
        part = np.asarray(array[start : start + CHECKED_ROWS])
        for fault, rows in _unsound(name, part, vocabulary, empty_keys=empty_keys).items():
            if rows.any():
                first = faults.setdefault(fault, [start + int(rows.argmax()), 0])
                first[1] += int(rows.sum())
    for fault, (row, count) in faults.items():
        yield f"{fault} in {count:,} of {len(array):,} rows, first in row {row:,}"


def _unsound(
    name: str, part: np.ndarray, vocabulary: int, *, empty_keys: bool
) -> dict[str, np.ndarray]:
    """For each kind of fault which rows have it, (n,) bool."""
    if name == VALUES:
        return {f"a number that is no token id below {vocabulary:,}": _outside(part, vocabulary)}
    if name == WEIGHTS:
        return {"a weight below 1": part < 1}
    faults = {"NaN or infinity": ~np.isfinite(part).all(axis=1)}
    if not empty_keys:
        faults["nothing but zeros, as where a row was never filled,"] = ~part.any(axis=1)
    return faults


def _outside(values: np.ndarray, vocabulary: int) -> np.ndarray:
    return (values < 0) | (values >= vocabulary)


def check_finite(keys: np.ndarray) -> None:
    """Refuses keys (n, D) that are no numbers, before anything is made of them.

    Raises:
        DatastoreError: where there is NaN or infinity.
    """
    if not np.isfinite(keys).all():
        raise DatastoreError(
            "there are keys that are no numbers",
            expected="finite numbers",
            found="NaN or infinity",
            do="check the datastore with `fairseq-knnlm verify`, and save it again",
        )
