"""From text to the ids of a dictionary and back by the tokenizer itself, byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import groupby
from typing import Protocol

from fairseq_knnlm.runs.inputs import Vocabulary
from fairseq_knnlm.runs.tokenizer import Tokenizer, text_of_each


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
        """The text of each token; one after the other they are the whole text."""
        return self._told(tokens, lambda ids: text_of_each(self._tokenizer, ids))

    def text(self, tokens: Iterable[int]) -> str:
        """The text of all tokens, in which an end of a line or document is an end of line."""
        return "".join(self._told(tokens, lambda ids: [self._tokenizer.text(ids)]))

    def _told(self, tokens: Iterable[int], tell: Callable[[Sequence[int]], list[str]]) -> list[str]:
        found: list[str] = []
        for known, run in groupby(tokens, self._own.__contains__):
            some = [*run]
            found += tell([self._own[one] for one in some]) if known else map(self._alone, some)
        return found

    def _alone(self, token: int) -> str:
        """A token that is none of the tokenizer's."""
        types = self.vocabulary
        if token == types.eos:
            return "\n"
        symbol = types.symbols[token]
        return "" if token in (types.pad, types.bos) or symbol == "<s>" else symbol
