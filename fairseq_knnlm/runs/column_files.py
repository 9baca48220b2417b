"""Files that others published: the words of a text, and the probability each word was given."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from fairseq_knnlm.errors import TableError
from fairseq_knnlm.files.arrays import check_file, read_header

#: A probability above 1, or a logarithm above 0, by no more than this is rounding.
ROUNDING = 1e-3
#: The logarithms that people publish: of what base.
BASES = {"e": math.e, "2": 2.0, "10": 10.0}
#: What reading a damaged archive can end in.
DAMAGES = (
    *(zipfile.BadZipFile, zlib.error, EOFError, KeyError),
    *(NotImplementedError, RuntimeError),
)


@dataclass(frozen=True)
class ColumnFile:
    """Where a column lies.

    Attributes:
        name: of the column.
        path: a text with a number a line, alone or behind its word; an ``.npy``; or an ``.npz``.
        array: which one of an ``.npz``; the one there is, where left out.
    """

    name: str
    path: Path
    array: str = ""

    def __str__(self) -> str:
        return f"column {self.name} ({self.path}{':' + self.array if self.array else ''})"


def read_words(path: Path, line_end: str = "") -> list[str]:
    """The words of a tokenised text, which blanks and lines separate.

    Args:
        path: UTF-8.
        line_end: a word that is added at the end of every line, where the text leaves it out.

    Raises:
        TableError: where there is no such text, or no word in it.
    """
    try:
        check_file(path)
        lines = path.read_text(encoding="utf-8").splitlines()
    except ValueError as error:  # UnicodeDecodeError is one
        raise TableError(
            f"{path} cannot be read",
            expected="a tokenised text in UTF-8, words with blanks or lines between them",
            found="bytes that are no UTF-8" if isinstance(error, UnicodeError) else error,
        ) from None
    end = [line_end] if line_end else []
    words = [word for line in lines for word in [*line.split(), *end]]
    if not words:
        raise TableError(f"{path} holds no words", expected="a tokenised text", found="none")
    return words


def read_column(file: ColumnFile, words: Sequence[str], base: float = math.e) -> np.ndarray:
    """The log-probability of every word: (N,) float32, natural log, finite, at most 0.

    Numbers from 0 to 1 are taken for probabilities, and where any is below 0, all for logarithms.

    Args:
        file: where they lie.
        words: N of them.
        base: of the logarithms.

    Raises:
        TableError: where it is no column of these words, naming the first that is not as it should
            be: of another length, of other words, NaN, above 1, or of 0.
    """
    try:
        check_file(file.path)
        with file.path.open("rb") as opened:
            magic = opened.read(6)
        if magic == b"\x93NUMPY":
            values = _of_npy(file, words)
        elif magic[:4] == b"PK\x03\x04":
            values = _of_npz(file, words)
        else:
            values = _of_text(file, words)
            _check_length(file, len(values), words)
    except ValueError as error:
        raise TableError(
            f"{file} cannot be read",
            expected="a number a word: a text with one a line, alone or behind its word; an .npy; "
            "or NAME=FILE.npz:ARRAY",
            found=error,
        ) from None
    return _log_probs(file, values.astype(np.float64), words, base)


def _of_npy(file: ColumnFile, words: Sequence[str]) -> np.ndarray:
    with file.path.open("rb") as opened:
        return _vector(file, opened, file.path.stat().st_size, words)


def _of_npz(file: ColumnFile, words: Sequence[str]) -> np.ndarray:
    """One array of an archive, also of one that is compressed.

    Raises:
        ValueError: where it is not there, or damaged.
    """
    try:
        with zipfile.ZipFile(file.path) as archive:
            names = [one.removesuffix(".npy") for one in archive.namelist()]
            name = file.array or (names[0] if len(names) == 1 else file.name)
            if name not in names:
                raise ValueError(f"no array {name}, but {', '.join(names) or 'none'}")
            member = archive.getinfo(f"{name}.npy")
            with archive.open(member) as opened:
                return _vector(file, opened, member.file_size, words)
    except DAMAGES as error:
        raise ValueError(f"a damaged archive: {error}") from None


def _vector(file: ColumnFile, opened: IO[bytes], size: int, words: Sequence[str]) -> np.ndarray:
    """An array of one dimension, of floating-point numbers, as many as there are words."""
    dtype, shape = read_header(opened, size)
    if len(shape) != 1 or dtype.kind != "f":
        raise ValueError(f"{shape} numbers of type {dtype}, in the place of (N,) float")
    _check_length(file, shape[0], words)  # before any byte is unpacked
    content = opened.read(shape[0] * dtype.itemsize + 1)
    if len(content) != shape[0] * dtype.itemsize:
        raise ValueError(f"{len(content):,} bytes for {shape[0]:,} numbers of type {dtype}")
    return np.frombuffer(content, dtype)


def _of_text(file: ColumnFile, words: Sequence[str]) -> np.ndarray:
    """A number a line, or a word and a number.

    Raises:
        ValueError: naming the line that is neither.
        TableError: where it has other words, naming the first.
    """
    values = []
    with file.path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            *word, value = line.split() or [""]
            try:
                values.append(float(value))
            except ValueError:
                raise ValueError(f"line {number:,}: {line.strip()[:80]!r}") from None
            if len(word) > 1:
                raise ValueError(f"line {number:,}: {line.strip()[:80]!r}")
            if word and number <= len(words) and word[0] != words[number - 1]:
                raise TableError(
                    f"{file} is of other words than the text",
                    expected=f"{words[number - 1]!r}, word {number:,} of the text",
                    found=f"{word[0]!r}",
                    do="give the text that these probabilities are of",
                )
    return np.array(values)


def _check_length(file: ColumnFile, rows: int, words: Sequence[str]) -> None:
    if rows != len(words):
        raise TableError(
            f"{file} is of another length than the text",
            expected=f"{len(words):,} numbers, one for each word",
            found=f"{rows:,}",
            do="give the text that these probabilities are of, ends of lines included "
            "(--line-end WORD adds them)",
        )


def _log_probs(
    file: ColumnFile, values: np.ndarray, words: Sequence[str], base: float
) -> np.ndarray:
    logarithms = bool((values < 0).any())
    most = 0.0 if logarithms else 1.0
    kind = "logarithms of probabilities" if logarithms else "probabilities"
    for wrong, what in (
        (np.isnan(values), "no number (NaN)"),
        (values > most + ROUNDING, f"above {most:g} among {kind}"),
        (np.isneginf(values) | (not logarithms and values == 0), "a probability of 0"),
    ):
        if wrong.any():
            place = int(np.argmax(wrong))
            raise TableError(
                f"{file} holds what is no probability of a word that was there",
                expected="numbers above 0 and up to 1, or logarithms of such",
                found=f"{values[place]:g} for word {place + 1:,} ({words[place]!r}), {what}; "
                f"{int(wrong.sum()):,} such in {len(values):,}",
                do="take the column as its authors give it, or leave it out",
            )
    logs = values * math.log(base) if logarithms else np.log(values)
    return np.minimum(logs, 0.0).astype(np.float32)
