"""What `encode` leaves beside fairseq's files: how the text was cut, and what was counted of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from fairseq_knnlm.datastore.documents import EACH
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.files import Fingerprint, read_sealed, write_sealed
from fairseq_knnlm.runs.raw_text import RawText
from fairseq_knnlm.runs.receipt import sha256
from fairseq_knnlm.runs.tokenizer import FILES, TRANSFORMERS, Tokenizer, open_tokenizer

NAME, FORMAT, VERSION = "encoding.json", "fairseq-knnlm encoding", 1
#: Where figures a word and a byte come from.
COUNTED = "raw text, counted by encode"
#: Ids that are looked at at a time.
STEP = 2**20

Count = Annotated[int, msgspec.Meta(ge=0, le=2**48)]


class Split(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A split.

    Attributes:
        tokens: of it, ends of lines or documents among them.
        fingerprint: over their ids.
        words: of the text, what white space separates.
        bytes: of the text in UTF-8, line ends included.
        items: lines or documents.
        unknown: tokens that the dictionary does not have.
        changed: lines, or documents or parts of one, whose tokens are another text than theirs.
    """

    tokens: Count
    fingerprint: Fingerprint
    words: Count
    bytes: Count
    items: Count
    unknown: Count
    changed: Count


class Encoding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is known of the data.

    Attributes:
        tokenizer: which kind of tokenizer cut the text.
        sha256: over its file, which lies beside.
        special: ids of it that stand for symbols of fairseq's own.
        dictionary: fingerprint of the dictionary's symbols.
        separator: the line that stood between documents, ``"blank"`` for empty ones; None of none.
        splits: by name.
    """

    tokenizer: Literal["sentencepiece", "transformers"]
    sha256: Fingerprint
    special: dict[str, Count]
    dictionary: Fingerprint
    separator: str | None
    splits: dict[str, Split]

    @property
    def by_documents(self) -> bool:
        """Whether the token that ends a line in fairseq's data ends a document here."""
        return self.tokenizer == TRANSFORMERS


@dataclass(frozen=True)
class Encoded:
    """A folder that `encode` wrote.

    Attributes:
        folder: it.
        encoding: what it says of itself.
    """

    folder: Path
    encoding: Encoding

    @property
    def path(self) -> Path:
        """The record."""
        return self.folder / NAME

    def tokenizer(self) -> Tokenizer:
        """What cut the text.

        Raises:
            ConfigError: where its file is gone or was altered, or its library is not installed.
        """
        kind, path = self.encoding.tokenizer, self.folder / FILES[self.encoding.tokenizer]
        found = sha256(path) if path.is_file() else "no such file"
        if found != self.encoding.sha256:
            raise ConfigError(
                f"{path} is not what cut the text of {self.folder}",
                expected=f"SHA-256 {self.encoding.sha256[:12]}...",
                found=found[:12],
                do="encode again",
            )
        return open_tokenizer(kind, path, self.encoding.special)

    def text_of(self, split: str, fingerprint: str) -> RawText | None:
        """What figures a word and a byte are taken over; None of a split that it knows nothing of.

        Args:
            split: its name.
            fingerprint: ``tokens_fingerprint`` of all its tokens, in order.

        Raises:
            ConfigError: where they are others than were written.
        """
        one = self.encoding.splits.get(split)
        if one is None:
            return None
        if one.fingerprint != fingerprint:
            raise ConfigError(
                f"{self.path} is of another text than the split {split}",
                expected=f"tokens with the fingerprint {one.fingerprint[:12]}...",
                found=f"{fingerprint[:12]}...",
                do="encode the text again, or remove that file",
            )
        return RawText(COUNTED, one.words, one.bytes, one.unknown)


def boundary_of(typed: str | None, encoded: Encoded | None) -> str | None:
    """What the first line of each document of a text matches.

    Args:
        typed: what a flag says; None where it was not given.
        encoded: what `encode` left beside the text; None where that is another's work.

    Raises:
        ConfigError: where a flag says something of a text in which a token ends each document.
    """
    if encoded is None or not encoded.encoding.by_documents:
        return typed
    if typed not in (None, EACH):
        raise ConfigError(
            "the documents of the data are known, and no line of it is looked at",
            expected=f"no --document-boundary: a token ends each document of {encoded.folder}",
            found=f"--document-boundary {typed!r}",
            do="leave it out; `encode --document-separator` says what stands between documents",
        )
    return EACH


def write_encoding(folder: Path, encoding: Encoding) -> None:
    """Writes the record into a folder."""
    content: dict[str, Any] = msgspec.to_builtins(encoding)
    write_sealed(folder / NAME, FORMAT, VERSION, content)


def read_encoded(path: Path, dictionary: str) -> Encoded | None:
    """What a folder says of itself; None where fairseq-preprocess wrote it.

    Args:
        path: of the record, ``NAME`` in that folder, which need not be there.
        dictionary: fingerprint of the symbols of the dictionary there.

    Raises:
        ConfigError: where the record is damaged, or of another dictionary.
    """
    if not path.exists():
        return None
    try:
        encoding, _ = read_sealed(path, FORMAT, VERSION, Encoding)
    except ValueError as error:
        raise ConfigError(
            f"{path} is damaged",
            expected="what `fairseq-knnlm encode` wrote",
            found=error,
            do="encode the text again, or remove that file",
        ) from None
    if encoding.dictionary != dictionary:
        raise ConfigError(
            f"{path} is of another dictionary than that beside it",
            expected=f"symbols with the fingerprint {encoding.dictionary[:12]}...",
            found=f"{dictionary[:12]}...",
            do="encode the text again, or remove that file",
        )
    return Encoded(path.parent, encoding)


class Fingerprinting:
    """SHA-256 over ids of tokens, as they come."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def take(self, tokens: np.ndarray) -> None:
        """Takes the next (n,) ids."""
        for start in range(0, len(tokens), STEP):
            some = np.asarray(tokens[start : start + STEP])
            self._digest.update(np.ascontiguousarray(some, dtype="<i4").data)

    @property
    def found(self) -> str:
        """Of all so far, in hex."""
        return self._digest.hexdigest()


def tokens_fingerprint(tokens: np.ndarray) -> str:
    """SHA-256 over the ids (n,) of tokens, as int32 whose first byte is the lowest."""
    made = Fingerprinting()
    made.take(tokens)
    return made.found
