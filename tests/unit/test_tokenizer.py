"""From text to ids and back, against the libraries' own word and the text itself."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers_at_hand import EXACT, byte_level, odd_texts, processor, with_bytes

from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.runs.tokenizer import (
    Ids,
    Pieces,
    Tokenizer,
    open_ids,
    open_pieces,
    text_of_each,
)

KINDS: dict[str, Callable[[], Tokenizer]] = {
    "sentencepiece": lambda: Pieces(processor(**EXACT)),
    "sentencepiece, with a space before": lambda: Pieces(
        processor(**{**EXACT, "add_dummy_prefix": True})
    ),
    "sentencepiece, space behind": lambda: Pieces(
        processor(**EXACT, treat_whitespace_as_suffix=True)
    ),
    "byte level": lambda: Ids(byte_level(), {"</s>": 0}),
    "byte fallback": lambda: Ids(with_bytes(), {"</s>": 0}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_texts_come_back_as_they_were(kind: str) -> None:
    """Byte by byte, as one text and token by token."""
    tokenizer = KINDS[kind]()
    more = () if tokenizer.lines else ("\n", "\n\n", "\r\n")
    for text in odd_texts(300, more):
        ids = tokenizer.ids(text)
        assert tokenizer.text(ids) == text
        each = text_of_each(tokenizer, ids)
        assert len(each) == len(ids) and "".join(each) == text


@pytest.mark.parametrize("kind", KINDS)
def test_any_ids_are_told_one_by_one(kind: str) -> None:
    """Also those that no text is cut into: halves of characters, and what follows them."""
    tokenizer = KINDS[kind]()
    rng = random.Random(2)
    # Of bytes side by side that library takes all for nothing, or none: of those it has no halves.
    first = 257 if kind == "byte fallback" else 3
    for _ in range(100):
        ids = rng.choices(range(first, len(tokenizer.symbols)), k=rng.randint(0, 60))
        assert "".join(text_of_each(tokenizer, ids)) == tokenizer.text(ids)


def test_a_long_text_is_read_once_more_at_most_a_few_times() -> None:
    """Not from its beginning for each of its tokens."""
    tokenizer = KINDS["sentencepiece"]()
    ids = tokenizer.ids("the cat here was singing " * 400)
    read = 0

    class Counting:
        def text(self, some: list[int]) -> str:
            nonlocal read
            read += len(some)
            return tokenizer.text(some)

    counting: Any = Counting()
    assert "".join(text_of_each(counting, ids)) == tokenizer.text(ids)
    assert read < 100 * len(ids)


def test_what_sentencepiece_alters_is_told_as_it_says() -> None:
    """With its usual settings it alters texts before it cuts them."""
    model = processor()
    tokenizer = Pieces(model)
    for text in odd_texts(200):
        ids = model.encode(text)
        assert tokenizer.ids(text) == ids
        assert "".join(text_of_each(tokenizer, ids)) == model.decode(ids)


def test_symbols_are_those_of_fairseqs_dictionary() -> None:
    model = processor(unk_piece="[UNK]")
    tokenizer = Pieces(model)
    assert tokenizer.symbols[:3] == ["<unk>", "<s>", "</s>"]
    assert tokenizer.symbols[3:] == [model.id_to_piece(n) for n in range(3, len(model))]
    ids = Ids(byte_level(), {"</s>": 0})
    assert ids.symbols[:3] == ["</s>", "1", "2"]
    assert 0 not in ids.ids("a<|endoftext|>b")  # a text is text
    assert ids.text([0]) == "<|endoftext|>"


def test_a_tokenizer_that_cuts_texts_off_does_not(tmp_path: Path) -> None:
    """Truncation and padding are of a model's training, and stand in the same file."""
    raw = byte_level()
    raw.enable_truncation(4)
    raw.enable_padding(length=4)
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_ids(tmp_path / "tokenizer.json", {"</s>": 0})
    text = "the cat here was singing"
    assert tokenizer.text(tokenizer.ids(text)) == text
    assert tokenizer.text(tokenizer.ids("a")) == "a"


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("{}")
    pytest.importorskip("sentencepiece")
    with pytest.raises(ConfigError, match="is no model of sentencepiece"):
        open_pieces(tmp_path / "a")
    pytest.importorskip("tokenizers")
    with pytest.raises(ConfigError, match="is no tokenizer"):
        open_ids(tmp_path / "a", {})
