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
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fairseq_knnlm.errors import DatastoreError
from fairseq_knnlm.files import (
    Claim,
    altered,
    checksums,
    flush_to_disk,
    human_bytes,
    partial_prefix,
    read_sealed,
    reserve,
    write_sealed,
)

FORMAT = "fairseq-knnlm datastore"
#: Version 2 may lack keys; version 3 is compressed. What needs neither is written as version 1.
VERSION = 3
MANIFEST, KEYS, VALUES = "manifest.json", "keys.npy", "values.npy"
PROJECTION, WEIGHTS = "projection.npy", "weights.npy"
INDEX = "knn.index"
KEY_DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class Origin:
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

    model: str
    dictionary: str
    vocabulary: int
    key_type: str
    split: str = ""
    context: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Compression:
    """How a datastore was made of a larger one.

    Attributes:
        datastore: fingerprint of the larger one.
        rows: its entries.
        width: dimensions of its keys.
        pca: principal components kept; None where keys were not projected.
        merge: nearest neighbours that an entry could absorb; None where none were merged.
        seed: of everything random in it.
    """

    datastore: str
    rows: int
    width: int
    pca: int | None
    merge: int | None
    seed: int

    def describe(self) -> str:
        """``"from 2,088,628 entries of width 256 by --merge 8 --pca 128 --seed 0"``."""
        chosen = {"merge": self.merge, "pca": self.pca, "seed": self.seed}
        flags = " ".join(f"--{name} {value}" for name, value in chosen.items() if value is not None)
        return f"from {self.rows:,} entries of width {self.width} by {flags}"


@dataclass(frozen=True)
class Manifest:
    """Shape, types and origin of a datastore.

    Attributes:
        rows: entries, N.
        width: dimensions of a key, D, or P after PCA.
        key_dtype: ``"float16"`` or ``"float32"``; None for a datastore that kept no keys.
        value_dtype: the integer type of the values.
        origin: what made it.
        files: for each file its ``bytes`` and the checksums of its ``chunks``.
        compressions: what was done to the datastore that was saved, in that order.
    """

    rows: int
    width: int
    key_dtype: str | None
    value_dtype: str
    origin: Origin
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    compressions: Sequence[Compression] = ()

    @property
    def query_width(self) -> int:
        """Dimensions of the language model's keys, which are projected where ``width`` is less."""
        return self.compressions[0].width if self.compressions else self.width

    @property
    def merged(self) -> bool:
        """Whether entries were merged, so that row i + 1 need not follow row i."""
        return any(step.merge for step in self.compressions)


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
        extras = {PROJECTION: projection, WEIGHTS: weights}
        extra_bytes = sum(array.nbytes for array in extras.values() if array is not None)
        needed = datastore_bytes(rows, width, key_dtype, origin.vocabulary) + extra_bytes
        path.parent.mkdir(parents=True, exist_ok=True)
        check_room(path.parent, needed)
        self._claim = Claim(path)
        self._folder = tempfile.TemporaryDirectory(
            prefix=partial_prefix(path), dir=path.parent, ignore_cleanup_errors=True
        )
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
        files = {}
        for name, array in self._arrays.items():
            array.flush()
            flush_to_disk(folder / name)
            size = (folder / name).stat().st_size
            files[name] = {"bytes": size, "chunks": checksums(folder / name)}
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
    manifest, seal = _read_manifest(path)
    keys = None
    shape = (manifest.rows, manifest.width)
    if load_keys and manifest.key_dtype:
        keys = _open_array(path, KEYS, manifest.key_dtype, shape, manifest, in_memory, verify)
    values = _open_array(path, VALUES, manifest.value_dtype, shape[:1], manifest, in_memory, verify)
    projection = weights = None
    if PROJECTION in manifest.files:
        wide = (manifest.query_width, manifest.width)
        projection = _open_array(path, PROJECTION, "float32", wide, manifest, in_memory, verify)
    if WEIGHTS in manifest.files:
        weights = _open_array(path, WEIGHTS, "int32", shape[:1], manifest, in_memory, verify)
    return Datastore(path, manifest, keys, values, seal, path / INDEX, projection, weights)


def _read_manifest(path: Path) -> tuple[Manifest, str]:
    """The manifest and its fingerprint."""
    file = path / MANIFEST
    if not file.is_file():
        raise DatastoreError(
            f"no datastore at {path}",
            expected=f"a folder with {MANIFEST}, or PREFIX with PREFIX_keys.npy and --dstore-size",
            found="a folder without it" if path.is_dir() else "nothing",
            do="save one: fairseq-eval-lm ... --save-knnlm-dstore --dstore-mmap PATH",
        )
    try:
        fields, seal = read_sealed(file, FORMAT, VERSION, dict)
        return _manifest(**fields), seal
    except (TypeError, ValueError) as error:
        raise _damaged(file, "the manifest as it was written", str(error)) from None


def _manifest(
    origin: dict[str, Any], compressions: Sequence[dict[str, Any]] = (), **fields: Any
) -> Manifest:
    steps = [Compression(**step) for step in compressions]
    return Manifest(origin=Origin(**origin), compressions=steps, **fields)


def _write_manifest(file: Path, manifest: Manifest) -> str:
    """Writes it in the oldest version that can say it; returns the fingerprint."""
    content = asdict(manifest)
    if manifest.compressions:
        return write_sealed(file, FORMAT, VERSION, content)
    del content["compressions"]
    return write_sealed(file, FORMAT, 1 if manifest.key_dtype else 2, content)


def _open_array(
    path: Path,
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    manifest: Manifest,
    in_memory: bool,
    verify: bool,
) -> np.ndarray:
    file = path / name
    expected = manifest.files[name]
    if not file.is_file():
        raise _damaged(file, f"{expected['bytes']:,} bytes", "no such file")
    size = file.stat().st_size
    if size != expected["bytes"]:
        raise _damaged(file, f"{expected['bytes']:,} bytes", f"{size:,} bytes")
    if altered(file, expected["chunks"], everything=verify):
        raise _damaged(file, "the bytes that were written", "other ones (checksums differ)")
    array = np.load(file, mmap_mode=None if in_memory else "r", allow_pickle=False)
    if array.shape != shape or array.dtype != np.dtype(dtype):
        raise _damaged(file, f"{shape} {dtype}", f"{array.shape} {array.dtype}")
    return array


def _damaged(file: Path, expected: str, found: str) -> DatastoreError:
    return DatastoreError(
        f"{file} is damaged",
        expected=expected,
        found=found,
        do="restore it from a copy, or save the datastore again",
    )
