"""Writing a datastore: under a temporary name, row by row in any order, published whole."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from fairseq_knnlm.datastore.manifest import (
    BLOCKS,
    KEYS,
    MANIFEST,
    PROJECTION,
    VALUES,
    WEIGHTS,
    Compression,
    Manifest,
    Origin,
    Sums,
    value_dtype,
    write_manifest,
)
from fairseq_knnlm.errors import BusyError, DatastoreError
from fairseq_knnlm.files import (
    Claim,
    checksums,
    flush_to_disk,
    human_bytes,
    make_folders,
    partial_folder,
    reserve,
    tidy,
)


class DatastoreWriter:
    """Writes a datastore under a temporary name; ``publish`` gives it its own.

    Rows may come in any order, each exactly once. What is not published is removed, also when
    the program ends on an error.

    Args:
        path: the folder to make; must not exist, or be empty.
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
        check_new(path, or_empty=True)
        _check_some(rows)
        extras = {PROJECTION: projection, WEIGHTS: weights}
        extra_bytes = sum(array.nbytes for array in extras.values() if array is not None)
        needed = datastore_bytes(rows, width, key_dtype, origin.vocabulary) + extra_bytes
        make_folders(path.parent)
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

    @property
    def rows(self) -> int:
        """Entries that there will be, N."""
        return len(self._written)

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
        self._check_rows(rows)
        self._check_values(values)
        keys = self._checked_keys(keys)
        if self._keys is not None:
            self._keys[rows] = keys
        self._values[rows] = values
        self._written[rows] = True

    def _check_rows(self, rows: np.ndarray) -> None:
        if rows.size and (rows.min() < 0 or rows.max() >= len(self._written)):
            raise self._miscount("a token beyond the end of the split")
        if self._written[rows].any() or len(np.unique(rows)) < len(rows):
            raise self._miscount("a token that came twice")

    def _check_values(self, values: np.ndarray) -> None:
        if values.size and (values.min() < 0 or values.max() >= self.origin.vocabulary):
            raise DatastoreError(
                "a token is not in the dictionary",
                expected=f"ids from 0 to {self.origin.vocabulary - 1:,}",
                found=f"ids from {values.min():,} to {values.max():,}",
                do="binarise the text with the dictionary of the checkpoint",
            )

    def _checked_keys(self, keys: np.ndarray) -> np.ndarray:
        """The keys in the type they are stored in."""
        with np.errstate(over="ignore"):  # reported just below, in words
            keys = keys if self._keys is None else keys.astype(self._keys.dtype, copy=False)
        if not np.isfinite(keys).all():
            raise DatastoreError(
                "a key does not fit the type it is stored in",
                expected=f"finite numbers in {keys.dtype}",
                found="infinity or NaN",
                do="save with --dstore-fp32, or check the checkpoint",
            )
        return keys

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
        seal = write_manifest(folder / MANIFEST, self._manifest())
        if add_files is not None:
            add_files(folder, seal)
        check_new(self.path, or_empty=True)  # somebody may have been faster
        folder.chmod(0o755)
        flush_to_disk(folder)
        folder.rename(self.path)
        flush_to_disk(self.path.parent)
        self._folder.cleanup()
        self._claim.release()
        return self.path

    def _manifest(self) -> Manifest:
        """Of the arrays, once all their bytes are on the disk."""
        folder = Path(self._folder.name)
        files: dict[str, Sums] = {}
        for name, array in self._arrays.items():
            array.flush()
            flush_to_disk(folder / name)
            size = (folder / name).stat().st_size
            files[name] = Sums(size, checksums(folder / name))
        return Manifest(
            rows=len(self._values),
            width=self.width,
            key_dtype=None if self._keys is None else str(self._keys.dtype),
            value_dtype=str(self._values.dtype),
            origin=self.origin,
            files=files,
            compressions=self.compressions,
        )

    def _miscount(self, found: str) -> DatastoreError:
        return DatastoreError(
            "the datastore would not hold every token of the split exactly once",
            expected=f"{len(self._written):,} tokens, each once",
            found=found,
            do="nothing was published; use --sample-break-mode none and no --batch-size padding",
        )


def _check_some(rows: int) -> None:
    if rows < 1:
        raise DatastoreError(
            "there is nothing to put into a datastore",
            expected="1 token or more",
            found="an empty split",
            do="save another split",
        )


def is_empty(path: Path) -> bool:
    """Whether a folder is there with nothing in it, as of a process killed when it had made it."""
    return path.is_dir() and not any(path.iterdir())


def check_new(path: Path, *, or_empty: bool = False) -> None:
    """Refuses to write over anything.

    Args:
        path: where something will be.
        or_empty: whether a folder with nothing in it is as good as none.

    Raises:
        DatastoreError: where ``path`` exists.
    """
    if path.exists() and not (or_empty and is_empty(path)):
        with suppress(BusyError, OSError):
            tidy_made(path)
        raise DatastoreError(
            f"{path} exists already",
            expected="a new path for a datastore",
            found="a datastore" if (path / MANIFEST).exists() else "a file or folder",
            do="choose another path, or remove it first",
        )


def tidy_made(path: Path) -> None:
    """Removes what a process left that was killed when it had published a datastore, if it did."""
    if path.exists():
        Claim(path).release()
    if (path / MANIFEST).is_file():
        tidy_all(path)


def tidy_all(path: Path) -> None:
    """Removes what killed processes left in a datastore's folder, and in those of its blocks."""
    for folder in (path, path / BLOCKS, *(path / BLOCKS).glob("[0-9]*")):
        tidy(folder)


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


def datastore_bytes(rows: int, width: int, key_dtype: str | None, vocabulary: int) -> int:
    """Bytes on disk of a datastore, headers, manifest and index aside."""
    key_bytes = width * np.dtype(key_dtype).itemsize if key_dtype else 0
    return rows * (key_bytes + value_dtype(vocabulary).itemsize)
