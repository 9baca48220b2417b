"""What killed processes leave, and power cuts: what `tools/chaos.py` has found."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from stores import origin, random_entries, write_cut, write_store

from fairseq_knnlm.datastore import Datastore, making, open_datastore
from fairseq_knnlm.datastore import compacting as compaction
from fairseq_knnlm.datastore.compacting import compact
from fairseq_knnlm.datastore.forgetting import forget
from fairseq_knnlm.datastore.making import Making, Plan, is_in_the_making
from fairseq_knnlm.datastore.writer import check_new
from fairseq_knnlm.errors import DatastoreError
from fairseq_knnlm.files import Claim, write_json
from fairseq_knnlm.index.storage import _settled
from fairseq_knnlm.runs import opening
from fairseq_knnlm.runs.places import check_datastore_output, check_new_datastore

KEYS, VALUES = random_entries(100, 6)
#: Of a killed process: locks that nobody holds, and what is temporary.
LEFT = (".manifest.json.lock", "blocks/.000000.lock", "blocks/000001/.piece-ab.npy.lock")


class Killed(BaseException):
    """The process ends here."""


def add(store: Datastore, rows: int) -> Making:
    """Blocks for the first rows once more, all made and not yet part of the datastore."""
    plan = Plan(6, "float16", store.manifest.origin, [0, 5, rows], number=3)
    making = Making(store.path, replace(plan, onto=store.fingerprint))
    for block in plan.blocks:
        own = plan.rows(block)
        writer = making.writer(block)
        writer.write(np.arange(len(own)), KEYS[own], VALUES[own])
        writer.publish()
    return making


def killed_when_joined(store: Datastore, monkeypatch: pytest.MonkeyPatch, rows: int = 9) -> Making:
    """Killed right behind the moment at which the blocks became part of the datastore."""
    adding = add(store, rows)

    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(making, "_end", die)
        adding.join()
    assert is_in_the_making(store.path)
    return adding


def test_what_was_added_is_not_added_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write_cut(tmp_path / "store")
    adding = killed_when_joined(store, monkeypatch)
    there = open_datastore(store.path)
    assert np.array_equal(there.values, [*VALUES, *VALUES[:9]])
    Making(store.path, adding.plan).join()
    assert open_datastore(store.path).fingerprint == there.fingerprint
    assert not is_in_the_making(store.path)


@pytest.mark.parametrize("change", ["forget", "compact"])
def test_what_was_added_and_forgotten_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Once the datastore is changed, nothing is in the making."""
    store = write_cut(tmp_path / "store")
    killed_when_joined(store, monkeypatch)
    if change == "forget":
        forget(store.path, [(100, 109)])
        assert np.array_equal(open_datastore(store.path).values, VALUES)
    else:
        compact(store.path)
        assert len(open_datastore(store.path)) == 109
    assert not is_in_the_making(store.path)


def test_compacting_again_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that a killed process wrote, and nobody lists, do not count."""
    for name in ("whole", "killed"):
        write_cut(tmp_path / name)
        forget(tmp_path / name, [(3, 5), (60, 70)])

    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(compaction, "write_manifest", die)
        compact(tmp_path / "killed")
    assert (tmp_path / "killed" / "blocks" / "000003").exists()
    found = [compact(tmp_path / name) for name in ("whole", "killed")]
    assert found[0] is not None and found[1] is not None
    assert found[0].fingerprint == found[1].fingerprint
    folders = [
        sorted(path.name for path in (one.path / "blocks").iterdir()) for one in found if one
    ]
    assert folders[0] == folders[1]


def leave(path: Path) -> None:
    """What a process leaves that was killed in the midst of it."""
    for name in LEFT:
        (path / name).touch()
    (path / "blocks" / ".000009.partial-x").mkdir()


@pytest.mark.parametrize("change", ["forget", "compact", "refused"])
def test_locks_that_nobody_holds_go(tmp_path: Path, change: str) -> None:
    store = write_cut(tmp_path / "store")
    leave(store.path)
    (tmp_path / ".store.lock").touch()
    if change == "forget":
        forget(store.path, [(0, 1)])
    elif change == "compact":
        compact(store.path)
    else:
        with pytest.raises(DatastoreError, match="exists already"):
            check_new(store.path)
        assert not (tmp_path / ".store.lock").exists()
    assert not list(store.path.rglob(".*"))


def test_what_is_no_datastore_is_left_alone(tmp_path: Path) -> None:
    """Whatever hidden files are in a folder that is none."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".mail.lock").touch()
    with pytest.raises(DatastoreError, match="exists already"):
        check_new(tmp_path / "home")
    assert (tmp_path / "home" / ".mail.lock").exists()


def test_a_lock_that_somebody_holds_stays(tmp_path: Path) -> None:
    store = write_cut(tmp_path / "store")
    with Claim(store.path / "blocks" / "000007"):
        compact(store.path)
        assert (store.path / "blocks" / ".000007.lock").exists()


def test_new_folders_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder above a new one is flushed, else a power cut takes what was published in it."""
    flushed = set()
    real = os.fsync

    def fsync(handle: int) -> None:
        flushed.add(os.fstat(handle).st_ino)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(tmp_path / "new" / "newer" / "file.json", {})
    for folder in (tmp_path, tmp_path / "new", tmp_path / "new" / "newer"):
        assert folder.stat().st_ino in flushed, folder


def test_the_end_of_a_making_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing may come back that says that blocks are in the making."""
    adding = add(write_cut(tmp_path / "store"), 9)
    there = []
    real = os.fsync

    def fsync(handle: int) -> None:
        if os.fstat(handle).st_ino == adding.path.stat().st_ino:
            there.append(is_in_the_making(adding.path))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    adding.join()
    assert there[-1] is False


def test_opened_again_where_it_is_changed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a datastore and what lies beside it, which may be gone by then."""
    store = write_cut(tmp_path / "store")
    forget(store.path, [(3, 5)])
    seen = []

    def opened(*_: Any) -> tuple[Datastore, ...]:
        return (open_datastore(store.path),)

    def rest(stores: tuple[Datastore, ...], _: Any) -> Datastore:
        if not seen:
            compact(store.path)
        seen.append(stores[0].fingerprint)
        open_datastore(stores[0].blocks[0].path)
        return stores[0]

    monkeypatch.setattr(opening, "_open_stores", opened)
    monkeypatch.setattr(opening, "_opened_with", rest)
    found: Any = opening.open_memory(None, [])  # type: ignore[arg-type]
    assert found.fingerprint == seen[1] != seen[0]
    shutil.rmtree(found.blocks[0].path)
    with pytest.raises(DatastoreError):  # nobody changed it: it is damaged
        opening.open_memory(None, [])  # type: ignore[arg-type]


def test_a_flat_datastore_is_refused_as_ever(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", KEYS, VALUES, dtype="float16")
    plan = Plan(6, "float16", origin(), [0, 50, 100])
    with pytest.raises(DatastoreError, match="exists already"):
        Making(store.path, plan)


def test_an_empty_folder_is_as_good_as_none(tmp_path: Path) -> None:
    """As where a process was killed when it had made the folder, and before anything was in it."""
    (tmp_path / "store").mkdir()
    check_new_datastore("--dstore-mmap", tmp_path / "store", {}, goes_on=True)
    check_datastore_output("--dstore-mmap", tmp_path / "store")
    write_store(tmp_path / "store", KEYS, VALUES, dtype="float16")
    assert len(open_datastore(tmp_path / "store")) == 100
    with pytest.raises(DatastoreError, match="exists already"):
        check_new_datastore("--dstore-mmap", tmp_path / "store", {}, goes_on=True)


def test_another_process_was_faster(tmp_path: Path) -> None:
    """It published the datastore between the two looks at its place."""
    store = write_store(tmp_path / "store", KEYS, VALUES, dtype="float16")
    with pytest.raises(DatastoreError, match="exists already"):
        check_datastore_output("--dstore-mmap", store.path)


def test_an_index_is_read_again_where_it_is_replaced_meanwhile(tmp_path: Path) -> None:
    """Its pieces of before go at any moment."""
    index = tmp_path / "knn.index"
    index.write_text("before")

    def read() -> str:
        if (found := index.read_text()) == "before":
            index.write_text("after that")
            raise FileNotFoundError("piece-before.npy")
        return found

    assert _settled(index, read) == "after that"

    def missing() -> str:
        raise FileNotFoundError("piece-after.npy")

    with pytest.raises(FileNotFoundError):
        _settled(index, missing)
