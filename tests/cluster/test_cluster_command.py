"""``fairseq-knnlm cluster up | status | down``: shards that several runs use."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_calls import Capture, refuse, say
from conftest import run
from stores import alter, random_entries, write_blocks

from fairseq_knnlm.cluster.kept import all_kept, end
from fairseq_knnlm.cluster.opening import open_sharded
from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.index.build import BuildOptions
from fairseq_knnlm.index.storage import load
from fairseq_knnlm.runs.build_index import build_index

pytestmark = pytest.mark.cluster

ROWS, WIDTH, K = 600, 8, 20


def indexed(
    path: Path, forgotten: list[list[tuple[int, int]]] | None = None, recipe: str = "IVF8,Flat"
) -> Datastore:
    keys = random_entries(ROWS, WIDTH)[0]
    store = write_blocks(path, keys, np.arange(ROWS) % 50, (200, 400), forgotten)
    build_index(store, store.index_path, BuildOptions(queries=0), recipe=recipe, device="cpu")
    return store


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    return indexed(tmp_path / "store")


@pytest.fixture(autouse=True)
def nothing_stays(address: str) -> Iterator[None]:
    yield
    end(all_kept())


def up(capsys: Capture, address: str, store: Datastore, shards: int, replicas: int = 1) -> str:
    words = ["--dstore", store.path, "--knn-shards", shards, "--knn-replicas", replicas]
    return say(capsys, "cluster", "up", "--ray", address, *words)


def assert_found(store: Datastore, address: str, shards: int) -> None:
    """A run finds what the one index finds, in so many shards."""
    index = open_sharded(store, address, shards=1)
    assert len(index.shards) == shards
    asked = torch.randn(30, WIDTH, generator=torch.manual_seed(9))
    facts = {"datastore": store.fingerprint, "rows": len(store), "width": WIDTH}
    true = load(store.index_path, blocks=store.blocks, **facts).search(asked, K)
    for part, whole in zip(index.search(asked, K), true, strict=True):
        assert torch.equal(part, whole)


def test_runs_use_what_is_up(
    store: Datastore, address: str, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    assert "in 3 shards, 2 of each" in up(capsys, address, store, 3, 2)
    caplog.set_level("INFO")
    assert_found(store, address, 3)
    assert "is searched in the 3 shards that are up" in caplog.text
    lines = say(capsys, "cluster", "status", "--ray", address).splitlines()
    assert len(lines) == 6
    seal = store.fingerprint[:12]
    for number, line in enumerate(lines):
        begin = f"{seal}  shard {number // 2 + 1} of 3, copy {number % 2 + 1}: 200 entries of"
        assert line.startswith(f"{begin} {store.path}, "), line
    assert "ended 6 processes" in say(capsys, "cluster", "down", "--ray", address)
    assert say(capsys, "cluster", "status", "--ray", address) == "no shards are up\n"
    assert_found(store, address, 1)


def test_they_outlive_the_command_and_a_kill(
    store: Datastore, address: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command finds by itself that this Ray is on the loopback device alone."""
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)
    words = ["cluster", "up", "--ray", address, "--dstore", store.path, "--knn-shards", 2]
    ran = run(sys.executable, "-m", "fairseq_knnlm.cli", *words)
    assert ran.code == 0, ran.out
    assert ran.out.splitlines()[0] == f"{store.path} is up in 2 shards, 1 of each"
    assert len(ran.out.splitlines()) == 2  # and nothing of Ray's
    assert_found(store, address, 2)
    said = say(capsys, "cluster", "status", "--ray", address)
    os.kill(int(re.findall(r"process (\d+)", said)[0]), signal.SIGKILL)
    assert_found(store, address, 2)


def test_up_again_starts_what_is_missing(store: Datastore, address: str, capsys: Capture) -> None:
    up(capsys, address, store, 2)
    (first, last) = all_kept()
    pids = re.findall(r"process (\d+)", say(capsys, "cluster", "status", "--ray", address))
    end([last])
    assert_found(store, address, 1)  # not with the half that is left
    up(capsys, address, store, 2)
    again = re.findall(r"process (\d+)", say(capsys, "cluster", "status", "--ray", address))
    assert again[0] == pids[0]
    assert again[1] != pids[1]
    assert all_kept() == [first, last]


def test_cut_otherwise_is_refused(store: Datastore, address: str, capsys: Capture) -> None:
    up(capsys, address, store, 2)
    words = ["--dstore", store.path, "--knn-shards", 3]
    said = refuse(capsys, "cluster", "up", "--ray", address, *words)
    assert "is up already, cut otherwise" in said
    assert "cluster down" in said


def test_another_datastore_or_index_has_shards_of_its_own(
    store: Datastore, address: str, capsys: Capture
) -> None:
    up(capsys, address, store, 3)
    forgetful = indexed(store.path, [[(0, 5)], [], []])
    assert_found(forgetful, address, 1)
    capsys.readouterr()
    said = refuse(capsys, "cluster", "down", "--ray", address, "--dstore", store.path)
    assert "no shards of" in said
    assert store.fingerprint[:12] in said
    assert_found(indexed(store.path, recipe="IVF4,Flat"), address, 1)


def test_down_of_one_datastore(store: Datastore, address: str, capsys: Capture) -> None:
    other = indexed(store.path.with_name("other"), [[(0, 5)], [], []])
    up(capsys, address, store, 1)
    up(capsys, address, other, 1)
    say(capsys, "cluster", "down", "--ray", address, "--dstore", store.path)
    assert [one.datastore for one in all_kept()] == [other.fingerprint]


def test_nothing_is_left_of_what_cannot_be_loaded(
    store: Datastore, address: str, capsys: Capture
) -> None:
    alter(next(store.blocks[2].path.glob("piece-*")))
    words = ["--dstore", store.path, "--knn-shards", 3]
    said = refuse(capsys, "cluster", "up", "--ray", address, *words)
    assert "is damaged" in said
    assert all_kept() == []


@pytest.mark.parametrize("action", ["up", "status", "down"])
def test_a_ray_that_ends_with_the_command(action: str, capsys: Capture) -> None:
    words = ["--dstore", "x"] if action == "up" else []
    said = refuse(capsys, "cluster", action, "--ray", "local", *words)
    assert "--ray local ends with the command" in said
    assert "ray start --head" in said


@pytest.mark.parametrize("flag", ["--knn-shards", "--knn-replicas"])
def test_numbers_that_count_nothing(flag: str, capsys: Capture) -> None:
    words = ["--ray", "auto", "--dstore", "x", flag, 0]
    assert flag in refuse(capsys, "cluster", "up", *words)
