"""Text to tokens and back: what a reader of the text would say."""

from __future__ import annotations

from typing import Any

import pytest

from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.runs.inputs import Vocabulary
from fairseq_knnlm.runs.spelling import line_spelling, pieces_of
from fairseq_knnlm.tasks.spelling import spelling

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
NOTHING: Any = type("Flags", (), {"bpe": None, "tokenizer": None})
WORDS = Vocabulary([*SPECIAL, "the", "cat", "sat", "."], 1, 2, 0)
PIECES = Vocabulary([*SPECIAL, "\u2581the", "\u2581cat", "s", "\u2581sat", "."], 1, 2)
HALVES = Vocabulary([*SPECIAL, "the", "ca@@", "ts", "sa@@", "t"], 1, 2)


def test_words_stand_with_spaces_between_them() -> None:
    cut = spelling(NOTHING, WORDS, 3)
    assert cut.tokens("the cat\nsat on") == [4, 5, 2, 6, 3]
    assert cut.pieces([0, 4, 5, 2, 6, 3, 1]) == ["", "the", " cat", "\n", "sat", " <unk>", ""]
    assert cut.text([4, 5, 2, 6]) == "the cat\nsat"
    assert cut.tokens("") == []


def test_pieces_are_joined_again() -> None:
    assert spelling(NOTHING, PIECES, 3).text([4, 5, 6, 7, 8, 2, 4]) == "the cats sat.\nthe"
    assert spelling(NOTHING, HALVES, 3).text([4, 5, 6, 7, 8]).strip() == "the cats sat"


def test_pieces_that_are_bytes_make_characters() -> None:
    """The three bytes of a quotation mark in UTF-8; where one is missing, the sign for that."""
    bytes_ = Vocabulary([*SPECIAL, "\u2581a", "<0xE2>", "<0x80>", "<0x9C>", "\u2581"], 1, 2)
    cut = spelling(NOTHING, bytes_, 3)
    assert cut.text([4, 5, 6, 7, 4]) == "a\u201c a"
    assert cut.text([4, 8, 5, 6, 4]) == "a \ufffd a"
    assert line_spelling(bytes_.symbols)([4, 5, 6, 7]) == "a\u201c"
    assert cut.pieces([5, 6, 7]) == ["<0xE2>", "<0x80>", "<0x9C>"]
    words = Vocabulary([*SPECIAL, "a", "<0x41>"], 1, 2)
    assert spelling(NOTHING, words, 3).text([5, 4]) == "<0x41> a"


@pytest.mark.parametrize(
    ("vocabulary", "mark", "flag"),
    [(PIECES, "\u2581", "--bpe sentencepiece"), (HALVES, "@@", "--bpe subword_nmt")],
)
def test_pieces_need_what_cut_them(vocabulary: Vocabulary, mark: str, flag: str) -> None:
    """Nothing is guessed: looked up whole, nearly every word would be unknown."""
    assert pieces_of(vocabulary.symbols) == mark
    with pytest.raises(ConfigError, match=flag):
        spelling(NOTHING, vocabulary, 3).tokens("the cat")


def test_of_a_type_that_stands_there_twice_the_first_counts() -> None:
    """As in fairseq's dictionary."""
    assert spelling(NOTHING, Vocabulary([*SPECIAL, "a", "b", "a"], 1, 2), 3).tokens("a") == [4]
