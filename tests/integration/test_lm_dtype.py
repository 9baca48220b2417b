"""``--lm-dtype bfloat16`` through the commands: near float32, told everywhere, and confirmed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_calls import Capture, say
from conftest import Lab, must
from tiny_world import PLUGIN, TINY, training

from fairseq_knnlm.calibration.table import read_table
from fairseq_knnlm.datastore import open_datastore

SAVE = ["--save-knnlm-dstore", "--dstore-mmap"]
KNN = ["--knnlm", "--k", 16, "--lmbda", 0.3, "--knn-temp", 2.0]
HALF = ["--lm-dtype", "bfloat16"]
OTHER = "near each other, and not the same"


def test_saved_evaluated_replayed_and_added_to(
    lab: Lab, tmp_path: Path, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    exact, half = tmp_path / "exact", tmp_path / "half"
    lab.evaluate("valid", *SAVE, exact)
    lab.evaluate("valid", *SAVE, half, *HALF)
    then, now = open_datastore(exact), open_datastore(half)
    assert np.array_equal(now.values, then.values)
    theirs, ours = (np.asarray(store.full_keys(), np.float64) for store in (then, now))
    assert 0 < np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 0.03
    assert now.manifest.origin.context["precision"] == "bfloat16"
    assert "computed in  bfloat16" in say(capsys, "info", "--dstore", half)

    for store in (exact, half):
        say(capsys, "build-index", "--dstore", store)
    results, table = tmp_path / "half.json", tmp_path / "table.npz"
    expected = lab.evaluate("test", *KNN, "--dstore-filename", exact)
    told = ["--results-json", results, "--score-table", table]
    caplog.clear()
    found = lab.evaluate("test", *KNN, "--dstore-filename", half, *HALF, *told)
    assert OTHER not in caplog.text
    assert found["loss"] == pytest.approx(expected["loss"], abs=0.01)
    assert json.loads(results.read_text())["context"]["precision"] == "bfloat16"
    assert read_table(table).card["context"]["precision"] == "bfloat16"
    assert "confirmed" in say(capsys, "replay", results, "--cpu", "--num-workers", 0)

    caplog.clear()
    lab.evaluate("test", *KNN, "--dstore-filename", half)
    assert caplog.text.count(OTHER) == 1
    caplog.clear()
    lab.evaluate("test", "--append-dstore", *SAVE, half)
    assert caplog.text.count("those that are added are computed in float32") == 1


def test_a_model_is_trained(lab: Lab, tmp_path: Path) -> None:
    """For as many updates as one in float32, which starts from the same weights."""
    flags = [*PLUGIN, "--arch", "transformer_lm", *TINY, "--ddp-backend", "legacy_ddp"]
    must(*training(lab.data, tmp_path, *flags, "--max-update", 5, *HALF))
    path = tmp_path / "checkpoint_last.pt"
    for weight in torch.load(path, weights_only=False)["model"].values():
        assert weight.dtype == torch.float32
        assert torch.isfinite(weight).all()
    expected = lab.evaluate("test", model="plain")["loss"]
    assert lab.evaluate("test", "--path", path)["loss"] == pytest.approx(expected, abs=0.02)
