"""Tokenizers of both libraries, learned in a moment, and texts that are hard on them."""

from __future__ import annotations

import io
import json
import random
from typing import Any

import pytest

ENGLISH = [
    f"the {who} {where} was {what}ing"
    for who in ("cat", "dog", "bird")
    for where in ("here", "there")
    for what in ("sing", "walk")
]
#: What texts hold now and then: several spaces, other spaces, marks of tokenizers, characters of
#: several code points and of other planes, from right to left, ends of lines of all kinds.
ODD = (
    *("  ", "\t", "\u00a0", "\u3000", "\u2028", "\u200b", "\ufeff", "\r", "\x00", "\x7f", "\x85"),
    *("\u00e9", "e\u0301", "\u6f22\u5b57", "\U0001f600", "\U0001f468\u200d\U0001f469"),
    *("\u05d0\u202e", "\ufb01", "\uff21"),
    *("<unk>", "<s>", "@@", "</s>", "<0x41>", "the", " cat", "sing", ".", "<|endoftext|>"),
)
#: Settings of sentencepiece with which it alters nothing.
EXACT = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
}


def odd_texts(count: int, more: tuple[str, ...] = (), seed: int = 1) -> list[str]:
    rng = random.Random(seed)
    parts = [*ODD, *more]
    return ["", " ", *("".join(rng.choices(parts, k=rng.randint(1, 60))) for _ in range(count))]


def sentencepiece_model(**settings: Any) -> bytes:
    """A model of a few lines of English, with bytes for what it has no piece of."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    how = {"vocab_size": 300, "hard_vocab_limit": False, "byte_fallback": True, **settings}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(ENGLISH), model_writer=model, minloglevel=2, **how
    )
    return model.getvalue()


def processor(**settings: Any) -> Any:
    """The same, opened by its library."""
    sentencepiece = pytest.importorskip("sentencepiece")
    return sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(**settings))


def byte_level() -> Any:
    """A tokenizer as GPT-2's: bytes are letters. ``<|endoftext|>`` is 0."""
    library = pytest.importorskip("tokenizers")
    raw = library.Tokenizer(library.models.BPE())
    raw.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = library.decoders.ByteLevel()
    return _learned(library, raw, library.pre_tokenizers.ByteLevel.alphabet())


def with_bytes() -> Any:
    """As Llama's: a mark is the space before a word, and bytes have tokens of their own."""
    library = pytest.importorskip("tokenizers")
    raw = library.Tokenizer(library.models.BPE(byte_fallback=True))
    raw.normalizer = library.normalizers.Sequence(
        [library.normalizers.Prepend("\u2581"), library.normalizers.Replace(" ", "\u2581")]
    )
    raw.decoder = library.decoders.Sequence(
        [
            library.decoders.Replace("\u2581", " "),
            library.decoders.ByteFallback(),
            library.decoders.Fuse(),
            library.decoders.Strip(" ", 1, 0),
        ]
    )
    return _learned(library, raw, [], [f"<0x{one:02X}>" for one in range(256)])


def _learned(library: Any, raw: Any, alphabet: list[str], bytes_: list[str] | None = None) -> Any:
    trainer = library.trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=alphabet,
        special_tokens=["<|endoftext|>", *(bytes_ or [])],
        show_progress=False,
    )
    raw.train_from_iterator(ENGLISH, trainer)
    fields = json.loads(raw.to_str())
    fields["added_tokens"] = fields["added_tokens"][:1]  # bytes are no special tokens of a text
    return library.Tokenizer.from_str(json.dumps(fields))
