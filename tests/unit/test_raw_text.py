"""Figures a word and a byte, by hand; and which texts are of a split, by texts that are not."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.runs.inputs import Vocabulary
from fairseq_knnlm.runs.raw_text import (
    RawText,
    agree,
    joined_text,
    raw_text,
    spelled_lines,
    text_figures,
)
from fairseq_knnlm.tasks.raw_text import tokens_of
from fairseq_knnlm.tasks.spelling import spelling

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
NOTHING: Any = SimpleNamespace(bpe=None, tokenizer=None)
PIECES = Vocabulary([*SPECIAL, "\u2581the", "\u2581cat", "s", "\u2581sat", "\u00e9"], 1, 2)


def blocks(*texts: list[int]) -> list[dict[str, torch.Tensor]]:
    return [{"target": torch.tensor(text)} for text in texts]


def test_figures_by_hand() -> None:
    """As lm-evaluation-harness has them: exp and bits of the loss over words, and over bytes."""
    raw = "The cat sat.\n\nOn a mat.\n"
    loglikelihood = -37.5
    words, size = len(re.split(r"\s+", raw.strip())), len(raw.encode())
    text = RawText("raw text", words, size, 0)
    found = text_figures(text, 2 * loglikelihood, loglikelihood)
    assert (words, size) == (6, 24)
    assert found["word_perplexity"] == pytest.approx(math.exp(37.5 / 6))
    assert found["byte_perplexity"] == pytest.approx(math.exp(37.5 / 24))
    assert found["bits_per_byte"] == pytest.approx(37.5 / 24 / math.log(2))
    assert found["base_bits_per_byte"] == pytest.approx(2 * found["bits_per_byte"])


def test_what_has_no_figures() -> None:
    text = RawText("raw text", 6, 24, 0)
    assert text_figures(None, -1, -1) == {}
    assert text_figures(text, -1, -math.inf)["word_perplexity"] is None
    assert text_figures(text, -1, -1e9)["word_perplexity"] is None  # beyond what a float holds
    share = text_figures(text, -1, -1, whole=False)
    assert [share[name] for name in share if name != "text"] == [None] * 6


def test_pieces_are_joined_to_the_text_they_were_cut_from() -> None:
    """Line by line, wherever blocks end."""
    cut = spelling(NOTHING, PIECES, 3)
    tokens = tokens_of(blocks([4, 5], [6, 2, 2, 7], [8, 3]), added=False)
    lines = spelled_lines(tokens, 2, cut.text)
    assert lines == ["the cats", "", "sat\u00e9<unk>"]
    text = joined_text(lines, 1)
    assert (text.words, text.unknown) == (3, 1)
    assert text.bytes == len("the cats\n\nsat\u00e9<unk>\n".encode())


def test_an_added_beginning_is_no_token_of_the_text() -> None:
    assert tokens_of(blocks([0, 4, 2], [0, 5, 2]), added=True).tolist() == [4, 2, 5, 2]


WORDS = "the of a in was and to on for as by with he that at from his it an were which".split()


def some_lines(seed: int, count: int = 200) -> list[str]:
    """Of words of one language, some lines empty."""
    rng = random.Random(seed)
    names = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(300)]
    return [
        " ".join(
            rng.choice(WORDS if rng.random() < 0.5 else names) for _ in range(rng.randrange(30))
        )
        for _ in range(count)
    ]


def cut_in_other_ways(line: str) -> str:
    """As Moses does it, and as a corpus writes rare words."""
    line = line.replace("with", "<unk>").replace("at ", "at @-@ ").replace("of", "o &amp; f")
    return re.sub(r"\b(he|it)\b", r"\1 's", line).upper()


def test_a_text_that_was_cut_in_other_ways_is_known() -> None:
    lines = some_lines(0)
    assert agree(lines, lines) == 1
    assert agree(lines, [cut_in_other_ways(line) for line in lines]) > 0.7
    assert agree(["", ""], ["", ""]) == 1
    assert agree(["\uff21\uff22\uff23\uff24"], ["ABCD"]) == 1  # NFKC, as sentencepiece has it


def test_another_text_of_the_same_language_is_known() -> None:
    assert agree(some_lines(0), some_lines(1)) < 0.3


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_words_and_bytes_are_the_raw_texts(tmp_path: Path) -> None:
    lines = some_lines(0)
    path = write(tmp_path / "raw.txt", lines)
    found = raw_text(path, "test", [cut_in_other_ways(line) for line in lines], 7)
    assert found.words == len(path.read_text().split())
    assert found.bytes == path.stat().st_size
    assert (found.source, found.unknown) == ("raw text", 7)
    assert found.agreement is not None and found.agreement > 0.7


def test_a_last_line_without_an_end_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "raw.txt").write_text("one two\nthree")
    assert raw_text(tmp_path / "raw.txt", "test", ["one two", "three"], 0).words == 3


def test_texts_that_are_not_the_splits(tmp_path: Path) -> None:
    lines = some_lines(0)
    others = {
        "199": write(tmp_path / "fewer.txt", lines[:-1]),
        "in common": write(tmp_path / "other.txt", some_lines(1)),
        "no such file": tmp_path / "nowhere.txt",
        "a folder": tmp_path,
    }
    (tmp_path / "latin.txt").write_bytes("caf\u00e9\n".encode("latin-1"))
    others["at byte 3"] = tmp_path / "latin.txt"
    for says, path in others.items():
        with pytest.raises(ConfigError, match=says) as caught:
            raw_text(path, "test", lines, 0)
        assert "expected:" in str(caught.value) and "to do:" in str(caught.value)
