"""More text for a datastore: what was there stays as it was, and all is found as in one."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from conftest import Lab

from fairseq_knnlm.cli import main
from fairseq_knnlm.datastore import Datastore, making, open_datastore, read_documents
from fairseq_knnlm.datastore.making import is_in_the_making
from fairseq_knnlm.errors import ConfigError, DatastoreError
from fairseq_knnlm.retrieval.opening import open_retriever
from fairseq_knnlm.runs.changing import compact_store, forget_parts

SAVE = ["--save-knnlm-dstore", "--dstore-mmap"]
ADD = ["--append-dstore", *SAVE]
BLOCKS = ["--block-rows", 64]


@pytest.fixture(scope="module", params=["one block", "blocks"])
def base(request: pytest.FixtureRequest, lab: Lab) -> Path:
    """Of the valid split, with an index of inverted lists."""
    path = lab.folder / f"base of {request.param}"
    lab.evaluate("valid", *SAVE, path, *(BLOCKS if request.param == "blocks" else []))
    flags = ["--dstore", str(path), "--recipe", "PCAR8,IVF4,PQ4x4fsr", "--probe", "2"]
    assert main(["build-index", *flags]) == 0
    return path


@pytest.fixture
def living(base: Path, tmp_path: Path) -> Path:
    shutil.copytree(base, tmp_path / "store")
    return tmp_path / "store"


def every_byte(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def check_answers(store: Datastore) -> None:
    """Its index answers as FAISS's own does that is trained the same and given all keys."""
    index = faiss.read_index(str(store.index_path))
    index.reset()
    index.add(np.asarray(store.keys, np.float32))
    faiss.extract_index_ivf(index).nprobe = 2
    queries = np.asarray(store.full_keys()[::7], np.float32)
    distances, ids = index.search(queries, 20)
    found = open_retriever(store, 20, similarity="do_not_recomp_l2").index
    ours, rows = found.search(torch.from_numpy(queries), 20)
    assert np.array_equal(ours.numpy(), distances)
    assert np.array_equal(rows.numpy(), ids)


def test_a_text_is_added_and_found(lab: Lab, living: Path, tmp_path: Path) -> None:
    before = open_datastore(living)
    old_keys, old_values = np.array(before.keys), np.array(before.values)
    lab.evaluate("test", *ADD, living)
    store = open_datastore(living, verify=True)
    lab.evaluate("test", *SAVE, tmp_path / "alone")
    alone = open_datastore(tmp_path / "alone")
    assert np.array_equal(store.values, np.concatenate([old_values, alone.values]))
    assert np.array_equal(np.array(store.keys), np.concatenate([old_keys, np.array(alone.keys)]))
    assert store.breaks.tolist() == [0, len(before)]
    assert store.manifest.before[-1] != store.fingerprint
    assert before.fingerprint in store.manifest.before
    check_answers(store)
    documents = read_documents(store)
    assert documents is not None and documents.starts.tolist() == [0, len(before)]
    assert not is_in_the_making(living)
    assert not list(living.rglob(".*"))


def test_what_was_there_is_not_touched(lab: Lab, living: Path) -> None:
    before = {
        file.stat().st_ino: file.read_bytes()
        for file in living.rglob("*")
        if file.name in ("keys.npy", "values.npy")
    }
    lab.evaluate("test", *ADD, living)
    after = {file.stat().st_ino: file.read_bytes() for file in living.rglob("*.npy")}
    assert all(after[inode] == content for inode, content in before.items())


def test_more_shards_than_blocks_change_nothing(lab: Lab, living: Path) -> None:
    before = every_byte(living)
    with pytest.raises(ConfigError, match="more shards than blocks"):
        lab.evaluate("test", *ADD, living, *BLOCKS, "--num-shards", 99)
    assert every_byte(living) == before


def test_in_shares_and_stopped_on_the_way(lab: Lab, living: Path, tmp_path: Path) -> None:
    """Readers see the datastore as it was until all is there; then the same as of one process."""
    whole = tmp_path / "whole"
    shutil.copytree(living, whole)
    lab.evaluate("test", *ADD, whole, *BLOCKS)
    rows = len(open_datastore(living))
    for number in (1, 2, 0):
        assert len(open_datastore(living)) == rows
        lab.evaluate("test", *ADD, living, *BLOCKS, "--num-shards", 3, "--shard-id", number)
    assert open_datastore(living).fingerprint == open_datastore(whole).fingerprint
    theirs = {name.replace(str(whole), str(living)): x for name, x in every_byte(whole).items()}
    assert every_byte(living) == theirs


def test_forgotten_and_compacted_while_a_text_is_added(lab: Lab, living: Path) -> None:
    rows = len(open_datastore(living))
    lab.evaluate("test", *ADD, living, *BLOCKS, "--num-shards", 2, "--shard-id", 0)
    forget_parts(living, [], [(10, 30)])
    compact_store(living)
    assert len(open_datastore(living)) == rows - 20
    lab.evaluate("test", *ADD, living, *BLOCKS, "--num-shards", 2, "--shard-id", 1)
    store = open_datastore(living, verify=True)
    assert store.breaks.tolist() == [0, 10, rows - 20]
    check_answers(store)


def test_twice(lab: Lab, living: Path) -> None:
    rows = len(open_datastore(living))
    for _ in range(2):
        lab.evaluate("test", *ADD, living)
    store = open_datastore(living)
    added = (len(store) - rows) // 2
    assert np.array_equal(store.values[rows : rows + added], store.values[rows + added :])
    assert store.breaks.tolist() == [0, rows, rows + added]
    check_answers(store)


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("then", ["test", "valid"])
def test_killed_when_it_was_added(
    lab: Lab, living: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    """Run again, it finds the text there; another text is added as ever."""

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(making, "_end", die)
        lab.evaluate("test", *ADD, living)
    assert is_in_the_making(living)
    there = open_datastore(living)
    with suppress(SystemExit):  # where there is nothing to read
        lab.evaluate(then, *ADD, living)
    store = open_datastore(living, verify=True)
    assert (store.fingerprint == there.fingerprint) == (then == "test")
    assert np.array_equal(store.values[: len(there)], there.values)
    assert not is_in_the_making(living)
    check_answers(store)


def test_the_command_reads_as_the_datastore_was_read(
    lab: Lab, living: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["append", str(living), str(lab.data), "--path", str(lab.checkpoint())]
    assert main([*words, "--gen-subset", "test", "--cpu"]) == 0
    store = open_datastore(living)
    first, last = (open_datastore(store.blocks[n].path).manifest.origin for n in (0, -1))
    assert last.context == first.context
    assert (first.split, last.split) == ("valid", "test")
    assert f"{len(store):,} in all" in capsys.readouterr().err


def test_without_keys(lab: Lab, tmp_path: Path) -> None:
    """What is added goes into the index, too; of many blocks or of one."""
    recipe = ["--no-save-keys", "--recipe", "IVF4,Flat", "--probe", 4]
    for number, blocks in enumerate(([], BLOCKS)):
        path = tmp_path / f"store-{number}"
        lab.evaluate("valid", *SAVE, path, *recipe, *blocks)
        lab.evaluate("test", *ADD, path, *blocks)
        store = open_datastore(path)
        assert store.keys is None
        lab.evaluate("test", *SAVE, tmp_path / f"keys-{number}", "--dstore-fp32", *blocks)
        queries = open_datastore(tmp_path / f"keys-{number}")
        asked = torch.from_numpy(np.array(queries.keys))
        near = open_retriever(store, 1).search(asked, 1)
        expected = np.arange(len(store) - len(queries), len(store))
        assert (near.ids[:, 0].numpy() == expected).mean() > 0.95  # others have the same context
        assert float(near.distances.max()) < 1e-3


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--dstore-fp32"], "leave --dstore-fp32 out"),
        (["--no-save-keys"], "leave --no-save-keys out"),
        (["--knn-keytype", "decoder_output"], "another key type"),
    ],
)
def test_other_keys_are_refused(lab: Lab, living: Path, flags: list[object], says: str) -> None:
    before = every_byte(living)
    with pytest.raises(DatastoreError, match=says):
        lab.evaluate("test", *ADD, living, *flags)
    assert every_byte(living) == before


def test_another_model_is_refused(lab: Lab, living: Path) -> None:
    before = every_byte(living)
    with pytest.raises(DatastoreError, match="another checkpoint"):
        lab.evaluate("test", *ADD, living, model="prenorm")
    assert every_byte(living) == before


def test_where_nothing_is(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(DatastoreError, match="no datastore at"):
        lab.evaluate("test", *ADD, tmp_path / "nothing")
    assert not list(tmp_path.iterdir())


def test_another_text_while_one_is_being_added(lab: Lab, living: Path) -> None:
    lab.evaluate("test", *ADD, living, *BLOCKS, "--num-shards", 2, "--shard-id", 0)
    with pytest.raises(DatastoreError, match=r"origin\.split"):
        lab.evaluate("valid", *ADD, living, *BLOCKS)
