"""One pass over a text: what is refused, warned of, left behind, and told at the end."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, Lab, run
from stores import assert_helps

from fairseq_knnlm.calibration.table import read_table
from fairseq_knnlm.errors import ConfigError, ModelError
from fairseq_knnlm.experts.cache import CacheSetting, cache_bytes
from fairseq_knnlm.runs import evaluate, inputs
from fairseq_knnlm.runs.mixing import _compare_context
from fairseq_knnlm.runs.results import losses

KNN = ["--k", 64, "--lmbda", 0.3, "--knn-temp", 2.0]
CONTEXT = {
    "tokens_per_sample": 8,
    "context_window": 8,
    "sample_break_mode": "none",
    "precision": "float32",
}


def test_the_context_of_a_run_is_told(lab: Lab, datastore: Path, tmp_path: Path) -> None:
    """In the results and in the table's card, as in the manifest of a datastore; read once."""
    table, file = tmp_path / "table.npz", tmp_path / "results.json"
    flags = ["--knnlm", "--dstore-filename", datastore, *KNN]
    lab.evaluate("test", *flags, "--score-table", table, "--results-json", file)
    assert json.loads(file.read_text())["context"] == CONTEXT
    assert read_table(table).card["context"] == CONTEXT
    told = json.loads((datastore / "manifest.json").read_text())["origin"]["context"]
    batches = {"max_tokens": 64, "batch_size": None, "add_bos_token": 0}
    assert told == CONTEXT | batches


def test_other_contexts_than_a_calibration_was_fitted_on(caplog: pytest.LogCaptureFixture) -> None:
    def said(then: dict[str, Any], now: dict[str, Any] | None) -> str:
        caplog.clear()
        _compare_context(SimpleNamespace(fitted_on=then), now)  # type: ignore[arg-type]
        return caplog.text

    other = CONTEXT | {"context_window": 0}
    assert "context_window 8" in said({"context": CONTEXT}, other)
    assert "this run has tokens_per_sample 8, context_window 0" in said({"context": CONTEXT}, other)
    assert not said({"context": CONTEXT}, dict(CONTEXT))
    half = CONTEXT | {"precision": "bfloat16"}
    assert "this run has tokens_per_sample 8" in said({"context": CONTEXT}, half)
    assert "precision bfloat16" in said({"context": CONTEXT}, half)
    older = {name: value for name, value in CONTEXT.items() if name != "precision"}
    assert not said({"context": older}, half)  # of before it was told
    assert "precision" not in said({"context": older}, other)
    strided = CONTEXT | {"stride": 4}
    assert not said({"context": strided}, dict(strided))
    assert "stride 2" in said({"context": strided}, strided | {"stride": 2})
    for then, now in ((CONTEXT, strided), (older, strided), (strided, CONTEXT)):  # or none
        text = said({"context": then}, now)
        assert "stride 4" in text and "stride none" in text
    assert "stride" not in said({"context": CONTEXT}, other)
    assert not said({"split": "valid"}, CONTEXT)  # a calibration that does not know
    assert not said({"context": CONTEXT}, None)  # a sentence by itself


def test_weights_are_read_once(
    lab: Lab, datastore: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = inputs.model_fingerprint
    monkeypatch.setattr(inputs, "model_fingerprint", lambda m: (calls.append(m), original(m))[1])
    flags = ["--knnlm", "--dstore-filename", datastore, *KNN]
    lab.evaluate("test", *flags, "--score-table", tmp_path / "table.npz")
    assert len(calls) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_checkpoint_with_weights_that_are_no_numbers(
    lab: Lab, datastore: Path, tmp_path: Path, bad: float
) -> None:
    """One of its weights; scored alone, with a datastore, or to save one."""
    content = torch.load(lab.checkpoint(), weights_only=False)
    content["model"]["decoder.layers.1.fc2.weight"][3, 5] = bad
    torch.save(content, tmp_path / "broken.pt")
    for flags in (
        [],
        ["--knnlm", "--dstore-filename", datastore, *KNN],
        ["--save-knnlm-dstore", "--dstore-mmap", tmp_path / "store"],
    ):
        with pytest.raises(ModelError, match="not all numbers") as caught:
            lab.evaluate("test", *flags, "--path", tmp_path / "broken.pt")
        assert_helps(caught, "1 that are NaN or infinite in decoder.layers.1.fc2.weight")
    assert [file.name for file in tmp_path.iterdir()] == ["broken.pt"]


def test_a_datastore_of_the_evaluated_text(
    lab: Lab, datastore: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By its name before the run, and after it by what was found; of another text neither."""
    flags = ["--knnlm", "--dstore-filename", datastore, *KNN]
    file = tmp_path / "results.json"
    lab.evaluate("train", *flags, "--results-json", file)
    assert "is of a split 'train' too" in caplog.text
    assert "it seems to hold the evaluated text" in caplog.text
    found = json.loads(file.read_text())
    # Entries with the same words before them may be just as near: every token finds its own.
    assert found["tokens_recalled"] == found["tokens"]
    caplog.clear()
    lab.evaluate("test", *flags, "--results-json", file)
    assert "is of a split" not in caplog.text
    assert "seems to hold" not in caplog.text


def test_tokens_without_probability_have_the_last_word(lab: Lab, datastore: Path) -> None:
    """Of one neighbour alone: fairseq would leave most tokens out, and fail to say so."""
    flags = ["--knnlm", "--dstore-filename", datastore, "--k", 1, "--lmbda", 1, "--knn-temp", 1]
    ran = run("fairseq-eval-lm", *lab.command("test", *flags))
    assert ran.code == 0
    assert "Logging error" not in ran.out
    last = ran.out.strip().splitlines()[-1]
    assert "Loss (base 2): inf, Perplexity: inf." in last
    assert "tokens have probability 0" in last


def test_a_failing_write_keeps_no_other_from_being_made(
    lab: Lab,
    datastore: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The figures are told, whatever can be written is; then comes the error."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    flags = ["--knnlm", "--dstore-filename", datastore, *KNN]
    table, file = tmp_path / "table.npz", tmp_path / "results.json"
    written = ["--score-table", table, "--results-json", file]
    caplog.set_level(logging.INFO)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "write_json", full)
        with pytest.raises(OSError, match="No space left"):
            lab.evaluate("test", *flags, *written)
    assert "kNN-LM   perplexity" in caplog.text
    assert len(read_table(table)) > 0
    assert not file.exists()
    table.unlink()
    caplog.clear()
    monkeypatch.setattr("fairseq_knnlm.calibration.writer.ScoreTableWriter.publish", full)
    with pytest.raises(OSError, match="No space left"):
        lab.evaluate("test", *flags, *written)
    assert "kNN-LM   perplexity" in caplog.text
    assert json.loads(file.read_text())["tokens"] > 0


def test_nothing_that_is_no_number_reaches_json() -> None:
    for log_prob in (math.nan, math.inf, -math.inf, -1e9):
        found = losses(tokens=10, base_log_prob=log_prob, log_prob=log_prob, seconds=0.0)
        json.dumps(found, allow_nan=False)
        assert found["perplexity"] is None


def test_a_cache_that_does_not_fit_is_refused_before_work(lab: Lab) -> None:
    for window in (2 * 10**9, 10**9):
        flags = ["--experts", "cache", "--cache-lmbda", 0.3, "--cache-window", window]
        with pytest.raises(ConfigError, match="the cache does not fit into memory") as caught:
            lab.evaluate("test", *flags, "--cache-theta", 0.5)
        assert_helps(caught, "iB, which a window of so many tokens needs")


#: Prints by how much the peak of a process grows while a cache reads more than its window.
PEAK = """
import re, torch
from pathlib import Path
from fairseq_knnlm.experts.cache import CacheExpert, CacheSetting
from fairseq_knnlm.lm.contexts import CONTEXT, Contexts
def peak(window, width=64):
    expert = CacheExpert([CacheSetting(window=window, theta=0.1)], 2)
    n = expert.at_a_time
    for start in range(0, window + 2 * n, n):  # the window fills, and moves on
        keys, targets = torch.randn(n, width), torch.randint(50, (n,))
        before = torch.randint(50, (n, CONTEXT))
        contexts = Contexts(keys, keys, before, torch.arange(start, start + n))
        expert.predict(contexts).log_prob(targets)
        expert.observe(targets)
    status = Path("/proc/self/status").read_text()  # getrusage counts the parent's peak, too
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status)[1])
small = peak(10)
print(peak(20_000) - small)
"""


def test_the_memory_of_a_cache_is_known_beforehand() -> None:
    # What is given back is not kept for later: then the peak is that of what is held.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, cwd=ROOT, env=env
    )
    said = cache_bytes([CacheSetting(window=20_000)], 64)
    assert said / 2 < int(done.stdout) < said
