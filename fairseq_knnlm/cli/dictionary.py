"""Naming a dictionary, which spells the tokens of a datastore, and reading it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fairseq_knnlm.errors import ConfigError

if TYPE_CHECKING:
    from fairseq_knnlm.runs.encoded import Encoded


def add_dictionary(parser: argparse.ArgumentParser, what: str) -> None:
    """The argument that names a dictionary, and what it is for."""
    parser.add_argument(
        "--data",
        dest="dictionary",  # where there is data, unknown flags are taken for fairseq's
        type=Path,
        help=f"folder that fairseq-preprocess wrote, or a dict.txt: {what}",
    )


def check_named(path: Path | None, what: str) -> None:
    """Refuses to go without a dictionary.

    Args:
        path: of the dictionary; None where none was named.
        what: needs one, in words.

    Raises:
        ConfigError: where none was named.
    """
    if path is None:
        raise ConfigError(
            what,
            expected="--data DATA, the folder that was binarised, or its dict.txt",
            found="no --data",
        )


def check_dictionary(path: Path | None) -> None:
    """Refuses what is no dictionary; None, where none was named, is right.

    Raises:
        ConfigError: where there is none.
    """
    if path is not None and not dictionary_file(path).is_file():
        raise ConfigError(
            f"no dictionary at {path}",
            expected="--data DATA, a folder that fairseq-preprocess wrote, or its dict.txt",
            found="a folder without dict.txt" if path.is_dir() else "no such file",
            do="check the path",
        )


def read_encoded_data(path: Path, symbols: Sequence[str]) -> Encoded | None:
    """What `encode` left beside a dictionary of these symbols; None where that is another's work.

    Raises:
        ConfigError: where it is damaged, or of another dictionary.
    """
    from fairseq_knnlm.lm.fingerprints import dictionary_fingerprint
    from fairseq_knnlm.runs.encoded import NAME, read_encoded

    beside = dictionary_file(path).with_name(NAME)
    return read_encoded(beside, dictionary_fingerprint(symbols))


def read_spelling(path: Path) -> Callable[[Sequence[int]], str] | None:
    """What writes tokens as text by the tokenizer that cut them; None where that is not known."""
    import fairseq_knnlm.tasks  # noqa: F401  before fairseq, of which it keeps noise off the screen

    from fairseq.data import Dictionary  # isort: skip
    from fairseq_knnlm.runs.inputs import Vocabulary
    from fairseq_knnlm.runs.token_spelling import TokenizerSpelling

    types = Dictionary.load(str(dictionary_file(path)))
    encoded = read_encoded_data(path, types.symbols)
    if encoded is None:
        return None
    vocabulary = Vocabulary(types.symbols, types.pad(), types.eos(), types.bos())
    return TokenizerSpelling(vocabulary, types.unk(), encoded.tokenizer()).text


def read_dictionary(path: Path) -> tuple[list[str], int]:
    """The symbols of a dictionary, in order, and the id of the one that ends a line."""
    import fairseq_knnlm.tasks  # noqa: F401  before fairseq, of which it keeps noise off the screen

    from fairseq.data import Dictionary  # isort: skip

    found = Dictionary.load(str(dictionary_file(path)))
    return found.symbols, found.eos()


def dictionary_file(path: Path) -> Path:
    """The dictionary that a path names: itself, or the one in that folder."""
    return path / "dict.txt" if path.is_dir() else path
