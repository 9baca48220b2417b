"""The datastore on disk: one key and one value for each token of a text.

A datastore is a folder that describes itself (``docs/format.md``):

* ``manifest.json``: rows, width, types, and what made it;
* ``keys.npy``: (rows, width) float16 or float32, the language model's representation of a context,
  unless the keys went into the index only;
* ``values.npy``: (rows,) integers, the token that followed;
* ``projection.npy``, ``weights.npy``: only in a datastore made of a larger one (``compress``).

Row i belongs to the i-th token of the split, in the order of the text, so row i + 1 follows row i,
unless entries were merged. The folder is written under a temporary name and renamed whole,
manifest last.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from tqdm import tqdm

from fairseq_knnlm.errors import DatastoreError
from fairseq_knnlm.files import (
    Claim,
    altered,
    check_mapped,
    checksums,
    chunks_of,
    flush_to_disk,
    human_bytes,
    partial_folder,
    read_sealed,
    reserve,
    write_sealed,
)
from fairseq_knnlm.files.arrays import MOST_HEADER, kind_of, read_header

FORMAT = "fairseq-knnlm datastore"
#: Version 2 may lack keys; version 3 is compressed. What needs neither is written as version 1.
VERSION = 3
MANIFEST, KEYS, VALUES = "manifest.json", "keys.npy", "values.npy"
PROJECTION, WEIGHTS = "projection.npy", "weights.npy"
INDEX = "knn.index"
#: Rows that are read at a time where every number is looked at.
CHECKED_ROWS = 65536


Bounded = Annotated[int, msgspec.Meta(ge=1, le=2**48)]
Width = Annotated[int, msgspec.Meta(ge=1, le=10**6)]
#: Of a model, dictionary or datastore; empty where unknown.
Known = Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{64})?$")]


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What made a datastore; what a model must match to use it.

    Attributes:
        model: fingerprint of the language model's weights.
        dictionary: fingerprint of the dictionary.
        vocabulary: types in the dictionary; values are below it.
        key_type: which representation the keys are (``--knn-keytype``).
        split: the data split that was read.
        context: block length, context window and break mode of the forward pass.
        versions: library versions at the time of writing.
    """

    model: Known
    dictionary: Known
    vocabulary: Annotated[int, msgspec.Meta(ge=1, le=2**62)]
    key_type: str
    split: str = ""
    context: dict[str, Annotated[int, msgspec.Meta(ge=-(2**48), le=2**48)] | str | None] = {}
    versions: dict[str, str] = {}


class Compression(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a datastore was made of a larger one.

    Attributes:
        datastore: fingerprint of the larger one.
        rows: its entries.
        width: dimensions of its keys.
        pca: principal components kept; None where keys were not projected.
        merge: nearest neighbours that an entry could absorb; None where none were merged.
        seed: of everything random in it.
    """

    datastore: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    rows: Bounded
    width: Width
    pca: Width | None
    merge: Bounded | None
    seed: int

    def describe(self) -> str:
        """``"from 2,088,628 entries of width 256 by --merge 8 --pca 128 --seed 0"``."""
        chosen = {"merge": self.merge, "pca": self.pca, "seed": self.seed}
        flags = " ".join(f"--{name} {value}" for name, value in chosen.items() if value is not None)
        return f"from {self.rows:,} entries of width {self.width} by {flags}"


class Sums(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What tells whether a file is as it was written.

    Attributes:
        bytes: its length.
        chunks: its checksums, one for each 64 MiB.
    """

    bytes: Annotated[int, msgspec.Meta(ge=0, le=2**62)]
    chunks: Sequence[Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shape, types and origin of a datastore.

    Attributes:
        rows: entries, N.
        width: dimensions of a key, D, or P after PCA.
        key_dtype: ``"float16"`` or ``"float32"``; None for a datastore that kept no keys.
        value_dtype: the integer type of the values.
        origin: what made it.
        files: the arrays by name.
        compressions: what was done to the datastore that was saved, in that order.
    """

    rows: Bounded
    width: Width
    key_dtype: Annotated[str, msgspec.Meta(pattern="^float(16|32)$")] | None
    value_dtype: Annotated[str, msgspec.Meta(pattern="^(uint16|int32|int64)$")]
    origin: Origin
    files: dict[str, Sums] = {}
    compressions: Sequence[Compression] = ()

    @property
    def query_width(self) -> int:
        """Dimensions of the language model's keys, which are projected where ``width`` is less."""
        return self.compressions[0].width if self.compressions else self.width

    @property
    def merged(self) -> bool:
        """Whether entries were merged, so that row i + 1 need not follow row i."""
        return any(step.merge for step in self.compressions)

    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of each array that there must be, by the name of its file."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        if self.key_dtype is not None:
            found[KEYS] = self.key_dtype, (self.rows, self.width)
        found[VALUES] = self.value_dtype, (self.rows,)
        if any(step.pca for step in self.compressions):
            found[PROJECTION] = "float32", (self.query_width, self.width)
        if self.merged:
            found[WEIGHTS] = "int32", (self.rows,)
        return found


@dataclass(frozen=True)
class Datastore:
    """An opened datastore.

    Attributes:
        path: its folder, or the prefix of the two raw files of urvashik/knnlm.
        manifest: shape, types, origin.
        keys: (N, D) float16 or float32, memory-mapped unless asked otherwise; None where left out
            or not kept.
        values: (N,) integers.
        fingerprint: SHA-256 over the manifest, which holds checksums of the content.
        index_path: where its index lies unless said otherwise.
        projection: (D, P) float32, takes the language model's keys to those of the datastore;
            None where they are the same.
        weights: (N,) int32, entries that each one stands for; None where each is one.
    """

    path: Path
    manifest: Manifest
    keys: np.ndarray | None
    values: np.ndarray
    fingerprint: str
    index_path: Path
    projection: np.ndarray | None = None
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return self.manifest.rows

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

    def full_keys(self) -> np.ndarray:
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


def value_dtype(vocabulary: int) -> np.dtype:
    """The smallest of uint16, int32 and int64 that holds every token id below ``vocabulary``."""
    for name in ("uint16", "int32", "int64"):
        if vocabulary - 1 <= np.iinfo(name).max:
            return np.dtype(name)
    raise AssertionError(vocabulary)


def datastore_bytes(rows: int, width: int, key_dtype: str | None, vocabulary: int) -> int:
    """Bytes on disk of a datastore, headers, manifest and index aside."""
    key_bytes = width * np.dtype(key_dtype).itemsize if key_dtype else 0
    return rows * (key_bytes + value_dtype(vocabulary).itemsize)


class DatastoreWriter:
    """Writes a datastore under a temporary name; ``publish`` gives it its own.

    Rows may come in any order, each exactly once. What is not published is removed, also when
    the program ends on an error.

    Args:
        path: the folder to make; must not exist.
        rows: entries, N: all of them must be written.
        width: dimensions of a key, D.
        origin: what makes it.
        key_dtype: ``"float16"`` or ``"float32"``; None to keep no keys.
        compressions: what was done to the datastore that was saved.
        projection: (D, P) float32, where keys were projected to P dimensions, here ``width``.
        weights: (N,) int32, where entries were merged.

    Raises:
        DatastoreError: where ``path`` exists, or the disk cannot hold the datastore.
    """

    def __init__(
        self,
        path: Path,
        rows: int,
        width: int,
        origin: Origin,
        key_dtype: str | None = "float16",
        *,
        compressions: Sequence[Compression] = (),
        projection: np.ndarray | None = None,
        weights: np.ndarray | None = None,
    ) -> None:
        self.path = path
        self.width = width
        self.origin = origin
        self.compressions = compressions
        check_new(path)
        if rows < 1:
            raise DatastoreError(
                "there is nothing to put into a datastore",
                expected="1 token or more",
                found="an empty split",
                do="save another split",
            )
        extras = {PROJECTION: projection, WEIGHTS: weights}
        extra_bytes = sum(array.nbytes for array in extras.values() if array is not None)
        needed = datastore_bytes(rows, width, key_dtype, origin.vocabulary) + extra_bytes
        path.parent.mkdir(parents=True, exist_ok=True)
        check_room(path.parent, needed)
        self._claim = Claim(path)
        self._folder = partial_folder(path)
        self._arrays: dict[str, np.memmap] = {}
        self._keys = self._array(KEYS, np.dtype(key_dtype), (rows, width)) if key_dtype else None
        self._values = self._array(VALUES, value_dtype(origin.vocabulary), (rows,))
        for name, array in extras.items():
            if array is not None:
                self._array(name, array.dtype, array.shape)[:] = array
        self._written = np.zeros(rows, dtype=bool)

    def _array(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
        """A new array among those that will be published."""
        file = Path(self._folder.name, name)
        with file.open("wb") as header:
            described = {
                "descr": np.lib.format.dtype_to_descr(dtype),
                "fortran_order": False,
                "shape": shape,
            }
            np.lib.format.write_array_header_1_0(header, described)
            start = header.tell()
        reserve(file, start + math.prod(shape) * dtype.itemsize)
        self._arrays[name] = np.lib.format.open_memmap(file, mode="r+")
        return self._arrays[name]

    def write(self, rows: np.ndarray, keys: np.ndarray, values: np.ndarray) -> None:
        """Writes entries.

        Args:
            rows: (n,) int64, where in the datastore.
            keys: (n, D), cast to the key type; checked, but not kept, where no keys are.
            values: (n,) token ids.

        Raises:
            DatastoreError: where a row is outside the datastore or written already, a value is
                no token of the vocabulary, or a key does not fit the type (float16 ends at
                65,504).
        """
        if rows.size and (rows.min() < 0 or rows.max() >= len(self._written)):
            raise self._miscount("a token beyond the end of the split")
        if self._written[rows].any() or len(np.unique(rows)) < len(rows):
            raise self._miscount("a token that came twice")
        if values.size and (values.min() < 0 or values.max() >= self.origin.vocabulary):
            raise DatastoreError(
                "a token is not in the dictionary",
                expected=f"ids from 0 to {self.origin.vocabulary - 1:,}",
                found=f"ids from {values.min():,} to {values.max():,}",
                do="binarise the text with the dictionary of the checkpoint",
            )
        with np.errstate(over="ignore"):  # reported just below, in words
            keys = keys if self._keys is None else keys.astype(self._keys.dtype, copy=False)
        if not np.isfinite(keys).all():
            raise DatastoreError(
                "a key does not fit the type it is stored in",
                expected=f"finite numbers in {keys.dtype}",
                found="infinity or NaN",
                do="save with --dstore-fp32, or check the checkpoint",
            )
        if self._keys is not None:
            self._keys[rows] = keys
        self._values[rows] = values
        self._written[rows] = True

    def publish(self, add_files: Callable[[Path, str], object] | None = None) -> Path:
        """Checks that every row was written, then gives the folder its name.

        Args:
            add_files: writes more into the folder before that, given it and the fingerprint.

        Raises:
            DatastoreError: where rows are missing; nothing is published then.
        """
        missing = len(self._written) - int(self._written.sum())
        if missing:
            raise self._miscount(f"{missing:,} tokens missing")
        folder = Path(self._folder.name)
        files: dict[str, Sums] = {}
        for name, array in self._arrays.items():
            array.flush()
            flush_to_disk(folder / name)
            size = (folder / name).stat().st_size
            files[name] = Sums(size, checksums(folder / name))
        manifest = Manifest(
            rows=len(self._values),
            width=self.width,
            key_dtype=None if self._keys is None else str(self._keys.dtype),
            value_dtype=str(self._values.dtype),
            origin=self.origin,
            files=files,
            compressions=self.compressions,
        )
        seal = _write_manifest(folder / MANIFEST, manifest)
        if add_files is not None:
            add_files(folder, seal)
        check_new(self.path)  # somebody may have been faster
        folder.chmod(0o755)
        flush_to_disk(folder)
        folder.rename(self.path)
        flush_to_disk(self.path.parent)
        self._folder.cleanup()
        self._claim.release()
        return self.path

    def _miscount(self, found: str) -> DatastoreError:
        return DatastoreError(
            "the datastore would not hold every token of the split exactly once",
            expected=f"{len(self._written):,} tokens, each once",
            found=found,
            do="nothing was published; use --sample-break-mode none and no --batch-size padding",
        )


def check_new(path: Path) -> None:
    """Refuses to write over anything.

    Raises:
        DatastoreError: where ``path`` exists.
    """
    if path.exists():
        raise DatastoreError(
            f"{path} exists already",
            expected="a new path for a datastore",
            found="a datastore" if (path / MANIFEST).exists() else "a file or folder",
            do="choose another path, or remove it first",
        )


def check_room(folder: Path, needed: int) -> None:
    """Refuses work that the disk cannot hold.

    Raises:
        DatastoreError: where fewer than ``needed`` bytes are free under ``folder``.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DatastoreError(
            f"the disk under {folder} cannot hold the datastore",
            expected=f"{human_bytes(needed)} free",
            found=f"{human_bytes(free)} free",
            do="make room, choose another disk, or save a smaller split",
        )


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
    manifest, seal = read_manifest(path)
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


def outline(path: Path) -> Datastore:
    """A datastore without its arrays, which are neither opened nor checked.

    Raises:
        DatastoreError: as ``read_manifest`` does.
    """
    manifest, seal = read_manifest(path)
    nothing = np.empty(0, manifest.value_dtype)
    return Datastore(path, manifest, None, nothing, seal, path / INDEX)


def read_manifest(path: Path) -> tuple[Manifest, str]:
    """The manifest of the datastore at ``path``, and its fingerprint.

    Raises:
        DatastoreError: where there is none, or it is damaged or of a newer version; it names the
            field that is not as it should be.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise DatastoreError(
            f"no datastore at {path}",
            expected=f"a folder with {MANIFEST}, or PREFIX with PREFIX_keys.npy and --dstore-size",
            found="a folder without it" if path.is_dir() else "nothing",
            do="save one: fairseq-eval-lm ... --save-knnlm-dstore --dstore-mmap PATH",
        )
    try:
        manifest, seal = read_sealed(
            file, FORMAT, VERSION, Manifest, lambda fields: {"compressions": [], **fields}
        )
        _check_manifest(manifest)
        return manifest, seal
    except ValueError as error:
        raise _damaged(file, "the manifest as it was written", str(error)) from None


def _check_manifest(manifest: Manifest) -> None:
    """Refuses fields that contradict each other.

    Raises:
        ValueError: naming the field.
    """
    if np.iinfo(manifest.value_dtype).max < manifest.origin.vocabulary - 1:
        raise ValueError(
            f"{manifest.value_dtype}, which cannot hold {manifest.origin.vocabulary:,} types "
            "- at `$.value_dtype`"
        )
    width = manifest.query_width
    for number, step in enumerate(manifest.compressions):
        place = f"at `$.compressions[{number}]`"
        if step.width != width:
            raise ValueError(f"width {step.width} after {width} - {place}")
        width = step.pca or width
        if width > step.width:
            raise ValueError(f"pca {width} of width {step.width} - {place}")
        if step.pca is None and step.merge is None:
            raise ValueError(f"neither pca nor merge - {place}")
    if width != manifest.width:
        raise ValueError(f"{manifest.width} after compressing to {width} - at `$.width`")
    arrays = manifest.arrays()
    if different := sorted(set(arrays) ^ set(manifest.files)):
        known = "missing" if different[0] in arrays else "not to be expected"
        raise ValueError(f"{different[0]}, which is {known} - at `$.files`")
    for name, (dtype, shape) in arrays.items():
        sums = manifest.files[name]
        least = math.prod(shape) * np.dtype(dtype).itemsize
        if not least < sums.bytes <= least + MOST_HEADER:
            raise ValueError(
                f"{sums.bytes:,} for {shape} {dtype}, {least:,} bytes and a header "
                f"- at `$.files.{name}.bytes`"
            )
        if len(sums.chunks) != chunks_of(sums.bytes):
            raise ValueError(
                f"{len(sums.chunks)} checksums for {sums.bytes:,} bytes "
                f"- at `$.files.{name}.chunks`"
            )


def _write_manifest(file: Path, manifest: Manifest) -> str:
    """Writes it in the oldest version that can say it; returns the fingerprint."""
    content = msgspec.to_builtins(manifest)
    if manifest.compressions:
        return write_sealed(file, FORMAT, VERSION, content)
    del content["compressions"]
    return write_sealed(file, FORMAT, 1 if manifest.key_dtype else 2, content)


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
        raise _damaged(file, f"{expected.bytes:,} bytes", kind_of(file))
    size = file.stat().st_size
    if size != expected.bytes:
        raise _damaged(file, f"{expected.bytes:,} bytes", f"{size:,} bytes")
    if altered(file, expected.chunks, everything=everything):
        raise _damaged(file, "the bytes that were written", "other ones (checksums differ)")
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
        raise _damaged(file, f"{shape} {dtype}", str(error)) from None


def check_numbers(
    name: str, array: np.ndarray, vocabulary: int, *, empty_keys: bool = True
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


def _damaged(file: Path, expected: str, found: str) -> DatastoreError:
    return DatastoreError(
        f"{file} is damaged",
        expected=expected,
        found=found,
        do="restore it from a copy, or save the datastore again",
    )
