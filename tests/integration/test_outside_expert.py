"""An expert from outside the package, by the commands people type: against counts by hand."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, Lab, must, run

from fairseq_knnlm.calibration.report import measured
from fairseq_knnlm.calibration.stored import Calibration, read_calibration
from fairseq_knnlm.calibration.table import ScoreTable, read_table
from fairseq_knnlm.datastore import open_datastore
from fairseq_knnlm.mixture.components import Component

OUTSIDE = ROOT / "tests" / "outside" / "unigram_expert"
GIVEN = ["--unigram-lmbda", 0.3, "--unigram-smoothing", 2.0]


@dataclass(frozen=True)
class Outside:
    """A datastore, and commands in which the expert takes part."""

    lab: Lab
    store: Path

    def evaluate(self, split: str, *flags: object) -> str:
        """``fairseq-eval-lm`` with the package from outside; what it said."""
        asked = ["--user-dir", OUTSIDE, "--dstore-filename", self.store, "--experts", "unigram"]
        return must("fairseq-eval-lm", *self.lab.command(split, *asked, *flags))

    @property
    def calibration(self) -> Calibration:
        fingerprint = open_datastore(self.store).fingerprint
        found = read_calibration(self.store / "calibration.json", [fingerprint])
        assert found is not None
        return found

    def by_hand(self, tokens: np.ndarray, smoothing: float) -> np.ndarray:
        """(N,) log p of tokens."""
        values, vocabulary = np.load(self.store / "values.npy"), 4 + self._types
        counts = np.bincount(values, minlength=vocabulary) + smoothing
        return np.log(counts[tokens] / counts.sum())

    @property
    def _types(self) -> int:
        return len((self.lab.data / "dict.txt").read_text().splitlines())


@pytest.fixture(scope="module")
def outside(lab: Lab, datastore: Path) -> Outside:
    return Outside(lab, Path(shutil.copytree(datastore, lab.folder / "outside")))


@dataclass(frozen=True)
class Given:
    """What an evaluation with weights by flags said and left behind."""

    said: str
    table: ScoreTable
    results: dict[str, Any]


@pytest.fixture(scope="module")
def given(outside: Outside) -> Given:
    table, results = outside.store / "given.npz", outside.store.with_suffix(".json")
    written = ["--score-table", table, "--results-json", results]
    said = outside.evaluate("test", *GIVEN, *written)
    return Given(said, read_table(table), json.loads(results.read_text()))


def test_its_table_has_all_settings_and_features(outside: Outside, given: Given) -> None:
    table = given.table
    for smoothing in (0.01, 1.0, 100.0, 2.0):
        found = table.column(Component("unigram", {"smoothing": smoothing}))
        np.testing.assert_allclose(found, outside.by_hand(table["token"], smoothing), rtol=1e-5)
    assert table.card["features"] == ["unigram_before"]
    counts = np.bincount(np.load(outside.store / "values.npy"), minlength=200)
    np.testing.assert_allclose(
        table["unigram_before"][1:], np.log1p(counts[table["token"][:-1]]), rtol=1e-5
    )


def test_its_flags_mix_it(outside: Outside, given: Given) -> None:
    table, results = given.table, given.results
    p = 0.7 * np.exp(table["lm"].astype(np.float64))
    p += 0.3 * np.exp(outside.by_hand(table["token"], 2.0))
    assert results["loss"] == pytest.approx(-np.log2(p).mean(), abs=1e-5)
    assert results["weights"][1] == {
        "expert": "unigram",
        "weight": pytest.approx(0.3),
        "smoothing": 2.0,
    }
    assert results["unigrams_asked"] == results["tokens"]
    assert results["mixture_from"] == "given"


def test_the_report_tells_of_it(given: Given) -> None:
    tokens = given.results["tokens"]
    assert "unigram: lambda 0.3, smoothing 2 (given)" in given.said
    assert f"unigrams were asked of {tokens} tokens" in given.said
    ours = re.search(r"mixture +perplexity (\d+\.\d\d)", given.said)
    assert ours and float(ours[1]) == pytest.approx(given.results["perplexity"], abs=0.01)


def test_it_is_fitted_and_evaluated_from_the_calibration(outside: Outside, given: Given) -> None:
    valid, results = outside.store / "valid.npz", outside.store.with_suffix(".json")
    outside.evaluate("valid", "--mixer", "none", "--score-table", valid)
    tune = ["tune", "--dstore", outside.store, "--score-table", valid]
    said = must("fairseq-knnlm", *tune)
    assert re.search(r"^\| unigram, fixed +\| +\d", said, re.M)
    calibration = outside.calibration
    assert calibration.experts == {"unigram": {"tokens": len(open_datastore(outside.store))}}
    assert calibration.find(["unigram"], "gate") is not None

    outside.evaluate("test", "--mixer", "gate", "--results-json", results)
    found = json.loads(results.read_text())
    expected = measured(calibration, given.table).find(["unigram"], "gate")
    assert expected is not None
    assert found["mixture_from"] == "calibrated on valid"
    assert found["loss"] == pytest.approx(expected.bits, abs=1e-4)
    assert found["perplexity"] < math.inf


def test_without_the_package_nobody_knows_it(outside: Outside) -> None:
    flags = ["--dstore-filename", outside.store, "--experts", "unigram"]
    ran = run("fairseq-eval-lm", *outside.lab.command("test", *flags))
    assert ran.code == 1
    assert "of knn, cache, ngram, suffix, lm2" in ran.out
    assert "Traceback" not in ran.out
