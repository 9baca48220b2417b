"""Datastores written by urvashik/knnlm: ``PREFIX_keys.npy`` and ``PREFIX_vals.npy``.

Despite their names the files are raw arrays without a header, so their shape is not in them: the
rows come from ``--dstore-size``, the width from the file's length. Types are float32 keys with
int64 values, or with ``--dstore-fp16`` float16 keys with int16 values.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from fairseq_knnlm.datastore.manifest import Manifest, Origin
from fairseq_knnlm.datastore.reader import Datastore
from fairseq_knnlm.datastore.writer import DatastoreWriter
from fairseq_knnlm.errors import DatastoreError
from fairseq_knnlm.files import checksums, chunk_count, fingerprint, sampled_chunks
from fairseq_knnlm.files.arrays import kind_of

#: The key type of the paper; the original code wrote no other by default.
KEY_TYPE = "last_ffn_input"
#: Dimensions of a key at most, as in a manifest.
MOST_WIDTH = 10**6
#: Keys that are looked at when the files are opened.
SAMPLE = 256


def keys_file(prefix: Path) -> Path:
    """``PREFIX_keys.npy``."""
    return prefix.with_name(f"{prefix.name}_keys.npy")


def values_file(prefix: Path) -> Path:
    """``PREFIX_vals.npy``."""
    return prefix.with_name(f"{prefix.name}_vals.npy")


def is_legacy(prefix: Path) -> bool:
    """True where the two files of urvashik/knnlm lie at ``prefix``, or what has their names."""
    if not prefix.name:  # `.` or `/`
        return False
    return keys_file(prefix).exists() and values_file(prefix).exists()


def open_legacy(
    prefix: Path,
    rows: int | None,
    *,
    fp16: bool,
    vocabulary: int | None,
    load_keys: bool = True,
    in_memory: bool = False,
) -> Datastore:
    """Opens a datastore of urvashik/knnlm.

    Args:
        prefix: the two files' common prefix (``--dstore-filename``).
        rows: entries, N (``--dstore-size``).
        fp16: float16 keys and int16 values (``--dstore-fp16``), else float32 and int64.
        vocabulary: types of the dictionary, where known.
        load_keys: False leaves the keys unopened.
        in_memory: read keys and values into memory instead of mapping them.

    Raises:
        DatastoreError: where ``rows`` is missing or does not fit the files, int16 values cannot
            hold the vocabulary, values lie outside it, or keys of a sample were never filled or
            are no numbers.
    """
    key_dtype, value_dtype = ("float16", "int16") if fp16 else ("float32", "int64")
    rows = _checked_rows(prefix, rows)
    _check_holds(prefix, value_dtype, vocabulary)
    _check_files(prefix)
    width = _width(keys_file(prefix), rows, np.dtype(key_dtype).itemsize)
    values = _raw(values_file(prefix), value_dtype, (rows,), in_memory)
    _check_values(prefix, values, vocabulary)
    keys = _raw(keys_file(prefix), key_dtype, (rows, width), in_memory)
    _check_filled(prefix, keys)
    origin = Origin("", "", vocabulary or int(values.max()) + 1, KEY_TYPE)
    manifest = Manifest(rows, width, key_dtype, value_dtype, origin)
    identity = {
        "rows": rows,
        "files": [checksums(file, sampled_chunks(chunk_count(file))) for file in _files(prefix)],
    }
    index_path = prefix.with_name(f"{prefix.name}_knn.index")
    return Datastore(
        prefix, manifest, keys if load_keys else None, values, fingerprint(identity), index_path
    )


def _checked_rows(prefix: Path, rows: int | None) -> int:
    if rows is None:
        raise DatastoreError(
            f"{prefix} is a datastore of urvashik/knnlm, whose files do not say their size",
            expected="--dstore-size ROWS, the number it was written with",
            found="no --dstore-size",
            do="pass it, or convert the datastore once with `fairseq-knnlm import`",
        )
    return rows


def _check_holds(prefix: Path, value_dtype: str, vocabulary: int | None) -> None:
    """Refuses values of a type that cannot hold the vocabulary."""
    limit = np.iinfo(value_dtype).max + 1
    if vocabulary is not None and vocabulary > limit:
        raise DatastoreError(
            f"{values_file(prefix)} holds its token ids as {value_dtype}",
            expected=f"at most {limit:,} types in the dictionary",
            found=f"{vocabulary:,} types: ids above {limit - 1:,} overflowed when it was written",
            do="save the datastore again with fairseq_knnlm, which picks a type that fits",
        )


def _check_files(prefix: Path) -> None:
    for file in _files(prefix):
        if (kind := kind_of(file)) != "a file":
            raise DatastoreError(
                f"{file} cannot be read",
                expected="a file, as urvashik/knnlm writes it",
                found=kind,
                do="check --dstore-filename or --dstore",
            )


def convert(store: Datastore, folder: Path, *, chunk: int = 65536) -> Path:
    """Writes a datastore of urvashik/knnlm as one that describes itself.

    Args:
        store: from ``open_legacy``, with keys.
        folder: the datastore to make.
        chunk: rows copied at a time.

    Raises:
        DatastoreError: where ``folder`` exists, the disk cannot hold it, or a key was never filled
            or is no number; nothing is left of ``folder`` then.
    """
    assert store.keys is not None
    manifest = store.manifest
    writer = DatastoreWriter(
        folder, manifest.rows, manifest.width, manifest.origin, manifest.key_dtype
    )
    with tqdm(total=manifest.rows, desc="converting", unit=" keys", unit_scale=True) as bar:
        for start in range(0, manifest.rows, chunk):
            rows = np.arange(start, min(start + chunk, manifest.rows))
            keys = np.asarray(store.keys[start : start + chunk])
            _check_keys(store.path, keys, start)
            writer.write(rows, keys, store.values[rows])
            bar.update(len(rows))
    return writer.publish()


def _files(prefix: Path) -> tuple[Path, Path]:
    return keys_file(prefix), values_file(prefix)


def _width(file: Path, rows: int, itemsize: int) -> int:
    size = file.stat().st_size
    width, rest = divmod(size, rows * itemsize) if rows > 0 else (0, 1)
    if rest or not 1 <= width <= MOST_WIDTH:
        row = f"{rows * itemsize:,} bytes" if rows > 0 else "a size of 1 or more"
        raise DatastoreError(
            f"{file} does not hold {rows:,} keys of {itemsize} bytes a number",
            expected=f"1 to {MOST_WIDTH:,} times {row}" if rows > 0 else row,
            found=f"{size:,} bytes",
            do="check --dstore-size, and --dstore-fp16 where it was written with it",
        )
    return width


def _raw(file: Path, dtype: str, shape: tuple[int, ...], in_memory: bool) -> np.ndarray:
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if file.stat().st_size != expected:
        raise DatastoreError(
            f"{file} does not hold {shape[0]:,} rows of {dtype}",
            expected=f"{expected:,} bytes",
            found=f"{file.stat().st_size:,} bytes",
            do="check --dstore-size, and --dstore-fp16 where it was written with it",
        )
    mapped = np.memmap(file, dtype=dtype, mode="r", shape=shape)
    return np.array(mapped) if in_memory else mapped


def _check_filled(prefix: Path, keys: np.ndarray) -> None:
    """Looks at a sample of the keys, the first and last among them; ``convert`` looks at all."""
    sample = np.unique(np.linspace(0, len(keys) - 1, SAMPLE).astype(np.int64))
    for row in sample[::-1]:  # the end is where it is missing most often
        _check_keys(prefix, keys[row : row + 1], int(row))


def _check_keys(prefix: Path, keys: np.ndarray, start: int) -> None:
    """Refuses keys, (n, D) from row ``start`` on, that no language model has written."""
    unfilled = ~keys.any(axis=1)
    if unfilled.any():
        raise DatastoreError(
            f"rows of {keys_file(prefix)} were never filled",
            expected="a key in each row",
            found=f"zeros, from row {start + int(unfilled.argmax()):,} on, as where --dstore-size "
            "was larger than the text, or the writer was stopped",
            do="save the datastore again with fairseq_knnlm, which counts the rows itself",
        )
    unsound = ~np.isfinite(keys).all(axis=1)
    if unsound.any():
        raise DatastoreError(
            f"{keys_file(prefix)} holds keys that are no numbers",
            expected="finite numbers",
            found=f"NaN or infinity in row {start + int(unsound.argmax()):,}",
            do="check --dstore-fp16 and --dstore-size; save the datastore again if they are right",
        )


def _check_values(prefix: Path, values: np.ndarray, vocabulary: int | None) -> None:
    low, high = int(values.min()), int(values.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise DatastoreError(
            f"{values_file(prefix)} holds numbers that are no token ids",
            expected=f"0 to {vocabulary - 1:,}" if vocabulary else "0 or more",
            found=f"{low:,} to {high:,}",
            do="check --dstore-fp16 and the dictionary; ids that overflowed cannot be recovered",
        )
