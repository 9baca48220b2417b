"""Saving and evaluating on Ray: what one process makes, whoever dies meanwhile."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Lab

from fairseq_knnlm.cli import main
from fairseq_knnlm.cluster.work import Place, _job
from fairseq_knnlm.datastore import open_datastore
from fairseq_knnlm.versions import versions

READ = ("--sample-break-mode", "none", "--tokens-per-sample", "16", "--context-window", "8")
SAVE = ("--gen-subset", "valid", "--cpu", "--block-rows", "32", "--max-tokens", "16", *READ)
EVALUATE = ("--gen-subset", "test", "--cpu", "--max-tokens", "64", "--k", "20", *READ)
#: What is not the same in two runs.
TIMES = {"seconds", "tokens_per_second", "search_seconds", "searches_per_second", "datastore"}
TIMES |= {"fingerprint", "receipt"}  # over times; where things lie


def on_ray(kind: str, address: str, lab: Lab, path: Path, *flags: object) -> int:
    words = ["cluster", kind, "--ray", address, "--workers", "2", lab.data]
    words += ["--path", lab.checkpoint(), "--dstore", path, *flags]
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def saved(lab: Lab) -> Path:
    """Of one process, with an index."""
    path = lab.folder / "saved-alone"
    words = ["save", lab.data, "--path", lab.checkpoint(), "--dstore", path, *SAVE]
    assert main([str(word) for word in words]) == 0
    assert main(["build-index", "--dstore", str(path)]) == 0
    return path


def test_saved_by_two_workers(lab: Lab, saved: Path, tmp_path: Path, address: str) -> None:
    assert on_ray("save", address, lab, tmp_path / "store", *SAVE) == 0
    found = open_datastore(tmp_path / "store", verify=True)
    assert found.fingerprint == open_datastore(saved).fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_worker_is_killed(lab: Lab, saved: Path, tmp_path: Path, address: str) -> None:
    """Once its first blocks are there; Ray has another one go on."""
    path, killed = tmp_path / "store", []

    def kill() -> None:
        while not (path / "blocks" / "000001").exists():
            time.sleep(0.002)
        for pid in workers():
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    watcher = threading.Thread(target=kill, daemon=True)
    watcher.start()
    assert on_ray("save", address, lab, path, *SAVE) == 0
    assert killed
    assert open_datastore(path, verify=True).fingerprint == open_datastore(saved).fingerprint
    assert not list(path.rglob(".*"))


def workers() -> list[int]:
    """The processes of Ray's that do a job."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"ray::_job" in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found


def test_evaluated_by_two_workers(
    lab: Lab, saved: Path, tmp_path: Path, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bar counts the tokens of both."""
    results = tmp_path / "shared-out.json"
    assert on_ray("evaluate", address, lab, saved, *EVALUATE, "--results-json", results) == 0
    (last,) = re.findall(r"evaluating: .*", capsys.readouterr().err.split("\r")[-1])
    tokens = json.loads(results.read_text())["tokens"]
    assert 100 < tokens < 1000  # which the bar does not round
    assert re.search(rf"100%.* {tokens}/{tokens} .* tokens/s\]", last), last
    alone = tmp_path / "alone.json"
    flags = ["--knnlm", "--dstore-filename", saved, *EVALUATE, "--results-json", alone]
    lab.evaluate("test", *flags)
    found, expected = (told(file) for file in (results, alone))
    assert found == expected
    assert {path.name for path in tmp_path.iterdir()} == {"shared-out.json", "alone.json"}


def test_an_index_whose_pieces_workers_write(
    lab: Lab, saved: Path, tmp_path: Path, address: str
) -> None:
    recipe = ["--recipe", "PCAR8,IVF4,PQ4x4fsr", "--seed", "3"]
    for name, words in (("alone", []), ("on-ray", ["cluster"])):
        shutil.copytree(saved, tmp_path / name)
        by = ["--ray", address, "--workers", "2"] if words else []
        flags = ["--dstore", str(tmp_path / name)]
        assert main([*words, "build-index", *by, *flags, *recipe]) == 0
    alone, on_ray = (
        {
            str(file.relative_to(tmp_path / name)): file.read_bytes()
            for file in files(name, tmp_path)
        }
        for name in ("alone", "on-ray")
    )
    assert alone == on_ray


def files(name: str, folder: Path) -> list[Path]:
    return [file for file in (folder / name).rglob("*") if file.is_file()]


def told(file: Path) -> dict[str, Any]:
    return {name: x for name, x in json.loads(file.read_text()).items() if name not in TIMES}


def test_what_a_share_refuses_is_told(
    lab: Lab, tmp_path: Path, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SAVE[:4], "1000000", *READ]
    assert on_ray("save", address, lab, tmp_path / "store", *words) == 1
    assert "more shards than blocks" in capsys.readouterr().err
    assert not list(tmp_path.glob("*"))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--num-shards", "2"], "for processes that you start yourself"),
        (["--gpus-per-worker=-1"], "--gpus-per-worker counts GPUs"),
        (["--workers", "0"], "--workers"),
    ],
)
def test_flags_that_cannot_be(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], says: str
) -> None:
    assert on_ray("save", "local", lab, tmp_path / "store", *SAVE, *flags) == 1
    assert says in capsys.readouterr().err


def test_a_folder_that_is_not_shared(tmp_path: Path) -> None:
    place = Place(str(tmp_path), str(tmp_path / "proof"), versions())
    found, _ = _job(lambda number: None, 0, place)
    assert found is not None and "is not shared by the machines" in found


def test_a_machine_with_another_faiss(tmp_path: Path) -> None:
    (tmp_path / "proof").touch()
    place = Place(str(tmp_path), str(tmp_path / "proof"), {**versions(), "faiss": "1.7.0"})
    found, _ = _job(lambda number: None, 0, place)
    assert found is not None and "another faiss" in found
