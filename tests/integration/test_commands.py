"""The commands people type, as processes or as fairseq runs them, against oracles."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MODELS, ROOT, Lab, eval_lm, must

import fairseq_knnlm.tasks  # noqa: F401  for the hub interface
from fairseq_knnlm.calibration.table import ScoreTable, read_table
from fairseq_knnlm.datastore import open_datastore
from fairseq_knnlm.errors import ConfigError, ModelError
from fairseq_knnlm.experts.knn import KnnSetting
from fairseq_knnlm.mixture.components import Component
from fairseq_knnlm.runs.scorer import KnnScorer

KNN = ["--k", 64, "--lmbda", 0.3, "--knn-temp", 2.0]
SETTING = vars(KnnSetting(temperature=2.0))


def plain_knn_lm(
    lm: np.ndarray, queries: np.ndarray, targets: np.ndarray, store: Path
) -> np.ndarray:
    """The paper's equations 2 and 3 in ten plain lines of NumPy, float64."""
    keys = np.load(store / "keys.npy").astype(np.float64)
    values = np.load(store / "values.npy")
    k, lmbda, temperature = KNN[1], KNN[3], KNN[5]
    mixed = []
    for base, query, target in zip(lm, queries.astype(np.float64), targets, strict=True):
        distances = ((keys - query) ** 2).sum(axis=1)
        nearest = np.argsort(distances, kind="stable")[:k]
        weights = np.exp(-distances[nearest] / temperature)
        p_knn = weights[values[nearest] == target].sum() / weights.sum()
        mixed.append(math.log(lmbda * p_knn + (1 - lmbda) * math.exp(base)))
    return np.array(mixed)


def mixed_by_hand(table: ScoreTable) -> np.ndarray:
    """(N,) log p of the mixture that ``KNN`` asks for."""
    knn = table.column(Component("knn", SETTING))
    return np.logaddexp(table["lm"] + math.log(0.7), knn + math.log(0.3))


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("context", [[], ["--tokens-per-sample", 8, "--context-window", 0]])
def test_base_loss_is_the_stock_loss(lab: Lab, model: str, context: list[object]) -> None:
    ours = lab.evaluate("test", *context, model=model)
    words = lab.command("test", *context, model=model)
    words[words.index("knn_lm")] = "language_modeling"
    stock = eval_lm(words)
    assert ours["loss"] == pytest.approx(stock["loss"], abs=2e-5)


def test_contexts_are_the_same_however_many_processes_load_the_text(lab: Lab) -> None:
    """fairseq's own windows are state in the one that collates."""
    alone = lab.evaluate("test")
    assert eval_lm(lab.command("test", "--num-workers", 2)) == alone


def test_knn_lm_is_ten_plain_lines(lab: Lab, datastore: Path, tmp_path: Path) -> None:
    table_file, results_file = tmp_path / "table.npz", tmp_path / "results.json"
    found = lab.evaluate(
        "test", "--knnlm", "--dstore-filename", datastore, *KNN,
        "--score-table", table_file, "--results-json", results_file,
    )  # fmt: skip
    # The test split's own keys, saved in float32, are the queries.
    queries = lab.folder / "queries"
    if not queries.exists():
        lab.evaluate("test", "--save-knnlm-dstore", "--dstore-mmap", queries, "--dstore-fp32")
    asked = open_datastore(queries)
    assert asked.keys is not None
    table = read_table(table_file)
    expected = plain_knn_lm(table["lm"], asked.keys, asked.values, datastore)

    assert np.array_equal(table["token"], asked.values)
    np.testing.assert_allclose(mixed_by_hand(table), expected, atol=1e-4)
    bits = -expected.mean() / math.log(2)
    assert found["loss"] == pytest.approx(bits, abs=1e-4)
    results = json.loads(results_file.read_text())
    assert results["loss"] == pytest.approx(bits, abs=1e-4)
    assert results["perplexity"] == pytest.approx(2**bits, rel=1e-4)
    assert results["tokens"] == len(asked)
    assert results["base_loss"] == pytest.approx(-table["lm"].mean() / math.log(2), abs=1e-5)
    assert (results["mixer"], results["mixed"], results["k"]) == ("fixed", ["knn"], 64)
    lm, knn = results["weights"]
    assert lm == {"expert": "lm", "weight": pytest.approx(0.7)}
    assert knn == {"expert": "knn", "weight": pytest.approx(0.3), **SETTING}
    assert results["distances"].startswith("exact")
    assert results["index"] == "Flat"
    assert results["seconds"] > results["search_seconds"] > 0
    assert results["tokens_per_second"] > 0


@pytest.mark.parametrize(
    "flags",
    [
        ["--knn-sim-func", "l2"],
        ["--knn-sim-func", "do_not_recomp_l2"],
        ["--no-load-keys"],
        ["--move-dstore-to-mem"],
    ],
)
def test_ways_of_getting_exact_distances_agree(lab: Lab, datastore: Path, flags: list[str]) -> None:
    memory = ["--knnlm", "--dstore-filename", datastore, *KNN]
    plain = lab.evaluate("valid", *memory)
    assert lab.evaluate("valid", *memory, *flags)["loss"] == pytest.approx(plain["loss"], abs=1e-4)


def test_exact_search_in_torch_takes_the_place_of_an_exact_index(
    lab: Lab, datastore: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if only torch had a GPU, which here is the CPU."""
    flags = ["--knnlm", "--dstore-filename", datastore, *KNN]
    expected = lab.evaluate("valid", *flags)
    monkeypatch.setattr("fairseq_knnlm.retrieval.opening.gpu_of_torch_alone", lambda device: "cpu")
    # FAISS rounds otherwise, which at this temperature shows where neighbours are far apart.
    assert lab.evaluate("valid", *flags)["loss"] == pytest.approx(expected["loss"], abs=1e-3)


def test_lambda_zero_is_the_base(lab: Lab, datastore: Path) -> None:
    base = lab.evaluate("valid")
    unweighted = lab.evaluate(
        "valid", "--knnlm", "--dstore-filename", datastore, "--k", 8, "--lmbda", 0
    )
    assert unweighted["loss"] == pytest.approx(base["loss"], abs=1e-6)


def test_a_memory_of_the_evaluated_text_recalls_it(lab: Lab, tmp_path: Path) -> None:
    store = tmp_path / "valid"
    lab.evaluate("valid", "--save-knnlm-dstore", "--dstore-mmap", store)
    must("fairseq-knnlm", "build-index", "--dstore", store)
    base = lab.evaluate("valid")
    memory = ["--knnlm", "--dstore-filename", store, "--k", 8, "--lmbda", 0.9, "--knn-temp", 0.01]
    assert lab.evaluate("valid", *memory)["perplexity"] < base["perplexity"] / 10


@pytest.mark.parametrize(
    ("tokens", "context", "mode"),
    [(16, 8, "none"), (7, 0, "none"), (9, 4, "none"), (16, 0, "complete"), (16, 0, "eos")],
)
def test_every_token_has_one_entry_in_text_order(
    lab: Lab, tmp_path: Path, tokens: int, context: int, mode: str
) -> None:
    store = tmp_path / "store"
    lab.evaluate(
        "valid", "--save-knnlm-dstore", "--dstore-mmap", store, "--tokens-per-sample", tokens,
        "--context-window", context, "--sample-break-mode", mode, "--max-tokens", 512,
    )  # fmt: skip
    dictionary = [line.split()[0] for line in (lab.data / "dict.txt").read_text().splitlines()]
    found = [
        (["<s>", "<pad>", "</s>", "<unk>"] + dictionary)[v] for v in np.load(store / "values.npy")
    ]
    assert found == lab.text("valid")


def test_blocks_that_fairseq_would_drop(
    lab: Lab, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Saving refuses them; evaluating counts them and says so."""
    long = ["--tokens-per-sample", 44, "--context-window", 0, "--max-tokens", 512]
    with pytest.raises(ConfigError, match="longer than the model takes"):
        lab.evaluate("valid", *long, "--save-knnlm-dstore", "--dstore-mmap", tmp_path / "store")
    assert not list(tmp_path.iterdir())
    results = tmp_path / "results.json"
    lab.evaluate("valid", *long, "--results-json", results)
    found = json.loads(results.read_text())
    assert found["tokens_left_out"] > 0
    assert found["tokens"] + found["tokens_left_out"] == len(lab.text("valid"))
    assert "leaves out" in caplog.text


def test_the_report_of_the_real_command(lab: Lab, datastore: Path, tmp_path: Path) -> None:
    """From another working directory, with the package's checkout as --user-dir."""
    said = must(
        "fairseq-eval-lm",
        *lab.command("test", "--knnlm", "--dstore-filename", datastore, *KNN),
        cwd=tmp_path,
    )
    assert re.search(r"base LM +perplexity \d+\.\d\d, loss \d\.\d{4} bits, [\d,]+ tokens", said)
    mixed = re.search(r"kNN-LM +perplexity (\d+\.\d\d)", said)
    stock = re.search(r"Loss \(base 2\): [\d.]+, Perplexity: (\d+\.\d\d)", said)
    assert mixed and stock and mixed[1] == stock[1]
    assert "knn: lambda 0.3, temperature 2 (given)" in said
    assert "k 64, index Flat; distances exact squared L2" in said


def test_defaults_without_calibration_come_with_a_warning(lab: Lab, datastore: Path) -> None:
    said = must("fairseq-eval-lm", *lab.command("test", "--knnlm", "--dstore-filename", datastore))
    assert "fairseq-knnlm tune" in said
    assert "knn: lambda 0.25, temperature 1 (uncalibrated defaults)" in said


def test_generate_score_reference(lab: Lab, datastore: Path, tmp_path: Path) -> None:
    """fairseq-generate asks the task for its scorer, and prints block by block what it says."""
    memory = ["--knnlm", "--dstore-filename", datastore, *KNN]
    said = must(
        "fairseq-generate", lab.data, "--user-dir", ROOT / "fairseq_knnlm", "--task", "knn_lm",
        "--path", lab.checkpoint(), "--gen-subset", "test", "--score-reference", "--cpu",
        "--tokens-per-sample", 8, "--sample-break-mode", "none", "--max-tokens", 64, *memory,
    )  # fmt: skip
    printed = re.findall(r"^P-(\d+)\t(.*)$", said, re.MULTILINE)
    assert len(printed) >= 40

    blocks = ["--tokens-per-sample", 8, "--context-window", 0]
    lab.evaluate("test", *blocks, *memory, "--score-table", tmp_path / "table.npz")
    table = read_table(tmp_path / "table.npz")
    mixed = mixed_by_hand(table) / math.log(2)
    for block, scores in printed:
        ours = mixed[8 * int(block) :][:8]
        theirs = [float(score) for score in scores.split()]
        np.testing.assert_allclose(theirs, ours[: len(theirs)], atol=2e-4)


def test_hub_interface_scores_with_neighbours(lab: Lab, datastore: Path) -> None:
    from fairseq.models.transformer_lm import TransformerLanguageModel

    def hub(**task: object) -> Any:
        return TransformerLanguageModel.from_pretrained(
            str(lab.checkpoint().parent),
            lab.checkpoint().name,
            str(lab.data),
            user_dir=str(ROOT / "fairseq_knnlm"),
            **task,
        )

    def score(**task: object) -> list[float]:
        return hub(**task).score("w1 w2 w3 w4")["positional_scores"].tolist()

    memory = {"knnlm": True, "dstore_filename": str(datastore), "k": 64, "knn_temp": 2.0}
    base, same = score(), score(**memory, lmbda=0.0)
    mixed = score(**memory, lmbda=0.5)
    assert same == pytest.approx(base, abs=1e-6)
    assert mixed != pytest.approx(base, abs=1e-3)


def test_every_key_type(lab: Lab, tmp_path: Path) -> None:
    """Six representations; the six differ, and those the model lacks are refused."""
    from fairseq_knnlm.lm.keys import KEY_TYPES

    lacking = {
        ("prenorm-nofinal", "decoder_output"),
        ("untied", "last_attn_input_before_norm"),
    }
    for model in MODELS:
        seen: list[np.ndarray] = []
        for key_type in KEY_TYPES:
            store = tmp_path / model / key_type
            flags = ["--save-knnlm-dstore", "--dstore-mmap", store, "--knn-keytype", key_type]
            if (model, key_type) in lacking:
                with pytest.raises(ModelError, match="no layer"):
                    lab.evaluate("valid", *flags, model=model)
                continue
            lab.evaluate("valid", *flags, model=model)
            keys = np.load(store / "keys.npy").astype(np.float32)
            assert all(np.abs(keys - other).max() > 1e-3 for other in seen), (model, key_type)
            seen.append(keys)


def test_ensembles(lab: Lab, datastore: Path) -> None:
    """Several models: the stock scorer's mean of probabilities, or with keys a clear refusal."""
    import torch
    from fairseq import checkpoint_utils
    from fairseq.sequence_scorer import SequenceScorer

    paths = [str(lab.checkpoint(name)) for name in ("adaptive", "untied")]
    models, _, task = checkpoint_utils.load_model_ensemble_and_task(
        paths, arg_overrides={"data": str(lab.data)}
    )
    pad, eos = task.dictionary.pad(), task.dictionary.eos()
    tokens = torch.tensor([[2, 7, 9, 30, 90], [2, 100, 5, pad, pad]])
    target = torch.tensor([[7, 9, 30, 90, 2], [100, 5, 2, pad, pad]])
    sample = {
        "id": torch.arange(2),
        "net_input": {"src_tokens": tokens, "src_lengths": torch.tensor([5, 3])},
        "target": target,
    }
    stock = SequenceScorer(task.dictionary).generate(models, sample)
    ours = KnnScorer(pad, eos).generate(models, sample)
    for (one,), (other,) in zip(ours, stock, strict=True):
        assert torch.equal(one["tokens"], other["tokens"])
        torch.testing.assert_close(
            one["positional_scores"], other["positional_scores"], atol=1e-5, rtol=0
        )
    with pytest.raises(ModelError, match="one language model"):
        KnnScorer(pad, eos, key_type="last_ffn_input").generate(models, sample)


def test_fp16_model_matches_its_datastore(lab: Lab, datastore: Path) -> None:
    """A half-precision model is the same model: the fingerprint holds and the loss is close."""
    memory = ["--knnlm", "--dstore-filename", datastore, *KNN]
    single = lab.evaluate("test", *memory)
    half = lab.evaluate("test", *memory, "--fp16")
    assert half["loss"] == pytest.approx(single["loss"], abs=0.02)


def test_the_script_and_the_command_offer_help() -> None:
    for command in (
        [sys.executable, ROOT / "examples/build_index.py"],
        *(
            ["fairseq-knnlm", name]
            for name in (
                *("save", "build-index", "compress", "tune", "report", "info", "verify", "import"),
            )
        ),
    ):
        assert "example:" in must(*command, "--help")
