"""The example of published columns, as a process, on a few made-up ones."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import numpy as np
from conftest import ROOT, must, run

SCRIPT = ROOT / "examples" / "penn_treebank" / "mixture.py"
ROWS = 1000
NAMES = ["the best model alone", "all models, fixed weights"]


def write_columns(folder: Path, split: str, seed: int) -> np.ndarray:
    """Two models that are right in turns, the second more so; returns its log-probabilities."""
    words = np.random.default_rng(seed).integers(0, 40, ROWS)
    (folder / f"{split}.words").write_text("\n".join(f"w{word}" for word in words))
    turns = np.arange(ROWS) % 2
    good = np.log(np.where(turns, 0.9, 0.3)).astype(np.float32)
    poor = np.log(np.where(turns, 0.1, 0.7)).astype(np.float32)
    np.savez_compressed(folder / f"{split}.npz", **{"Poor-5gram": poor, "LSTM-good": good})
    return good


def test_the_table_says_what_each_part_adds(tmp_path: Path) -> None:
    good = [write_columns(tmp_path, split, seed) for seed, split in enumerate(("valid", "test"))]
    out = tmp_path / "out"
    said = must(sys.executable, SCRIPT, tmp_path, "--out", out)
    assert "--column lstmgood=" in said
    assert (out / "calibration.json").exists()
    table = said.split("all fitted on valid:")[1]
    rows = dict(re.findall(r"^\| (.*?) *\| +[\d.]+ \| +([\d.]+) \|", table, flags=re.MULTILINE))
    assert list(rows)[:2] == NAMES
    assert rows[NAMES[0]] == f"{math.exp(-good[1].mean()):.2f}"
    # What mixes 0.9 with 0.1 and 0.3 with 0.7 by w has its best at the w found here by trying.
    weights = np.linspace(0, 1, 1001)
    losses = [-np.log([0.9 * w + 0.1 * (1 - w), 0.3 * w + 0.7 * (1 - w)]).mean() for w in weights]
    assert abs(float(rows[NAMES[1]]) - math.exp(min(losses))) < 0.01
    assert len([name for name in rows if name.startswith(("a gate by", "+ how"))]) == 4
    assert any(name.startswith("what tune chose: ") for name in rows)


def test_a_folder_without_columns_is_refused(tmp_path: Path) -> None:
    ran = run(sys.executable, SCRIPT, tmp_path, "--out", tmp_path / "out")
    assert ran.code == 1
    assert "has no valid.npz that can be read" in ran.out


def test_help_says_how_to_run_it() -> None:
    assert "example: python examples/penn_treebank/mixture.py" in must(
        sys.executable, SCRIPT, "--help"
    )
