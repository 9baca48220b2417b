"""A large datastore of synthetic keys is gone on with after a kill, and comes out the same."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from fairseq_knnlm.datastore import open_datastore

ENTRIES = 4 * 8192 + 3000


def command(folder: Path, *more: str) -> list[str]:
    sizes = f"--entries {ENTRIES} --width 32 --block-rows 8192 --k 20 --queries 200"
    script = str(ROOT / "benchmarks" / "scale.py")
    return [sys.executable, script, *sizes.split(), "--folder", str(folder), *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder that was made without a stop, and what was said."""
    folder = tmp_path_factory.mktemp("scale")
    done = subprocess.run(command(folder), check=True, capture_output=True, text=True)
    return folder, done.stdout


def test_figures_are_told_and_kept(whole: tuple[Path, str]) -> None:
    folder, said = whole
    found = json.loads((folder / "scale.json").read_text())
    assert found["built"]["rows"] == ENTRIES
    assert found["built"]["blocks"] == 5
    assert 0.5 < found["whole"]["recall"] <= 1
    assert found["shards"]["shards"] == 4
    assert found["shards"]["same_distances"]
    assert found["shards"]["same_neighbours"] > 0.99
    for words in ("recall@20", "queries/s, whole index", "queries/s, 4 shards", f"{ENTRIES:,}"):
        assert words in said


def test_a_killed_run_is_gone_on_with(whole: tuple[Path, str], tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    process = subprocess.Popen(command(folder), stdout=subprocess.DEVNULL)
    while not (folder / "datastore/blocks/000001").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = (folder / "datastore/blocks/000000/manifest.json").stat().st_mtime_ns
    done = subprocess.run(command(folder), check=True, capture_output=True, text=True)
    assert " of 5 blocks are there" in done.stdout
    assert "0 of 5" not in done.stdout
    assert (folder / "datastore/blocks/000000/manifest.json").stat().st_mtime_ns == first
    made, expected = (open_datastore(each / "datastore") for each in (folder, whole[0]))
    assert made.fingerprint == expected.fingerprint
    for block, other in zip(made.blocks, expected.blocks, strict=True):
        (piece,), (true,) = (each.path.glob("piece-*") for each in (block, other))
        assert piece.name == true.name
        assert piece.read_bytes() == true.read_bytes()
    assert not list(folder.rglob(".*partial*"))


def test_another_run_in_the_same_folder_is_refused(whole: tuple[Path, str]) -> None:
    done = subprocess.run(command(whole[0], "--seed", "1"), capture_output=True, text=True)
    assert done.returncode == 1
    assert "another run" in done.stderr
