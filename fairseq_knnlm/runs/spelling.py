"""From text to tokens and back, as a language model's text was cut."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fairseq_knnlm.runs.inputs import Vocabulary

#: Begins a word, in pieces of sentencepiece.
WORD_BEGINS = "\u2581"
#: Ends a piece that is not the end of a word, in pieces of subword-nmt.
WORD_GOES_ON = "@@"
#: What sentencepiece makes of a character that it has no piece for, a piece a byte.
BYTE = re.compile("<0x[0-9A-F]{2}>")
#: Part of a dictionary that ends or begins in a mark, from which on it is one of pieces.
MARKED = 0.05
#: Bytes that are no character, as Python holds them in text.
LONE = re.compile("[\udc80-\udcff]")
#: Writes one symbol of a dictionary as text in UTF-8, given whether it begins a line. Not every
#: symbol is whole characters.
Join = Callable[[str, bool], bytes]


def pieces_of(symbols: Sequence[str]) -> str:
    """The mark of pieces of words, where the dictionary is one of these; else nothing."""
    least = MARKED * len(symbols)
    if sum(symbol.startswith(WORD_BEGINS) for symbol in symbols) > least:
        return WORD_BEGINS
    return WORD_GOES_ON if sum(map(_goes_on, symbols)) > least else ""


def _goes_on(symbol: str) -> bool:
    return symbol.endswith(WORD_GOES_ON)


def line_spelling(symbols: Sequence[str]) -> Callable[[Iterable[int]], str]:
    """Writes the tokens of a line as text, without the one that ends it.

    What of ``--post-process`` fairseq-eval-lm knows is done anyway: a symbol that ends in the mark
    of subword-nmt is never a word.

    Args:
        symbols: the dictionary, which tells of itself whether it is one of sentencepiece.
    """
    join = join_pieces if pieces_of(symbols) == WORD_BEGINS else join_halves

    def write(tokens: Iterable[int]) -> str:
        pieces = [join(symbols[token], not place) for place, token in enumerate(tokens)]
        return joined(pieces).rstrip()

    return write


def join_words(symbol: str, begins_line: bool) -> bytes:
    """A word, with the space before it."""
    return (symbol if begins_line else f" {symbol}").encode()


def join_pieces(symbol: str, begins_line: bool) -> bytes:
    """A piece of sentencepiece, whose mark is the space before it; or a byte."""
    if BYTE.fullmatch(symbol):
        return bytes([int(symbol[3:5], 16)])
    text = symbol.replace(WORD_BEGINS, " ")
    return (text.removeprefix(" ") if begins_line else text).encode()


def join_halves(symbol: str, _: bool) -> bytes:
    """A piece of subword-nmt, with the space after it where it ends a word."""
    goes_on = symbol.endswith(WORD_GOES_ON)
    return (symbol.removesuffix(WORD_GOES_ON) if goes_on else f"{symbol} ").encode()


def joined(pieces: Iterable[bytes]) -> str:
    """Pieces as one text; what is no character is the sign that stands for one."""
    return b"".join(pieces).decode(errors="replace")


def shown(piece: bytes) -> str:
    """A piece alone, in which bytes that are no character have their numbers: ``<0xE2>``."""
    text = piece.decode(errors="surrogateescape")
    return LONE.sub(lambda found: f"<0x{ord(found[0]) - 0xDC00:02X}>", text)


@dataclass(frozen=True)
class Spelling:
    """How a text is cut into tokens, and what tokens are as text.

    Attributes:
        vocabulary: the dictionary.
        split: from a line of text to symbols of the dictionary.
        join: from a symbol to text in UTF-8.
        unknown: the id of what the dictionary does not have.
    """

    vocabulary: Vocabulary
    split: Callable[[str], Sequence[str]]
    join: Join
    unknown: int

    def tokens(self, text: str) -> list[int]:
        """The ids of a text; where it has several lines, an end of line stands between them."""
        ids = self.vocabulary.ids
        found: list[int] = []
        for number, line in enumerate(text.split("\n")):
            found += [self.vocabulary.eos] if number else []
            found += [ids.get(symbol, self.unknown) for symbol in self.split(line)]
        return found

    def pieces(self, tokens: Iterable[int]) -> list[str]:
        """The text of each token; one after the other they are the whole text, but for bytes."""
        return list(map(shown, self._pieces(tokens)))

    def text(self, tokens: Iterable[int]) -> str:
        """The text of all tokens."""
        return joined(self._pieces(tokens))

    def _pieces(self, tokens: Iterable[int]) -> list[bytes]:
        vocabulary, begins_line = self.vocabulary, True
        found: list[bytes] = []
        for token in tokens:
            if token == vocabulary.eos:
                found.append(b"\n")
            elif token in (vocabulary.pad, vocabulary.bos):
                found.append(b"")
                continue
            else:
                found.append(self.join(vocabulary.symbols[token], begins_line))
            begins_line = token == vocabulary.eos
        return found
