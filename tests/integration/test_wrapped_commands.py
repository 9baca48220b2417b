"""Wrapped models given a memory, by the commands that people type; trained in seconds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_calls import Capture, call, refuse, say
from conftest import eval_lm, must
from hf_models import save_trained
from tiny_world import BLOCKS, PLUGIN, preprocessing, write_corpus

from fairseq_knnlm.datastore import open_datastore
from fairseq_knnlm.errors import DatastoreError, ModelError

#: Tokens of a block, of which the first half is context: as ``BLOCKS`` has it.
BLOCK, CONTEXT = 16, 8


@dataclass(frozen=True)
class World:
    """A corpus in a model's tokens, and models of it."""

    folder: Path
    tokenizer: Any

    @property
    def data(self) -> Path:
        return self.folder / "bin"

    def checkpoint(self, name: str) -> Path:
        return self.folder / name / "checkpoint.pt"

    def words(self, name: str, split: str, *flags: object) -> list[str]:
        found = [self.data, *PLUGIN, "--path", self.checkpoint(name), "--gen-subset", split]
        found += [*BLOCKS, "--max-tokens", 512, "--cpu", "--num-workers", 0, *flags]
        return [str(word) for word in found]

    def evaluate(self, name: str, split: str, *flags: object) -> float:
        """Bits a token."""
        return eval_lm(self.words(name, split, *flags))["loss"]

    def ids(self, split: str) -> list[int]:
        """What the model reads: an end of text behind each line."""
        lines = (self.folder / f"{split}.txt").read_text().splitlines()
        end = self.tokenizer.eos_token_id
        return [one for line in lines for one in [*self.tokenizer(line)["input_ids"], end]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: Any) -> World:
    """Two families over one vocabulary, wrapped, and the text as fairseq reads it."""
    folder = tmp_path_factory.mktemp("world")
    text = write_corpus(folder, held_out=20)
    tokenizer = None
    for family, name, more in (
        ("gpt2", "gpt2", ()),
        ("llama", "llama", ()),
        ("llama", "bfloat16", ("--dtype", "bfloat16")),
    ):
        if not (hf := folder / f"{family}-hf").exists():
            tokenizer = save_trained(hf, family, text["train"].read_text())
        assert call("wrap", "--hf", hf, "--out", folder / name, *more) == 0
    for path in text.values():
        lines = [tokenizer(line)["input_ids"] for line in path.read_text().splitlines()]
        ids = "".join(" ".join(map(str, line)) + "\n" for line in lines)
        path.with_suffix(".ids").write_text(ids)
    files = {split: path.with_suffix(".ids") for split, path in text.items()}
    must(*preprocessing(files, folder / "bin"), "--srcdict", folder / "gpt2" / "dict.txt")
    return World(folder, tokenizer)


@pytest.fixture(scope="module")
def memory(world: World) -> Path:
    """The training text, as gpt2 reads it."""
    path = world.folder / "memory"
    reading = (world.data, "--path", world.checkpoint("gpt2"), *BLOCKS, "--cpu")
    assert call("save", *reading, "--dstore", path) == 0
    assert call("build-index", "--dstore", path) == 0
    return path


def bits(model: Any, ids: list[int], block: int = BLOCK, context: int = CONTEXT) -> float:
    """transformers' own loss over a text, in blocks of fairseq's kind, of which some is context."""
    begin, total = model.config.eos_token_id, 0.0
    size = block - context
    for start in range(0, len(ids), size):
        targets = ids[start : start + size]
        known = [begin, *ids][max(start - context, 0) : start + len(targets)]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([known])).logits[0, -len(targets) :]
        found = logits.log_softmax(dim=1).gather(1, torch.tensor(targets)[:, None])
        total -= float(found.sum())
    return total / len(ids) / torch.tensor(2.0).log().item()


def test_what_was_wrapped_is_said(world: World, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    said = say(capsys, "wrap", "--hf", world.folder / "llama-hf", "--out", out)
    assert "llama, " in said
    assert f"{len(world.tokenizer) + 9} tokens, texts of up to 64" in said
    assert f"--tokenizer {out}" in said
    assert {path.name for path in out.iterdir()} == {"checkpoint.pt", "dict.txt", "tokenizer.json"}


def theirs(world: World, family: str) -> Any:
    """The model, as transformers opens it."""
    import transformers

    folder = world.folder / f"{family}-hf"
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("block", "context"), [(BLOCK, CONTEXT), (BLOCK, 0), (64, 0), (64, 48), (40, 39), (33, 1)]
)
def test_the_loss_is_that_of_transformers(
    world: World, family: str, block: int, context: int
) -> None:
    expected = bits(theirs(world, family), world.ids("test"), block, context)
    flags = ("--tokens-per-sample", block, "--context-window", context)
    assert world.evaluate(family, "test", *flags) == pytest.approx(expected, abs=1e-4)


def test_the_stock_scorer_reads_it_too(world: World) -> None:
    words = world.words("llama", "test")
    words[words.index("knn_lm")] = "language_modeling"
    assert eval_lm(words)["loss"] == pytest.approx(world.evaluate("llama", "test"), abs=1e-5)


def test_blocks_that_are_longer_than_the_positions(world: World, tmp_path: Path) -> None:
    """With their context; whole blocks are fairseq's to leave out, as of any model."""
    long = ("--tokens-per-sample", 80, "--context-window", 32)
    with pytest.raises(ModelError, match="at most 64 tokens, those of --context-window included"):
        world.evaluate("gpt2", "test", *long)
    saving = ("--save-knnlm-dstore", "--dstore-mmap", tmp_path / "store")
    with pytest.raises(ModelError, match="longer than the model has positions"):
        world.evaluate("gpt2", "train", *long, *saving)
    assert not (tmp_path / "store").exists()


def test_what_was_saved_is_computed_again(world: World, memory: Path, capsys: Capture) -> None:
    """By ``verify --recompute`` and ``replay``, to the last digit."""
    reading = ("--data", world.data, "--path", world.checkpoint("gpt2"), "--cpu")
    again = say(capsys, "verify", "--dstore", memory, "--recompute", 0.2, *reading)
    assert "bit for bit" in again
    results = world.folder / "results.json"
    knn = ("--knnlm", "--dstore-filename", memory, "--lmbda", 0.3)
    world.evaluate("gpt2", "test", *knn, "--results-json", results)
    assert "confirmed" in say(capsys, "replay", results)


def test_a_memory_wins(world: World, memory: Path, capsys: Capture) -> None:
    """On text that neither the model nor the memory has seen."""
    alone = world.evaluate("gpt2", "test")
    knn = ("--knnlm", "--dstore-filename", memory, "--k", 32)
    assert world.evaluate("gpt2", "test", *knn, "--lmbda", 0.3) < alone - 0.1
    reading = (world.data, "--path", world.checkpoint("gpt2"), *BLOCKS, "--cpu")
    say(capsys, "tune", "--dstore", memory, "--data", *reading, "--experts", "knn,cache")
    assert world.evaluate("gpt2", "test", *knn[:3]) < alone - 0.1


def test_bfloat16(world: World, tmp_path: Path, capsys: Capture) -> None:
    """A checkpoint that was wrapped so is read so, and told so."""
    alone = world.evaluate("bfloat16", "test")
    assert alone == pytest.approx(world.evaluate("llama", "test"), abs=0.05)
    assert alone != world.evaluate("llama", "test")
    store = tmp_path / "store"
    world.evaluate("bfloat16", "train", "--save-knnlm-dstore", "--dstore-mmap", store)
    assert open_datastore(store).keys.dtype == "float16"
    say(capsys, "build-index", "--dstore", store)
    assert "bfloat16" in say(capsys, "info", "--dstore", store)
    knn = ("--knnlm", "--dstore-filename", store, "--k", 32, "--lmbda", 0.3)
    assert world.evaluate("bfloat16", "test", *knn) < alone - 0.1
    with pytest.raises(ModelError, match="wrap --dtype bfloat16"):
        world.evaluate("llama", "test", "--lm-dtype", "bfloat16")


def test_families_refuse_the_datastores_of_others(world: World, memory: Path) -> None:
    """Same vocabulary, same width of keys."""
    with pytest.raises(DatastoreError, match="another checkpoint"):
        world.evaluate("llama", "test", "--knnlm", "--dstore-filename", memory, "--k", 4)


def test_text_is_written_and_explained(
    world: World, memory: Path, tmp_path: Path, capsys: Capture
) -> None:
    """From letters to letters."""
    prompts, tokenizer = tmp_path / "prompts.txt", world.folder / "gpt2" / "tokenizer.json"
    prompts.write_text("w1 w2 w3\nw4  w5 \u00e9\n")
    spelling = ("--bpe", "hf_tokenizer", "--hf-tokenizer", tokenizer)
    reading = (world.data, "--path", world.checkpoint("gpt2"), "--cpu", *spelling)
    sources = tmp_path / "sources.jsonl"
    command = ("generate", "--dstore", memory, *reading, "--lmbda", 0.3)
    told = say(capsys, *command, "--prompts", prompts, "--new-tokens", 12, "--sources", sources)
    first, second = (line for line in told.splitlines() if line.startswith("w"))
    assert first.startswith("w1 w2 w3")
    assert second.startswith("w4  w5 \u00e9")
    assert "w1" in say(capsys, "explain", "--sources", sources)
    explained = tmp_path / "explained.jsonl"
    asked = ("--text", "w1 w2 \u00e9", "--json", explained, "--lmbda", 0.3)
    say(capsys, "explain", "--dstore", memory, *reading, *asked)
    head, record = map(json.loads, explained.read_text().splitlines())
    text = "".join(token["text"] for token in record["tokens"])
    assert text in ("w1 w2 \u00e9", "w1 w2 <0xC3><0xA9>")
    assert head["versions"]
    again = say(capsys, *command, "--prompts", prompts, "--new-tokens", 4, "--beam", 2)
    assert "w1 w2 w3" in again
    refused = refuse(capsys, *command, "--prompts", prompts, "--new-tokens", 80)
    assert "too long for the model" in refused
    told = ("explain", "--dstore", memory, *reading, "--text", "w1 " * 99)
    assert "the text is longer than the model reads" in refuse(capsys, *told)


def test_at_lambda_0_a_text_is_that_of_transformers(
    world: World, memory: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Whatever the memory says, from letters to letters."""
    lines, prompts = ("w1 w2 w3", "w4  w5 \u00e9", "w7"), tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{line}\n" for line in lines))
    spelling = ("--bpe", "hf_tokenizer", "--hf-tokenizer", world.folder / "gpt2/tokenizer.json")
    model = (world.data, "--path", world.checkpoint("gpt2"), "--cpu", *spelling)
    how = ("--dstore", memory, "--lmbda", 0, "--prompts", prompts, "--new-tokens", 20)
    said = say(capsys, "generate", *model, *how)
    expected = []
    for line in lines:
        ids = torch.tensor([[0, *world.tokenizer(line)["input_ids"]]])
        found = theirs(world, "gpt2").generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=0,
            pad_token_id=0,
        )
        written = [one for one in found[0].tolist() if one]  # 0 begins and ends a text
        expected.append(world.tokenizer.decode(written, skip_special_tokens=False) + "\n")
    assert said == "".join(expected)


def test_fairseqs_own_commands(world: World, memory: Path, tmp_path: Path) -> None:
    """``fairseq-interactive``, with text as people have it."""
    prompts, tokenizer = tmp_path / "prompts.txt", world.folder / "gpt2" / "tokenizer.json"
    prompts.write_text("w1 w2 w3\n")
    said = must(
        *("fairseq-interactive", world.data, *PLUGIN, "--path", world.checkpoint("gpt2"), "--cpu"),
        *("--knnlm", "--dstore-filename", memory, "--lmbda", 0.3, "--input", prompts, "--beam", 2),
        *("--bpe", "hf_tokenizer", "--hf-tokenizer", tokenizer, "--prefix-size", 3),
        *("--max-len-b", 20, "--tokens-per-sample", 32),
    )
    assert "\nD-" in said
    assert "w1 w2" in said[said.index("\nD-") :]
