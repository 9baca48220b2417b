"""An evaluation shared out over processes adds up to that of one, to the last digit.

The oracle is the run of one process over the whole split.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BLOCKS, Lab, eval_lm, must, run
from stores import assert_helps

from fairseq_knnlm.calibration.table import ScoreTable, read_table
from fairseq_knnlm.errors import ConfigError, TableError
from fairseq_knnlm.runs.joining import join_cards, join_results, join_tables

TIMES = ("seconds", "tokens_per_second", "search_seconds")
KNN = ["--k", 16, "--lmbda", 0.3, "--knn-temp", 2.0]
CACHE = ["--cache-lmbda", 0.2, "--cache-theta", 0.5]


def timeless(found: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in found.items() if name not in TIMES}


class Shared:
    """Runs over shares of a split, and one over the whole."""

    def __init__(self, lab: Lab, folder: Path, *flags: object, split: str = "test") -> None:
        self.lab, self.folder, self.flags, self.split = lab, folder, flags, split

    def evaluate(self, name: str, *flags: object) -> None:
        files = "--results-json", self.results(name), "--score-table", self.table(name)
        self.lab.evaluate(self.split, *self.flags, *files, *flags)

    def results(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def table(self, name: str) -> Path:
        return self.folder / f"{name}.npz"

    def whole(self) -> tuple[dict[str, Any], ScoreTable]:
        self.evaluate("whole")
        return json.loads(self.results("whole").read_text()), read_table(self.table("whole"))

    def share(self, number: int, of: int, *flags: object) -> None:
        self.evaluate(f"{of}-{number}", "--num-shards", of, "--shard-id", number, *flags)

    def joined(self, of: int) -> tuple[dict[str, Any], ScoreTable]:
        names = [f"{of}-{number}" for number in range(of)]
        found = join_results([self.results(name) for name in names])
        to = self.table(f"joined-{of}")
        join_tables([self.table(name) for name in reversed(names)], to)
        return found, read_table(to)


def assert_same(
    found: tuple[dict[str, Any], ScoreTable], whole: tuple[dict[str, Any], ScoreTable]
) -> None:
    """In every figure but times, and every byte of every column."""
    assert timeless(found[0]) == timeless(whole[0])
    assert list(found[0]) == list(whole[0])
    assert timeless(found[1].card) == timeless(whole[1].card)
    assert list(found[1].card) == list(whole[1].card)
    assert list(found[1].columns) == list(whole[1].columns)
    for name, column in whole[1].columns.items():
        assert found[1][name].dtype == column.dtype
        assert found[1][name].tobytes() == column.tobytes(), name


def memory(datastore: Path, *flags: object) -> list[object]:
    return ["--dstore-filename", datastore, *flags]


CASES: dict[str, list[object]] = {
    "base": [],
    "knn": ["--knnlm", *KNN],
    "cache": ["--experts", "cache", *CACHE, "--cache-window", 50],
    "cache by documents": ["--experts", "cache", *CACHE, "--cache-window", 7, "--cache-reset"],
    "pointers": ["--knnlm", *KNN, "--pointers", "replace", "--pointer-min", 2],
    "no context": ["--knnlm", *KNN, "--tokens-per-sample", 8, "--context-window", 0],
    "sentences": ["--sample-break-mode", "complete", "--skip-invalid-size-inputs-valid-test"],
}


@pytest.mark.parametrize("case", list(CASES))
def test_shares_join_to_the_whole(lab: Lab, datastore: Path, tmp_path: Path, case: str) -> None:
    flags = CASES[case]
    asks = memory(datastore) if "--knnlm" in flags else []
    shared = Shared(lab, tmp_path, *asks, *flags)
    whole = shared.whole()
    for of in (1, 2, 3, 4):
        for number in range(of):
            shared.share(number, of)
        assert_same(shared.joined(of), whole)
