"""A budget of time as people give it: measured, fitted, and kept by evaluation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BLOCKS, Lab, must, run

from fairseq_knnlm.calibration.report import measured
from fairseq_knnlm.calibration.stored import Calibration, read_calibration
from fairseq_knnlm.calibration.table import ScoreTable, read_table
from fairseq_knnlm.datastore import open_datastore
from fairseq_knnlm.experts.cache import CacheExpert
from fairseq_knnlm.experts.knn import KnnExpert

K = ["--k", 64]
EXPERTS = "knn,cache,ngram,suffix"


@pytest.fixture(scope="module")
def store(lab: Lab) -> Path:
    path = lab.folder / "budget"
    model = ["--path", lab.checkpoint(), *BLOCKS, "--sample-break-mode", "none", "--cpu"]
    must("fairseq-knnlm", "save", lab.data, "--dstore", path, *model)
    must("fairseq-knnlm", "build-index", "--dstore", path)
    return path


def written(lab: Lab, store: Path, file: Path, *flags: object, split: str = "valid") -> ScoreTable:
    asked = ["--knnlm", "--dstore-filename", store, "--experts", EXPERTS, "--mixer", "none"]
    lab.evaluate(split, *asked, *K, "--score-table", file, *flags)
    return read_table(file)


@pytest.fixture(scope="module")
def tables(lab: Lab, store: Path) -> tuple[ScoreTable, ScoreTable]:
    """Of valid, without and with what columns cost."""
    files = [lab.folder / "budget-plain.npz", lab.folder / "budget-timed.npz"]
    plain = written(lab, store, files[0])
    return plain, written(lab, store, files[1], "--table-costs")


def test_measuring_changes_nothing_that_is_measured(
    tables: tuple[ScoreTable, ScoreTable],
) -> None:
    """All columns are the same to the bit; the card tells costs besides."""
    plain, timed = tables
    assert list(plain.columns) == list(timed.columns)
    for name, column in plain.columns.items():
        assert np.array_equal(column, timed[name], equal_nan=column.dtype.kind == "f"), name
    assert "costs" not in plain.card
    times = {"seconds", "tokens_per_second", "search_seconds", "costs"}
    told = [{k: x for k, x in one.card.items() if k not in times} for one in tables]
    assert told[0] == told[1]


def test_what_is_measured_is_time(tables: tuple[ScoreTable, ScoreTable]) -> None:
    """Of everybody; all columns of an expert take no less than a few of them."""
    costs, experts = tables[1].card["costs"], tables[1].experts
    assert list(costs["experts"]) == list(experts)
    assert costs["lm"] > 0
    assert costs["mixing"] > 0
    for name, some in costs["experts"].items():
        places = sorted(place for group in some["groups"] for place in group["columns"])
        assert places == list(range(len(experts[name])))
        assert max(group["shared"] + group["first"] for group in some["groups"]) > 0
    ngram = costs["experts"]["ngram"]["groups"][0]
    knn = costs["experts"]["knn"]["groups"][0]
    assert knn["shared"] + knn["first"] < 1
    assert ngram["shared"] + ngram["first"] < 1


def calibration(store: Path) -> Calibration:
    found = read_calibration(store / "calibration.json", [open_datastore(store).fingerprint])
    assert found is not None
    return found


@pytest.fixture(scope="module")
def tuned(lab: Lab, store: Path) -> str:
    """What `tune` says without a budget; it leaves table and calibration in the datastore."""
    model = ["--path", lab.checkpoint(), *BLOCKS, "--sample-break-mode", "none", "--cpu"]
    said = must("fairseq-knnlm", "tune", "--dstore", store, "--data", lab.data, *model, *K)
    assert calibration(store).least_speed is None
    return said


def test_a_budget_is_kept_by_evaluation(
    lab: Lab, store: Path, tuned: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands as they are typed. Nobody is asked but those that are mixed, in their settings."""
    assert "| speed |" in tuned
    # Halfway between the fastest and the slowest: there is something to be had, and to be left out.
    gains = tuned.split("perplexity where --skip-searches")[0]
    rows = [row.split("|") for row in gains.splitlines() if row.count("|") == 7][2:]
    speeds = sorted(float(row[5]) for row in rows)
    assert rows[0][1].strip() == "language model alone"
    assert speeds[-1] == 1
    budget = round((speeds[0] + speeds[-2]) / 2 - 0.01, 3)
    tune = ["fairseq-knnlm", "tune", "--dstore", store]
    must(*tune, "--score-table", store / "valid.npz", "--speed", budget)
    found = calibration(store)
    assert found.least_speed == budget
    kept = found.speed(found.best)
    assert kept is not None
    assert kept >= budget
    assert found.best.experts
    made: list[tuple[str, Sequence[Any], bool]] = []
    for kind in (CacheExpert, KnnExpert):

        def made_of(self: Any, *given: Any, before: Any = kind.__init__, **named: Any) -> None:
            before(self, *given, **named)
            made.append((self.name, list(self.settings), self.features))

        monkeypatch.setattr(kind, "__init__", made_of)
    file = tmp_path / "results.json"
    memory = ["--knnlm", "--dstore-filename", store, *K]
    lab.evaluate("test", *memory, "--results-json", file)
    results = json.loads(file.read_text())
    assert results["mixed"] == list(found.best.experts)
    mixer = found.best.mixer
    for name, settings, features in made:
        ours = [one.setting for one in mixer.components if one.expert == name]
        assert list(map(dict, settings)) == ours
        assert features == any(one.startswith(f"{name}_") for one in mixer.features)
    assert {name for name, *_ in made} == {*found.best.experts} - {"ngram", "suffix"}
    # And it is the mixture that was fitted: the same as from all columns of a table.
    copy = Path(shutil.copytree(store, tmp_path / "copy"))
    table = written(lab, copy, tmp_path / "test.npz", split="test")
    expected = measured(found, table).best.perplexity
    assert results["perplexity"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.usefixtures("tuned")
def test_a_budget_that_cannot_be_kept_leaves_the_calibration(store: Path) -> None:
    table, place = store / "valid.npz", store / "calibration.json"
    before = place.read_bytes()
    tune = ["fairseq-knnlm", "tune", "--dstore", store, "--score-table", table, "--speed", 0.9999]
    ran = run(*tune)
    assert ran.code == 1
    said = ran.out
    assert "no mixture keeps the budget" in said
    assert "the fastest mixture, of " in said
    assert place.read_bytes() == before
