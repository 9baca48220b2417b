"""``fairseq-knnlm import``: files of urvashik/knnlm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cli_calls import ROWS, WIDTH, Capture, legacy_store, refuse, say, small_store
from stores import random_entries

from fairseq_knnlm.datastore import Datastore, open_datastore


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    return small_store(tmp_path)


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return legacy_store(tmp_path)


def test_import_converts(prefix: Path, tmp_path: Path, capsys: Capture) -> None:
    old = ["--dstore", prefix, "--dstore-size", ROWS, "--dstore-fp16"]
    said = say(capsys, "import", *old, "--out", tmp_path / "new", "--vocabulary", 50)
    assert f"{ROWS} entries of width {WIDTH}" in said
    keys, values = random_entries(ROWS, WIDTH)
    new = open_datastore(tmp_path / "new", verify=True)
    assert np.array_equal(new.keys, keys.astype(np.float16))
    assert np.array_equal(new.values, values)
    assert "exists already" in refuse(capsys, "import", *old, "--out", tmp_path / "new")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "--dstore-size"),
        (["--dstore-size", ROWS], "--dstore-fp16"),
        (["--dstore-size", ROWS + 1, "--dstore-fp16"], "--dstore-size"),
        (["--dstore-size", ROWS, "--dstore-fp16", "--vocabulary", 40_000], "overflowed"),
        (["--dstore-size", ROWS, "--dstore-fp16", "--vocabulary", 30], "no token ids"),
    ],
)
def test_import_refuses(
    prefix: Path,
    tmp_path: Path,
    flags: list[object],
    says: str,
    capsys: Capture,
) -> None:
    command = ["import", "--dstore", prefix, "--out", tmp_path / "new", *flags]
    assert says in refuse(capsys, *command)
    assert not (tmp_path / "new").exists()


def test_import_needs_old_files(store: Datastore, tmp_path: Path, capsys: Capture) -> None:
    said = refuse(capsys, "import", "--dstore", store.path, "--out", tmp_path / "new")
    assert "PREFIX_keys.npy" in said


@pytest.mark.parametrize("row", [0, 200, 399])
@pytest.mark.parametrize(("value", "says"), [(0, "never filled"), (np.nan, "NaN")])
def test_import_finds_holes_and_what_is_no_number(
    tmp_path: Path, row: int, value: float, says: str, capsys: Capture
) -> None:
    keys, values = random_entries(ROWS, WIDTH)
    keys[row] = value
    keys.tofile(tmp_path / "old_keys.npy")
    values.tofile(tmp_path / "old_vals.npy")
    command = ["import", "--dstore", tmp_path / "old", "--dstore-size", ROWS]
    assert says in refuse(capsys, *command, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()
