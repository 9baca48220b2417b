"""Data that ``encode`` wrote, in the commands that read it: counts, documents, exact texts."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_calls import Capture, call, refuse, say
from conftest import eval_lm, must
from tiny_world import BLOCKS, PLUGIN, TINY, training
from tokenizers_at_hand import ENGLISH, EXACT, byte_level, sentencepiece_model

from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.explanation.record_file import read_record

#: What is lost where a text is put together of words: several spaces, a tab, letters of several
#: bytes, a space at the end.
ODD = "  the caf\u00e9\t\u6f22\u5b57  was \U0001f600 "
KNN = ("--k", 8, "--lmbda", 0.3)


def text_of(documents: int, first: int) -> str:
    """Documents of three lines, an empty one between them."""
    return "\n\n".join(
        f"= the {number} =\n{ENGLISH[number % len(ENGLISH)]}\n{ODD}"
        for number in range(first, first + documents)
    )


class World:
    """Encoded text and a language model of it."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.folder = folder
        self.checkpoint = checkpoint
        self.data = folder / "data"

    def evaluate(self, to: Path, *flags: object) -> dict[str, Any]:
        """What a run tells."""
        words = [self.data, *PLUGIN, "--path", self.checkpoint, "--gen-subset", "test", *BLOCKS]
        words += ["--sample-break-mode", "none", "--max-tokens", 64, "--cpu", "--num-workers", 0]
        eval_lm([str(word) for word in [*words, "--results-json", to, *flags]])
        found: dict[str, Any] = json.loads(to.read_text())
        return found

    @property
    def reading(self) -> tuple[object, ...]:
        return (self.data, "--path", self.checkpoint, *BLOCKS, "--cpu")

    def dstore(self) -> Path:
        path = self.folder / "dstore"
        if not path.exists():
            assert call("save", *self.reading, "--dstore", path) == 0
            assert call("build-index", "--dstore", path) == 0
        return path


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: Any) -> Iterator[World]:
    """By a model of sentencepiece that alters nothing."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "sentencepiece.model").write_bytes(sentencepiece_model(**EXACT))
    for split, number in (("train", 24), ("test", 5)):
        (folder / f"{split}.txt").write_text(text_of(number, 3) + "\n", encoding="utf-8")
    texts = (folder / "train.txt", folder / "test.txt")
    tokenizer = ("--tokenizer", folder / "sentencepiece.model")
    assert call("encode", *texts, *tokenizer, "--out", folder / "data") == 0
    flags = ["--task", "language_modeling", "--arch", "transformer_lm", *TINY, "--max-update", 30]
    must(*training(folder / "data", folder / "lm", *flags))
    yield World(folder, folder / "lm" / "checkpoint_last.pt")


@pytest.mark.slow
def test_figures_a_word_and_a_byte_come_of_themselves(pieces: World, tmp_path: Path) -> None:
    """Those that ``--raw-text`` gets; and where it is named, it is what is asked."""
    ours = pieces.evaluate(tmp_path / "ours.json")
    raw = pieces.folder / "test.txt"
    theirs = pieces.evaluate(tmp_path / "theirs.json", "--raw-text", raw)
    assert ours["text"]["source"] == "raw text, counted by encode"
    assert theirs["text"]["source"] == "raw text"
    for name in ("words", "bytes", "unknown"):
        assert ours["text"][name] == theirs["text"][name]
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte", "base_bits_per_byte"):
        assert ours[name] == theirs[name]
    size = len(raw.read_bytes())
    assert ours["bits_per_byte"] == pytest.approx(ours["loss"] * ours["tokens"] / size)


@pytest.mark.slow
def test_counts_of_another_text_are_refused(pieces: World, tmp_path: Path, capsys: Capture) -> None:
    """Another split in its place, another dictionary, an altered record; without it all goes on."""
    other = World(tmp_path, pieces.checkpoint)
    shutil.copytree(pieces.data, other.data)
    for end in (".bin", ".idx"):
        shutil.copy(pieces.data / f"train{end}", other.data / f"test{end}")
    with pytest.raises(ConfigError, match="is of another text than the split test"):
        other.evaluate(tmp_path / "results.json")
    record = other.data / "encoding.json"
    told = record.read_text()
    record.write_text(told.replace('"bytes": ', '"bytes": 1'))
    with pytest.raises(ConfigError, match="altered"):
        other.evaluate(tmp_path / "results.json")
    record.unlink()
    assert "text" not in other.evaluate(tmp_path / "results.json")
    record.write_text(told)
    with (other.data / "sentencepiece.model").open("ab") as file:
        file.write(b"\0")
    words = ("--dstore", pieces.dstore(), other.data, "--path", other.checkpoint, "--cpu")
    capsys.readouterr()
    assert "is not what cut the text" in refuse(capsys, "explain", *words, "--text", "the cat")
    lines = (other.data / "dict.txt").read_text().splitlines()
    (other.data / "dict.txt").write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    with pytest.raises(ConfigError, match="of another dictionary"):
        other.evaluate(tmp_path / "results.json")


@pytest.mark.slow
def test_replay_and_report_find_the_counts(pieces: World, tmp_path: Path, capsys: Capture) -> None:
    to, store = tmp_path / "results.json", pieces.dstore()
    table = tmp_path / "table.npz"
    experts = ("--knnlm", "--dstore-filename", store, *KNN)
    told = pieces.evaluate(to, *experts, "--score-table", table)
    assert "confirmed" in say(capsys, "replay", to, "--cpu")
    say(capsys, "tune", "--dstore", store, "--score-table", table)
    report = tmp_path / "report.json"
    flags = ("--score-table", table, "--data", pieces.data, "--results-json", report)
    say(capsys, "report", "--dstore", store, *flags)
    found = json.loads(report.read_text())
    assert found["text"] == told["text"]
    assert found["base_bits_per_byte"] == pytest.approx(told["base_bits_per_byte"], rel=1e-6)
    assert "confirmed" in say(capsys, "replay", report)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--bpe", "sentencepiece")])
def test_texts_are_written_and_explained_as_they_are(
    pieces: World, tmp_path: Path, capsys: Capture, flags: tuple[object, ...]
) -> None:
    """Nothing has to be said of the tokenizer; ``--bpe`` still can."""
    if flags:
        flags = (*flags, "--sentencepiece-model", pieces.folder / "sentencepiece.model")
    words = ("--dstore", pieces.dstore(), pieces.data, "--path", pieces.checkpoint, "--cpu", *KNN)
    prompts, sources = tmp_path / "prompts.txt", tmp_path / "sources.jsonl"
    prompt = "  a\u00e9\t"  # the model takes 16 tokens
    prompts.write_text(prompt + "\n", encoding="utf-8")
    how = ("--prompts", prompts, "--new-tokens", 5, "--sources", sources, *flags)
    text = say(capsys, "generate", *words, *how)
    assert text.startswith(prompt)
    (one,) = read_record(sources).texts
    assert "".join(token.text for token in one.tokens).removesuffix("\n") == text[:-1]
    rows = ("--gen-subset", "test", "--rows", "0:120", *BLOCKS)
    say(capsys, "explain", *words, *rows, "--json", tmp_path / "told.jsonl", *flags)
    (split,) = read_record(tmp_path / "told.jsonl").texts
    whole = (pieces.folder / "test.txt").read_text(encoding="utf-8")
    found = "".join(token.text for token in split.tokens)
    assert whole.startswith(found) and len(found) > 60
    sources_of = [source for token in split.tokens for source in token.sources]
    assert {source.document for source in sources_of} <= {f"= the {n} =" for n in range(3, 27)}


@pytest.fixture(scope="module")
def documents(tmp_path_factory: Any) -> World:
    """By the tokenizer of a tiny GPT-2, a document a file and several in one."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    folder = tmp_path_factory.mktemp("documents")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), eos_token="<|endoftext|>"
    )
    ends = {"bos_token_id": fast.eos_token_id, "eos_token_id": fast.eos_token_id}
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 256}
    config = transformers.GPT2Config(vocab_size=len(fast), **ends, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "hf")
    fast.save_pretrained(folder / "hf")
    assert call("wrap", "--hf", folder / "hf", "--out", folder / "wrapped") == 0
    (folder / "train").mkdir()
    for number in range(6):
        (folder / f"train/{number}.txt").write_text(text_of(1, number), encoding="utf-8")
    (folder / "test.txt").write_text(f"{ODD}\n\nand {ODD}\n", encoding="utf-8")
    texts = (folder / "train", folder / "test.txt")
    assert call("encode", *texts, "--tokenizer", folder / "wrapped", "--out", folder / "data") == 0
    return World(folder, folder / "wrapped" / "checkpoint.pt")


@pytest.mark.slow
def test_bits_a_byte_are_those_of_transformers(documents: World, tmp_path: Path) -> None:
    """Of a document as it is, and of its end, after the sign that one begins."""
    import torch
    import transformers

    whole = ("--tokens-per-sample", 256, "--context-window", 0, "--max-tokens", 256)
    found = documents.evaluate(tmp_path / "results.json", *whole)
    text = (documents.folder / "test.txt").read_bytes().decode()
    tokenizer = transformers.AutoTokenizer.from_pretrained(documents.folder / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(documents.folder / "hf")
    ids = torch.tensor([[0, *tokenizer(text)["input_ids"], 0]])
    with torch.no_grad():
        nats = float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
    assert found["tokens"] == ids.shape[1] - 1
    assert found["text"]["bytes"] == len(text.encode())
    assert found["text"]["words"] == len(text.split())
    expected = nats / math.log(2) / len(text.encode())
    assert found["base_bits_per_byte"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_documents_are_those_of_the_text(documents: World, tmp_path: Path, capsys: Capture) -> None:
    """Empty lines within them or not; and texts are told byte by byte, ends of lines too."""
    store = documents.dstore()
    said = " ".join(say(capsys, "info", "--dstore", store).split())
    assert "documents 6, each up to the token that ends it" in said
    words = ("--dstore", store, documents.data, "--path", documents.checkpoint, "--cpu", *KNN)
    rows = ("--gen-subset", "test", "--rows", "0:53", "--tokens-per-sample", 64)
    say(capsys, "explain", *words, *rows, "--json", tmp_path / "told.jsonl")
    (one,) = read_record(tmp_path / "told.jsonl").texts
    assert "".join(token.text for token in one.tokens) == f"{ODD}\n\nand {ODD}\n"
    names = {source.document for token in one.tokens for source in token.sources}
    assert names and names <= {f"= the {number} =" for number in range(6)}
    gone = ("--dry-run", "--document", "= the 4 =", "--data", documents.data)
    assert "= the 4 =" in say(capsys, "forget", store, *gone)
    (store / "documents.npz").unlink()
    say(capsys, "verify", "--dstore", store, "--documents", "--data", documents.data)
    said = " ".join(say(capsys, "info", "--dstore", store).split())
    assert "documents 6, each up to the token that ends it" in said
    other = ("--documents", "--document-boundary", "= ", "--data", documents.data)
    assert "a token ends each document" in refuse(capsys, "verify", "--dstore", store, *other)
    text = f"{ODD}\nthe cat"
    say(capsys, "explain", *words, "--text", text, "--json", tmp_path / "text.jsonl")
    (one,) = read_record(tmp_path / "text.jsonl").texts
    assert "".join(token.text for token in one.tokens) == text
