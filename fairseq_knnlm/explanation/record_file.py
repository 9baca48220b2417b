"""Records in files: JSON lines, the first with the ``Run``, then one a text.

A file is read a line at a time, so that a long one takes no memory, and is trusted in nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from fairseq_knnlm.errors import RecordError
from fairseq_knnlm.explanation.record import FORMAT, VERSION, Explained, Run
from fairseq_knnlm.files import MOST_JSON, human_bytes, publish

T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """Texts, and what they have in common.

    Attributes:
        run: the latter.
        texts: the former, each once, in their order.
    """

    run: Run
    texts: Iterable[Explained]


def write_record(path: Path, record: Record) -> int:
    """Writes a record whole, or leaves what was there.

    Returns:
        How many texts were written.

    Raises:
        BusyError: where another process is writing ``path``.
    """
    encoder, count = msgspec.json.Encoder(), 0
    with publish(path) as temporary, temporary.open("wb") as file:
        file.write(encoder.encode(record.run) + b"\n")
        for text in record.texts:
            file.write(encoder.encode(text) + b"\n")
            count += 1
    return count


def read_record(path: Path) -> Record:
    """A record, of which the run is read at once, and each text when it is asked for.

    Raises:
        RecordError: where there is none, or it is of another kind or damaged; of a text, when that
            is asked for.
    """
    try:
        with _opened(path) as file:
            run = _decoded(_line(file, 1), Run, 1)
    except ValueError as error:
        raise _unusable(path, str(error)) from None
    if (run.format, run.version) != (FORMAT, VERSION):
        raise _unusable(path, f"{run.format!r}, version {run.version}")
    return Record(run, _Texts(path, len(run.memories)))


@dataclass(frozen=True)
class _Texts:
    """The texts of a file, which can be gone through several times."""

    path: Path
    memories: int

    def __iter__(self) -> Iterator[Explained]:
        try:
            with _opened(self.path) as file:
                _line(file, 1)
                number = 2
                while line := _line(file, number):
                    text = _decoded(line, Explained, number)
                    self._check(text, number)
                    yield text
                    number += 1
        except ValueError as error:
            raise _unusable(self.path, str(error)) from None

    def _check(self, text: Explained, number: int) -> None:
        """What the types of a record do not say."""
        named = [source.memory for token in text.tokens for source in token.sources]
        if max(named, default=-1) >= self.memories:
            raise ValueError(f"line {number:,}: memory {max(named)} of {self.memories}")
        if any(len(token.agreement) > self.memories for token in text.tokens):
            raise ValueError(f"line {number:,}: agreement of more memories than {self.memories}")
        if any(not token.voices for token in text.tokens):
            raise ValueError(f"line {number:,}: a token without the language model's part")
        if text.given > len(text.tokens):
            raise ValueError(f"line {number:,}: more given tokens than tokens")


def _opened(path: Path) -> BinaryIO:
    if not path.is_file():
        raise ValueError("a folder" if path.is_dir() else "no file")
    return path.open("rb")


def _line(file: BinaryIO, number: int) -> bytes:
    """The next line; empty at the end of the file."""
    line = file.readline(MOST_JSON + 1)
    if len(line) > MOST_JSON:
        raise ValueError(f"line {number:,}: more than {human_bytes(MOST_JSON)}")
    if line and not line.endswith(b"\n"):
        raise ValueError(f"line {number:,}: cut off")
    return line


def _decoded(line: bytes, shape: type[T], number: int) -> T:
    try:
        if shape is Run:
            _check_kind(line)
        return msgspec.json.decode(line, type=shape)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"line {number:,}: {error}") from None


def _check_kind(line: bytes) -> None:
    """Refuses what never was a record, before its fields are looked at."""
    fields: Any = msgspec.json.decode(line)
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise ValueError("a file of another kind")


def _unusable(path: Path, found: str) -> RecordError:
    return RecordError(
        f"{path} cannot be read as sources of tokens",
        expected=f"a file of --json or --sources, version {VERSION}",
        found=found,
        do="write it again with `fairseq-knnlm explain ... --json FILE`",
    )
