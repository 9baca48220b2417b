"""How far a run is, in a file that it writes; and the same of all shares of one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fairseq_knnlm.runs import progress
from fairseq_knnlm.runs.progress import TellsProgress, progress_of


def batch(*rows: int) -> Any:
    return SimpleNamespace(rows=np.array(rows))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    found = SimpleNamespace(now=50.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: found.now)
    return found


def test_it_counts_tokens_and_writes_once_a_second(tmp_path: Path, clock: SimpleNamespace) -> None:
    """A row below 0 is of a token that does not count."""
    path = tmp_path / "p"
    told = TellsProgress(path, 9)
    assert not path.exists()
    said = []
    for seconds in (0, 0.5, 0.6):
        clock.now += seconds
        told.take(batch(-1, 0, 1))
        said.append(json.loads(path.read_text()))
    assert said == [{"tokens": 2, "of": 9}, {"tokens": 2, "of": 9}, {"tokens": 6, "of": 9}]
    told.take(batch(7))
    told.tell()
    assert progress_of([path]) == (9, 7)
    assert list(tmp_path.iterdir()) == [path]


def test_shares_add_up_as_far_as_they_have_come(tmp_path: Path) -> None:
    files = [tmp_path / str(number) for number in range(4)]
    assert progress_of(files) == (None, 0)
    files[0].write_text('{"tokens": 3, "of": 40}')
    files[2].write_text('{"tokens": 5, "of": 40}')
    files[3].write_text('{"tok')
    assert progress_of(files) == (40, 8)


def test_a_folder_that_went_away_ends_no_run(tmp_path: Path) -> None:
    TellsProgress(tmp_path / "gone" / "p", 9).take(batch(0))
    assert not list(tmp_path.iterdir())
