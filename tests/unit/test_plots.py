"""Curves: a picture appears, or nothing where matplotlib is not installed."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairseq_knnlm.calibration.curves import draw_curves
from fairseq_knnlm.calibration.table import ScoreTable


def table(rows: int, *, knn: bool = True) -> ScoreTable:
    """Of neighbours at two temperatures, fewer of them and some with a suffix; and of a cache."""
    rng = np.random.default_rng(1)
    grid = [(0, 0, 1.0), (0, 0, 4.0), (0, 4, 1.0), (2, 0, 1.0)]
    experts: dict[str, list[dict[str, Any]]] = {"cache": [{"theta": 0.5, "window": 500}]}
    columns = {"lm": -3 * rng.random(rows), "cache": -4 * rng.random((rows, 1))}
    columns["cache"][::9] = np.nan
    if knn:
        experts["knn"] = [{"suffix": s, "k": k, "temperature": t} for s, k, t in grid]
        columns["knn"] = np.log(rng.beta(0.5, 1, (rows, len(grid))))
        columns["knn"][::3] = -np.inf
    return ScoreTable(columns, {"experts": experts, "split": "valid", "k": 16})


@pytest.mark.parametrize("knn", [True, False])
def test_a_picture_appears(tmp_path: Path, knn: bool) -> None:
    image = pytest.importorskip("matplotlib.image")
    path = tmp_path / "new" / "curves.png"
    assert draw_curves(table(300, knn=knn), path)
    found = image.imread(path)
    assert found.shape[0] > 200
    assert found.shape[1] > 2 * found.shape[0]
    assert found.std() > 0.01  # something is drawn
    assert list(path.parent.iterdir()) == [path]


def test_without_matplotlib_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert not draw_curves(table(300), tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())
