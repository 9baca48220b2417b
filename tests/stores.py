"""Small datastores for the tests of single modules, and ways to spoil a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fairseq_knnlm.datastore import Datastore, DatastoreWriter, Origin, open_datastore
from fairseq_knnlm.errors import KnnlmError


def origin(vocabulary: int = 50) -> Origin:
    return Origin("a" * 64, "b" * 64, vocabulary, "last_ffn_input", split="train")


def random_entries(rows: int, width: int, vocabulary: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """(rows, width) float32 keys and (rows,) token ids, always the same."""
    rng = np.random.default_rng(rows + width)
    keys = rng.normal(size=(rows, width)).astype(np.float32)
    return keys, rng.integers(0, vocabulary, size=rows)


def write_store(
    path: Path, keys: np.ndarray, values: np.ndarray, vocabulary: int = 50, dtype: str = "float32"
) -> Datastore:
    """Writes a datastore in one go and opens it."""
    writer = DatastoreWriter(path, *keys.shape, origin(vocabulary), dtype)
    writer.write(np.arange(len(keys)), keys, values)
    return open_datastore(writer.publish())


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def alter(file: Path) -> None:
    """Changes one bit in the middle of the file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def assert_helps(caught: pytest.ExceptionInfo[KnnlmError], *words: str) -> None:
    """The message says what was expected, what was found and what to do, and the words given."""
    message = str(caught.value)
    for word in ("expected: ", "found:    ", "to do:    ", *words):
        assert word in message, message
