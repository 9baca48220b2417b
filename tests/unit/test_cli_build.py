"""``fairseq-knnlm build-index``: the index of a datastore."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest
from cli_calls import ROWS, Capture, indexed_store, refuse, say, small_store

from fairseq_knnlm.datastore import Datastore


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    return small_store(tmp_path)


@pytest.fixture
def indexed(tmp_path: Path, capsys: Capture) -> Datastore:
    return indexed_store(tmp_path, capsys)


def test_build_index_reports_what_it_made(
    store: Datastore, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "elsewhere" / "my.index"
    said = say(capsys, "build-index", "--dstore", store.path, "--indexfile", path)
    assert said.startswith(f"{path}: Flat\n{ROWS} keys, 32 bytes a key, built in")
    assert path.is_file()
    assert not store.index_path.exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--recipe", "paper"], "--recipe auto"),
        (["--recipe", "IVF8,Nonsense"], "factory string"),
        (["--recipe", "IVF8,Flat", "--probe", "0"], "--probe"),
    ],
)
def test_build_index_refuses(
    store: Datastore, flags: list[str], says: str, capsys: Capture
) -> None:
    assert says in refuse(capsys, "build-index", "--dstore", store.path, *flags)
    assert not store.index_path.exists()


def test_what_is_written_is_json(indexed: Datastore) -> None:
    content = json.loads((indexed.path / "manifest.json").read_text())
    assert content["format"].startswith("fairseq-knnlm")
    *_, card = (indexed.path / "knn.index").read_bytes()[:-16].partition(b'{"format"')
    assert json.loads(b'{"format"' + card)["format"] == "fairseq-knnlm index"


@pytest.mark.parametrize(
    "flags",
    [
        *(["--probe", str(value)] for value in (-3, 0, 9)),
        *(["--recall-queries", str(value)] for value in (-1, 10**9)),
        *(["--seed", str(value)] for value in (-1, 2**32)),
        *(["--train-rows", str(value)] for value in (-1, 0)),
        *(["--recall", value] for value in ("nan", "0", "1.5")),
        *(["--max-bytes-per-key", str(value)] for value in (-1, 0)),
    ],
)
def test_build_index_refuses_numbers_out_of_bounds(
    store: Datastore, flags: list[str], capsys: Capture
) -> None:
    said = refuse(capsys, "build-index", "--dstore", store.path, "--recipe", "IVF8,Flat", *flags)
    assert flags[0] in said
    assert not store.index_path.exists()


def test_a_second_build_of_an_index_is_refused(store: Datastore, capsys: Capture) -> None:
    lock = store.path / ".knn.index.lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        said = refuse(capsys, "build-index", "--dstore", store.path)
    assert "another process is writing" in said
