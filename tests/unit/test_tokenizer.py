"""From text to ids and back, against the libraries' own word and the text itself."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.runs.tokenizer import (
    Ids,
    Pieces,
    Tokenizer,
    open_ids,
    open_pieces,
    text_of_each,
)

ENGLISH = [f"the {a} {b} was {c}ing" for a in "cat dog bird".split() for b in "here there".split()
           for c in "sing walk".split()]  # fmt: skip
#: What texts hold now and then: several spaces, other spaces, marks of tokenizers, parts of
#: characters, characters of other planes, right to left, ends of lines of all kinds.
ODD = [
    *("  ", "\t", "\u00a0", "\u3000", "\u2028", "\u200b", "\ufeff", "\r", "\x00", "\x7f", "\x85"),
    *("\u00e9", "e\u0301", "\u6f22\u5b57", "\U0001f600", "\U0001f468\u200d\U0001f469", "\u05d0\u202e"),
    *("<unk>", "<s>", "@@", "</s>", "<0x41>", "the", " cat", "sing", ".", "\ufb01", "\uff21"),
]  # fmt: skip


def odd_texts(count: int, more: list[str] | None = None, seed: int = 1) -> list[str]:
    rng = random.Random(seed)
    parts = [*ODD, *(more or [])]
    return ["", " ", *("".join(rng.choices(parts, k=rng.randint(1, 60))) for _ in range(count))]


def trained(**settings: Any) -> Any:
    """A processor of sentencepiece, of a few lines of English."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(ENGLISH),
        model_writer=model,
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


EXACT = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
}


def byte_level(library: Any) -> Any:
    """As GPT-2's: bytes are letters."""
    raw = library.Tokenizer(library.models.BPE())
    raw.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = library.decoders.ByteLevel()
    return _learned(library, raw, library.pre_tokenizers.ByteLevel.alphabet())


def with_fallback(library: Any) -> Any:
    """As Llama's: a mark is the space before a word, and bytes have tokens of their own."""
    raw = library.Tokenizer(library.models.BPE(byte_fallback=True))
    raw.normalizer = library.normalizers.Sequence(
        [library.normalizers.Prepend("\u2581"), library.normalizers.Replace(" ", "\u2581")]
    )
    parts = [
        library.decoders.Replace("\u2581", " "),
        library.decoders.ByteFallback(),
        library.decoders.Fuse(),
        library.decoders.Strip(" ", 1, 0),
    ]
    raw.decoder = library.decoders.Sequence(parts)
    bytes_ = [f"<0x{one:02X}>" for one in range(256)]
    return _learned(library, raw, [], bytes_)


def _learned(library: Any, raw: Any, alphabet: list[str], more: list[str] | None = None) -> Any:
    trainer = library.trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=alphabet,
        special_tokens=["<|endoftext|>", *(more or [])],
        show_progress=False,
    )
    raw.train_from_iterator(ENGLISH, trainer)
    if more:  # bytes are no special tokens of the text
        fields = json.loads(raw.to_str())
        fields["added_tokens"] = fields["added_tokens"][:1]
        raw = library.Tokenizer.from_str(json.dumps(fields))
    return raw


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "sentencepiece": lambda: Pieces(trained(**EXACT)),
    "sentencepiece, with a space before": lambda: Pieces(
        trained(**{**EXACT, "add_dummy_prefix": True})
    ),
    "sentencepiece, space behind": lambda: Pieces(
        trained(**EXACT, treat_whitespace_as_suffix=True)
    ),
    "byte level": lambda: Ids(byte_level(pytest.importorskip("tokenizers")), {"</s>": 0}),
    "byte fallback": lambda: Ids(with_fallback(pytest.importorskip("tokenizers")), {"</s>": 0}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_texts_come_back_as_they_were(kind: str) -> None:
    """Byte by byte, as one text and token by token."""
    tokenizer = KINDS[kind]()
    more = ["<|endoftext|>", "\n", "\n\n", "\r\n"] if not tokenizer.lines else []
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
    model = trained()
    tokenizer = Pieces(model)
    for text in odd_texts(200):
        ids = model.encode(text)
        assert tokenizer.ids(text) == ids
        assert "".join(text_of_each(tokenizer, ids)) == model.decode(ids)


def test_symbols_are_those_of_fairseqs_dictionary() -> None:
    model = trained(unk_piece="[UNK]")
    tokenizer = Pieces(model)
    assert tokenizer.symbols[:3] == ["<unk>", "<s>", "</s>"]
    assert tokenizer.symbols[3:] == [model.id_to_piece(n) for n in range(3, len(model))]
    tokenizers = pytest.importorskip("tokenizers")
    ids = Ids(byte_level(tokenizers), {"</s>": 0})
    assert ids.symbols[:3] == ["</s>", "1", "2"]
    assert 0 not in ids.ids("a<|endoftext|>b")  # a text is text
    assert ids.text([0]) == "<|endoftext|>"


def test_a_tokenizer_that_cuts_texts_off_does_not(tmp_path: Path) -> None:
    """Truncation and padding are of a model's training, and stand in the same file."""
    raw = byte_level(pytest.importorskip("tokenizers"))
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
