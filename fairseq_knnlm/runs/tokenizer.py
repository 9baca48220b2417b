"""What cuts text into tokens and puts it together again, byte by byte: two libraries, one contract.

Nothing here loads a language model, so that a process which only cuts text starts at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from fairseq_knnlm.errors import ConfigError, first_line, kind_and_line

#: The two libraries, by what their models are called, and the file that each opens.
SENTENCEPIECE, TRANSFORMERS = "sentencepiece", "transformers"
FILES = {SENTENCEPIECE: "sentencepiece.model", TRANSFORMERS: "tokenizer.json"}

#: Stands for bytes that are no character.
NO_CHARACTER = "\ufffd"
#: Ids before an id that are read again to tell its text, at least.
READ_AGAIN = 16


class Tokenizer(Protocol):
    """From text to a tokenizer's own ids and back.

    Attributes:
        kind: ``SENTENCEPIECE`` or ``TRANSFORMERS``.
        lines: whether it is given a text line by line, and a token of its own ends a line; else it
            is given all of a document, and that token ends a document.
        symbols: what each id is called in fairseq's dictionary, the place of each is the id; two
            ids may have one name, that of fairseq's own symbols.
    """

    kind: str
    lines: bool
    symbols: Sequence[str]

    def ids(self, text: str) -> list[int]:
        """The ids of a text, nothing added to it."""

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids; what is no character is the sign that stands for one."""


class Pieces:
    """A model of sentencepiece.

    Args:
        model: ``sentencepiece.SentencePieceProcessor``.
    """

    kind, lines = SENTENCEPIECE, True

    def __init__(self, model: Any) -> None:
        self._model = model
        symbols = [str(model.id_to_piece(one)) for one in range(model.get_piece_size())]
        if (unknown := model.unk_id()) >= 0:
            symbols[unknown] = "<unk>"
        self.symbols: Sequence[str] = symbols

    def ids(self, text: str) -> list[int]:
        found: list[int] = self._model.encode(text)
        return found

    def text(self, ids: Sequence[int]) -> str:
        found: str = self._model.decode([*ids])
        return found


class Ids:
    """A ``tokenizer.json``, as transformers writes it: ids are their own names.

    Args:
        tokenizer: ``tokenizers.Tokenizer``.
        special: ids that stand for symbols of fairseq's own, by the symbol.
        lines: whether it is given a text line by line, as fairseq-preprocess is.
    """

    kind = TRANSFORMERS

    def __init__(self, tokenizer: Any, special: dict[str, int], lines: bool = False) -> None:
        self.lines = lines
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # a text is text, whatever is called like them
        self._tokenizer = tokenizer
        size = 1 + max([*tokenizer.get_vocab(with_added_tokens=True).values(), *special.values()])
        symbols = [str(one) for one in range(size)]
        for symbol, one in special.items():
            symbols[one] = symbol
        self.symbols: Sequence[str] = symbols

    def ids(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def text(self, ids: Sequence[int]) -> str:
        found: str = self._tokenizer.decode([*ids], skip_special_tokens=False)
        return found


def text_of_each(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each id; one after the other they are the text of all.

    Where several ids make a character, the last of them has it, and the others have nothing.
    """
    found: list[str] = []
    first, told = 0, ""
    for place, one in enumerate(ids):
        whole = tokenizer.text(ids[first : place + 1])
        if whole.endswith(NO_CHARACTER) and place < len(ids) - 1:
            found.append("")  # perhaps a part of one
            continue
        found.append(whole[len(told) :])
        alone = tokenizer.text([one])
        if place - first >= READ_AGAIN and alone.strip() and found[-1].endswith(alone.strip()):
            first, told = place, alone  # a beginning like any other: none is read too often
        else:
            told = whole
    return found


def open_pieces(path: Path) -> Pieces:
    """Opens a model of sentencepiece.

    Raises:
        ConfigError: where it is none, or sentencepiece is not installed.
    """
    try:
        import sentencepiece
    except ImportError as error:
        raise _not_installed("sentencepiece", "sentencepiece", error) from error
    try:
        return Pieces(sentencepiece.SentencePieceProcessor(model_file=str(path)))
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{path} is no model of sentencepiece",
            expected="a file that spm_train wrote, such as sentencepiece.model",
            found=kind_and_line(error),
        ) from None


def open_ids(path: Path, special: dict[str, int], lines: bool = False) -> Ids:
    """Opens a ``tokenizer.json``.

    Args:
        path: of the file.
        special: ids that stand for symbols of fairseq's own, by the symbol.
        lines: whether it is given a text line by line.

    Raises:
        ConfigError: where it is none, or tokenizers is not installed.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise _not_installed("tokenizers", "fairseq-knnlm[hf]", error) from error
    try:
        return Ids(tokenizers.Tokenizer.from_file(str(path)), special, lines)
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(
            f"{path} is no tokenizer",
            expected="tokenizer.json, as transformers or `fairseq-knnlm wrap` writes it",
            found=first_line(error)[:200],
        ) from None


def open_tokenizer(kind: str, path: Path, special: dict[str, int]) -> Tokenizer:
    """Opens a tokenizer of either kind, as ``open_pieces`` and ``open_ids`` do."""
    return open_pieces(path) if kind == SENTENCEPIECE else open_ids(path, special)


def _not_installed(library: str, name: str, error: ImportError) -> ConfigError:
    return ConfigError(
        f"the tokenizer is one of {library}, which is not installed",
        expected=f"the library {library}",
        found=str(error),
        do=f"pip install '{name}'",
    )
