"""``fairseq-knnlm report``: a calibration on another table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_calls import Capture, calibration, call, refuse, say, small_store, write_table

from fairseq_knnlm.calibration.stored import write_calibration
from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.mixture.components import LM, Component
from fairseq_knnlm.mixture.mixers import Fixed


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    return small_store(tmp_path)


@pytest.mark.parametrize("own", ["split", "distances", "neither"])
def test_text_that_the_datastore_holds_comes_with_a_warning(
    store: Datastore, tmp_path: Path, own: str, capsys: Capture
) -> None:
    split = "train" if own == "split" else "valid"
    table = write_table(tmp_path / "x.npz", store.fingerprint, split=split, own=own == "distances")
    for command in ("tune", "report"):
        assert call(command, "--dstore", store.path, "--score-table", table) == 0
        said = capsys.readouterr().err
        assert ("warning: the datastore seems to hold the text" in said) == (own != "neither")
        assert ("'train'" in said) == (own == "split")
        assert ("at distance 0" in said) == (own == "distances")


def test_report_judges_the_calibration_on_another_table(
    store: Datastore, tmp_path: Path, capsys: Capture
) -> None:
    table = write_table(tmp_path / "test.npz", store.fingerprint, split="test")
    report = ["report", "--dstore", store.path, "--score-table", table]
    assert "has no calibration" in refuse(capsys, *report)
    fitted = calibration(store.fingerprint)
    setting = {"suffix": 0, "k": 0, "temperature": 2.0}
    knn = replace(fitted.best, mixer=Fixed((LM, Component("knn", setting)), (0.875, 0.125)))
    write_calibration(store.calibration_path, replace(fitted, mixtures=(fitted.mixtures[0], knn)))
    lm = np.exp(-2)
    sharp = np.where(np.arange(960) % 2, 1.0, 0.0)
    perplexity = np.exp(-np.log(0.875 * lm + 0.125 * sharp).mean())
    assert say(capsys, *report).splitlines() == [
        "test, 960 tokens; fitted on valid, 1,000 tokens",
        "| mixture              | perplexity | change |         |",
        "|----------------------|------------|--------|---------|",
        f"| language model alone | {np.exp(2):>10.2f} |        |         |",
        f"| knn, fixed           | {perplexity:>10.2f} | {perplexity * lm - 1:>+6.1%} | <- used |",
    ]


@pytest.mark.parametrize(
    ("card", "says"),
    [
        ({"model": "x" * 64}, "another language model"),
        ({"experts": {}}, "lacks knn"),
        ({"described": {"knn": {"k": 16}}}, "another number of neighbours"),
    ],
)
def test_report_refuses_a_table_of_another_run(
    store: Datastore,
    tmp_path: Path,
    card: dict[str, Any],
    says: str,
    capsys: Capture,
) -> None:
    write_calibration(store.calibration_path, calibration(store.fingerprint))
    table = write_table(tmp_path / "test.npz", store.fingerprint, **card)
    assert says in refuse(capsys, "report", "--dstore", store.path, "--score-table", table)
