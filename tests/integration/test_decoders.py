"""Language models that are no Transformers, from training to a memory: fairseq's commands as typed.

Their checkpoints hold a Namespace, which PyTorch opens only where told to trust it; they are
converted first, which is where fairseq's own scorer has its loss from too.
"""

from __future__ import annotations

import importlib.util
import math
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import BLOCKS, Lab, eval_lm, must, run
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from tiny_world import PLUGIN
from torch.nn.functional import cross_entropy

from fairseq_knnlm.datastore import open_datastore
from fairseq_knnlm.errors import DatastoreError, ModelError

DECODERS = {
    "lightconv_lm": [
        *("--decoder-embed-dim", 16, "--decoder-ffn-embed-dim", 16, "--decoder-layers", 2),
        *("--decoder-attention-heads", 2, "--decoder-kernel-size-list", "[3,3]"),
    ],
    "fconv_lm": ["--decoder-embed-dim", 16, "--decoder-layers", "[(16, 2)] * 2"],
    "lstm_lm": [
        *("--decoder-embed-dim", 16, "--decoder-out-embed-dim", 16, "--decoder-layers", 1),
    ],
}
OUTPUT = ("--knn-keytype", "decoder_output")


@pytest.mark.parametrize("arch", list(DECODERS))
def test_other_decoders(lab: Lab, datastore: Path, tmp_path: Path, arch: str) -> None:
    must(
        *("fairseq-train", lab.data, "--task", "language_modeling", "--arch", arch),
        *(*DECODERS[arch], "--cpu", "--optimizer", "adam", "--lr", 0.01, "--max-update", 40),
        *("--tokens-per-sample", 16, "--sample-break-mode", "none", "--max-tokens", 512),
        *("--save-dir", tmp_path, "--no-epoch-checkpoints", "--disable-validation"),
        *("--num-workers", 0),
    )
    trained, converted = tmp_path / "checkpoint_last.pt", tmp_path / "converted.pt"
    ran = run("fairseq-eval-lm", *lab.command("test", "--path", trained))
    assert ran.code == 1
    assert f"fairseq-knnlm convert-checkpoint {trained} NEW" in ran.out
    assert "Traceback" not in ran.out
    must("fairseq-knnlm", "convert-checkpoint", trained, converted)
    assert_same_weights(trained, converted)

    path = ["--path", converted]
    ours = lab.evaluate("test", *path)
    words = lab.command("test", *path, "--num-workers", 0)
    words[words.index("knn_lm")] = "language_modeling"
    alone = eval_lm(words)["loss"]
    assert ours["loss"] == pytest.approx(alone, abs=2e-5)

    # No keys are needed: a cache; the plain model as a second one of a Transformer.
    cached = lab.evaluate("test", *path, "--experts", "cache", "--cache-lmbda", 0.1)
    # Nothing comes back in this text; 0.9 of the model's own probability is always left.
    assert cached["loss"] != pytest.approx(alone, abs=1e-3)
    assert cached["loss"] < alone - math.log2(0.9)
    second = ("--experts", "knn,lm2", "--expert-lm", converted, "--expert-lm-lmbda", 0.3)
    memory = ("--knnlm", "--dstore-filename", datastore, "--k", 4)
    mixed = lab.evaluate("test", *memory, "--lmbda", 0.2, *second)
    assert mixed["loss"] != pytest.approx(lab.evaluate("test", *memory, "--lmbda", 0.2)["loss"])

    # A memory of its own, of the one key that it has.
    store = tmp_path / "store"
    saving = ("--save-knnlm-dstore", "--dstore-mmap", store)
    with pytest.raises(ModelError, match="--knn-keytype decoder_output"):
        lab.evaluate("train", *path, *saving)
    assert not store.exists()
    without = lab.evaluate("train", *path, *saving, *OUTPUT)["loss"]
    assert open_datastore(store).manifest.width == 16
    must("fairseq-knnlm", "build-index", "--dstore", store)
    own = ("--knnlm", "--dstore-filename", store, "--k", 32, "--lmbda", 0.3)
    # Read again, each token finds its own entry at distance 0, if queries are what keys were.
    assert lab.evaluate("train", *path, *own, *OUTPUT)["loss"] < without - 0.2
    with pytest.raises(DatastoreError, match="last_ffn_input"):
        lab.evaluate("test", *path, *own)
    with pytest.raises(DatastoreError, match="another checkpoint"):
        lab.evaluate("test", *own, *OUTPUT)
    # A score table, and a mixture of it with what needs no keys, better where it was fitted.
    reading = ("--data", lab.data, *path, "--cpu", *OUTPUT, *BLOCKS, "--num-workers", 0)
    must("fairseq-knnlm", "tune", "--dstore", store, *reading, "--experts", "knn,cache,ngram")
    fitted = lab.evaluate("valid", *path, *own[:3], *OUTPUT)["loss"]
    assert fitted < lab.evaluate("valid", *path)["loss"] - 0.02
    check_generation(lab, converted, own)


def check_generation(lab: Lab, checkpoint: Path, own: tuple[object, ...]) -> None:
    """fairseq's own search asks the mixture, a token at a time; what reads ahead does not."""
    prompts = lab.folder / "prompts.txt"
    prompts.write_text("w1 w2 w3\nw4 w5\n")
    reading = ("--path", checkpoint, "--cpu", *own, *OUTPUT)
    said = must(
        *("fairseq-interactive", lab.data, *PLUGIN, *reading, "--input", prompts),
        *("--beam", 2, "--prefix-size", 3, "--max-len-b", 8, "--tokens-per-sample", 16),
    )
    assert said.count("\nH-") == 2
    store = own[own.index("--dstore-filename") + 1]
    ours = ("--dstore", store, lab.data, "--path", checkpoint, "--cpu", *OUTPUT)
    written = ("fairseq-knnlm", "generate", *ours, "--prompts", prompts, "--new-tokens", 4)
    assert "w1 w2 w3" in must(*written, "--beam", 2)
    refused = run(*written)
    assert refused.code == 1
    assert "pass --beam 2 or more" in refused.out
    blocks = ("--gen-subset", "test", "--rows", "0:5", "--tokens-per-sample", 16)
    assert "bits" in must("fairseq-knnlm", "explain", *ours, *blocks)


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs the extra hf")
def test_hf_gpt2(lab: Lab, tmp_path: Path) -> None:
    """As an older fairseq and transformers 3 left one; against the GPT-2 of transformers itself."""
    types = Dictionary.load(str(lab.data / "dict.txt"))
    args = Namespace(
        arch="hf_gpt2",
        task="language_modeling",
        criterion="cross_entropy",
        optimizer="adam",
        lr_scheduler="fixed",
        lr=[0.1],
        min_lr=1e-9,
        data=[str(lab.data)],
        embed_dim=16,
        num_attention_heads=2,
        num_layers=2,
        max_target_positions=32,
        tokens_per_sample=32,
    )
    ARCH_CONFIG_REGISTRY["hf_gpt2"](args)
    task = SimpleNamespace(target_dictionary=types, source_dictionary=types)
    torch.manual_seed(5)
    model = ARCH_MODEL_REGISTRY["hf_gpt2"].build_model(args, task).eval()
    with torch.no_grad():  # as peaked as a trained one
        model.decoder.model.lm_head.weight.mul_(10)
    weights = model.state_dict()
    name = "decoder.model.transformer.h.{}.attn.bias"  # transformers 3 kept its mask there
    weights |= {name.format(n): torch.ones(1, 1, 34, 34, dtype=torch.uint8) for n in (0, 1)}
    history = {"criterion_name": "CrossEntropyCriterion", "optimizer_name": "FairseqAdam"}
    history |= {"lr_scheduler_state": {}, "num_updates": 7}
    extra = {"train_iterator": {"epoch": 2, "iterations_in_epoch": 0}}
    state = {"args": args, "model": weights, "optimizer_history": [history], "extra_state": extra}
    old, new = tmp_path / "old.pt", tmp_path / "new.pt"
    torch.save({**state, "last_optimizer_state": None}, old)
    assert "h.0.attn.bias" in must("fairseq-knnlm", "convert-checkpoint", old, new)

    path = ("--path", new)
    ids = [types.index(word) for word in lab.text("test")]
    losses = []
    for start in range(0, len(ids), 8):  # blocks of 8 tokens after 8 others
        targets = torch.tensor(ids[start : start + 8])
        known = torch.tensor([[types.eos(), *ids][max(start - 8, 0) : start + len(targets)]])
        places = torch.arange(1, known.shape[1] + 1)[None]
        with torch.no_grad():
            logits = model.decoder.model(input_ids=known, position_ids=places).logits[0]
        losses.append(cross_entropy(logits[-len(targets) :], targets, reduction="none"))
    expected = float(torch.cat(losses).double().mean()) / math.log(2)
    alone = lab.evaluate("test", *path)["loss"]
    assert alone == pytest.approx(expected, abs=1e-4)
    assert lab.evaluate("test", *path, "--experts", "cache", "--cache-lmbda", 0.1)["loss"] != alone

    store = tmp_path / "store"
    without = lab.evaluate("train", *path, "--save-knnlm-dstore", "--dstore-mmap", store)["loss"]
    must("fairseq-knnlm", "build-index", "--dstore", store)
    own = ("--knnlm", "--dstore-filename", store, "--k", 32, "--lmbda", 0.3)
    # Read again, each token finds its own entry at distance 0, if queries are what keys were.
    assert lab.evaluate("train", *path, *own)["loss"] < without - 0.2


def assert_same_weights(trained: Path, converted: Path) -> None:
    """Bit for bit; the file that this test has trained is trusted here."""
    before = torch.load(trained, weights_only=False)["model"]
    after = torch.load(converted, weights_only=True)["model"]
    assert list(before) == list(after)
    assert all(map(torch.equal, before.values(), after.values()))


def test_several_checkpoints_with_a_datastore(lab: Lab, datastore: Path) -> None:
    """Refused once the second is there, before any text is read."""
    ran = run(
        *("fairseq-generate", lab.data, "--user-dir", Path(__file__).parents[2] / "fairseq_knnlm"),
        *("--task", "knn_lm", "--gen-subset", "test", "--score-reference", "--cpu"),
        *("--path", f"{lab.checkpoint()}:{lab.checkpoint('untied')}", "--tokens-per-sample", 8),
        *("--sample-break-mode", "none", "--knnlm", "--dstore-filename", datastore, "--k", 4),
    )
    assert ran.code == 1
    assert "error: " in ran.out
    assert "name one of them" in ran.out
    assert "Traceback" not in ran.out
