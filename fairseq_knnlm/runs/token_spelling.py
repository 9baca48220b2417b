"""From text to the ids of a dictionary and back by the tokenizer itself, byte for byte."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import groupby
from typing import Protocol

from fairseq_knnlm.runs.inputs import Vocabulary
from fairseq_knnlm.runs.tokenizer import TRANSFORMERS, Tokenizer, text_of_each


class AnySpelling(Protocol):
    """How a text is cut into tokens, and what tokens are as text.

    Attributes:
        vocabulary: the dictionary.
        unknown: the id of what the dictionary does not have.
    """

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def unknown(self) -> int: ...

    def tokens(self, text: str) -> list[int]:
        """The ids of a text."""

    def pieces(self, tokens: Iterable[int]) -> list[str]:
        """The text of each token."""

    def text(self, tokens: Iterable[int]) -> str:
        """The text of all tokens."""


class TokenizerSpelling:
    """By a tokenizer that has the ids of its own pieces.

    Args:
        vocabulary: the dictionary.
        unknown: the id of what it does not have.
        tokenizer: whose symbols the dictionary has.
    """

    def __init__(self, vocabulary: Vocabulary, unknown: int, tokenizer: Tokenizer) -> None:
        self.vocabulary = vocabulary
        self.unknown = unknown
        self._tokenizer = tokenizer

    @cached_property
    def _places(self) -> list[int]:
        """The dictionary's id of each id of the tokenizer."""
        ids = self.vocabulary.ids
        return [ids.get(symbol, self.unknown) for symbol in self._tokenizer.symbols]

    @cached_property
    def _own(self) -> dict[int, int]:
        """The tokenizer's id of each id of the dictionary that has a text."""
        types = self.vocabulary
        without = {types.pad, types.eos, types.bos, self.unknown, types.ids.get("<s>")}
        pairs = enumerate(self._places)
        return {place: one for one, place in pairs if place not in without}

    def tokens(self, text: str) -> list[int]:
        """The ids of a text; where it is cut by lines, an end of line stands between them."""
        found: list[int] = []
        for number, part in enumerate(text.split("\n") if self._tokenizer.lines else [text]):
            found += [self.vocabulary.eos] if number else []
            found += [self._places[one] for one in self._tokenizer.ids(part)]
        return found

    def pieces(self, tokens: Iterable[int]) -> list[str]:
        """The text of each token; one after the other they are the whole text.

        Where several make a character, the last of them has it, and the others have nothing.
        """
        found: list[str] = []
        for ends, run in self._lines(tokens):
            found += ["\n" for _ in run] if ends else self._pieces(run)
        return found

    def text(self, tokens: Iterable[int]) -> str:
        """The text of all tokens, in which an end of a line or document is an end of line."""
        lines = self._lines(tokens)
        return "".join("\n" * len(run) if ends else self._text(run) for ends, run in lines)

    def _lines(self, tokens: Iterable[int]) -> Iterator[tuple[bool, list[int]]]:
        """Ends of lines, of which several may follow each other, and what stands between them."""
        for ends, run in groupby(tokens, self.vocabulary.eos.__eq__):
            yield ends, [*run]

    def _pieces(self, line: list[int]) -> list[str]:
        """A line token by token; one that is not the tokenizer's interrupts what it reads not."""
        known = [self._own[token] for token in line if token in self._own]
        told = iter(text_of_each(self._tokenizer, known))
        return [next(told) if token in self._own else self._alone(token) for token in line]

    def _text(self, line: list[int]) -> str:
        if all(token in self._own for token in line):
            return self._tokenizer.text([self._own[token] for token in line])
        return "".join(self._pieces(line))

    def _alone(self, token: int) -> str:
        """A token that is none of the tokenizer's: a model may have more ids, which are no text."""
        types = self.vocabulary
        symbol = types.symbols[token]
        spare = self._tokenizer.kind == TRANSFORMERS and symbol.isdecimal()
        return "" if spare or token in (types.pad, types.bos) or symbol == "<s>" else symbol
