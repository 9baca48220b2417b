"""Text to a model's ids and back, byte for byte, against the texts themselves and tokenizers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

tokenizers = pytest.importorskip("tokenizers", reason="needs the extra hf")

from tokenizers import (  # noqa: E402
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from fairseq_knnlm.errors import ConfigError  # noqa: E402
from fairseq_knnlm.runs.inputs import Vocabulary  # noqa: E402
from fairseq_knnlm.runs.token_spelling import AnySpelling  # noqa: E402
from fairseq_knnlm.tasks.hf_tokenizer import HfTokenizer  # noqa: E402
from fairseq_knnlm.tasks.spelling import spelling  # noqa: E402

TEXT = (
    "def nearest(keys, query):  # of all keys\n\treturn min(keys, key=query.distance)\n"
    "\u201cWas hei\u00dft das?\u201d fragt er \u2013 na\u00efve caf\u00e9 \U0001f600\U0001f680 "
    "\u4f60\u597d\u4e16\u754c the the then there 3.14159\n"
)
#: Texts that are asked back, none of them in what the tokenizers were trained on.
ASKED = (
    *("", "Hello, world", " two  spaces ", "tab\tand\rreturn", "a <|endoftext|> b </s> <s>"),
    *(
        "\u2581marks\u2581 \u0120too",
        "<0x41> is no byte",
        "\u00e9t\u00e9 \U0001f9d1\u200d\U0001f680",
    ),
    *("one\ntwo\n\nfour", "\u0645\u0631\u062d\u0628\u0627", "x" * 50),
)


def of_bytes() -> Tokenizer:
    """As GPT-2's."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    return trained(raw, ["<|endoftext|>"], vocab_size=400, initial_alphabet=letters)


def of_marks() -> Tokenizer:
    """As the first Llama's: marks for spaces, and a byte each of what there is no token for."""
    raw = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    raw.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    every = [f"<0x{byte:02X}>" for byte in range(256)]
    return trained(raw, ["<unk>", "<s>", "</s>"], *every, vocab_size=420)


def of_unigrams() -> Tokenizer:
    """As T5's and XGLM's, with the mark put by a pre-tokenizer."""
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    raw.train_from_iterator([TEXT] * 3, trainer)
    return raw


def trained(raw: Tokenizer, special: list[str], *first: str, **how: Any) -> Tokenizer:
    """On the text; the first tokens are special ones, and some that have to be there."""
    every = [*special, *first]
    trainer = trainers.BpeTrainer(special_tokens=every, min_frequency=1, show_progress=False, **how)
    raw.train_from_iterator([TEXT], trainer)
    content = json.loads(raw.to_str())
    # In published files bytes are tokens as all others.
    content["added_tokens"] = [one for one in content["added_tokens"] if one["content"] in special]
    return Tokenizer.from_str(json.dumps(content))


KINDS = {"bytes": of_bytes, "marks": of_marks}


def flags_of(file: str) -> Any:
    """``--bpe hf_tokenizer --hf-tokenizer FILE``."""
    bpe = {"_name": "hf_tokenizer", "hf_tokenizer": file}
    return OmegaConf.create({"bpe": bpe, "tokenizer": None})


def opened(raw: Tokenizer, folder: Path) -> tuple[HfTokenizer, AnySpelling]:
    """The tokenizer as fairseq's flags name it, with a dictionary as ``wrap`` writes them."""
    raw.enable_truncation(3)  # as many published files have it, for the model's training
    raw.enable_padding(length=8)
    raw.save(str(folder / "tokenizer.json"))
    size = raw.get_vocab_size()
    symbols = ["<s>", "<pad>", "</s>", "<unk>", *map(str, range(1, size + 7))]
    flags = flags_of(str(folder / "tokenizer.json"))
    return HfTokenizer(flags.bpe), spelling(flags, Vocabulary(symbols, 1, 2), 3)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_text_comes_back_byte_for_byte(kind: str, tmp_path: Path) -> None:
    bpe, cut = opened(KINDS[kind](), tmp_path)
    mark = " " if kind == "marks" else "\u2581"  # which such a tokenizer takes for a space
    for text in (one.replace("\u2581", mark) for one in (*ASKED, TEXT)):
        tokens = cut.tokens(text)
        assert 3 not in tokens
        assert cut.text(tokens) == text
        if "\n" not in text:
            assert bpe.decode(bpe.encode(text)) == text
    letters = [*map(chr, range(1, 0x250)), *f"\U0001f600\u4f60\ufffd {mark}"]
    rng = random.Random(4)
    for _ in range(200):
        text = "".join(rng.choices(letters, k=rng.randint(1, 30)))
        assert cut.text(cut.tokens(text)) == text


@pytest.mark.parametrize("kind", list(KINDS))
def test_each_token_is_shown_by_itself(kind: str, tmp_path: Path) -> None:
    """Pieces are the text; of the bytes of a character the last has it."""
    _, cut = opened(KINDS[kind](), tmp_path)
    for line in ("then there query.distance the end", "the \u0645\u0645 end\nthen \U0001f9d1"):
        tokens = cut.tokens(line)
        pieces = cut.pieces(tokens)
        assert len(pieces) == len(tokens) and "".join(pieces) == line
    odd = cut.tokens("\u0645")
    assert cut.pieces(odd)[-2:] == ["", "\u0645"]
    assert cut.text(odd[:-1]).endswith("\ufffd")


@pytest.mark.parametrize("kind", list(KINDS))
def test_ids_that_the_tokenizer_has_not_are_no_text(kind: str, tmp_path: Path) -> None:
    """A model may have more; what stands around them is as if they were not there."""
    _, cut = opened(KINDS[kind](), tmp_path)
    line = "then there query"
    tokens, spare = cut.tokens(line), len(cut.vocabulary.symbols) - 1
    middle = len(tokens) // 2
    with_it = [*tokens[:middle], spare, *tokens[middle:]]
    assert cut.text(with_it) == "".join(cut.pieces(with_it)) == line
    assert cut.pieces(with_it)[middle] == ""
    unknown = [*tokens[:middle], 3, *tokens[middle:]]
    assert cut.text(unknown).replace("<unk>", "") == line


def test_marks_that_a_pre_tokenizer_puts(tmp_path: Path) -> None:
    """Of the characters that it knows; nothing stands for the others."""
    raw = of_unigrams()
    bpe, cut = opened(raw, tmp_path)
    for line in ("the then there", "keys key query", "na\u00efve caf\u00e9"):
        assert cut.text(cut.tokens(line)) == line
        assert bpe.decode(bpe.encode(line)) == line


def test_words_are_joined_as_words_are(tmp_path: Path) -> None:
    raw = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "cat": 2}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    _, cut = opened(raw, tmp_path)
    assert cut.text(cut.tokens("the cat\ncat")) == "the cat\ncat"


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs the model's tokenizer"):
        spelling(flags_of(""), Vocabulary(["<s>", "<pad>", "</s>", "<unk>"], 1, 2), 3)
    of_bytes().save(str(tmp_path / "tokenizer.json"))
    flags = flags_of(str(tmp_path / "tokenizer.json"))
    of_another = ["<s>", "<pad>", "</s>", "<unk>", *map(str, range(1, 90))]
    with pytest.raises(ConfigError, match="not the tokenizer of the model"):
        spelling(flags, Vocabulary(of_another, 1, 2), 3)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="is no tokenizer"):
        spelling(flags, Vocabulary(of_another, 1, 2), 3)
