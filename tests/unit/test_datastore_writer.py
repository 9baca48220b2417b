"""Writing a datastore: every row once, published whole or not at all."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from stores import (
    assert_helps,
    origin,
    random_entries,
    write_compressed,
    write_store,
)

from fairseq_knnlm.datastore import (
    DatastoreWriter,
    datastore_bytes,
    open_datastore,
    value_dtype,
)
from fairseq_knnlm.errors import DatastoreError


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("in_memory", [False, True])
def test_round_trip_in_any_order(tmp_path: Path, dtype: str, in_memory: bool) -> None:
    keys, values = random_entries(100, 6)
    writer = DatastoreWriter(tmp_path / "store", 100, 6, origin(), dtype)
    for rows in np.array_split(np.random.default_rng(0).permutation(100), 7):
        writer.write(rows, keys[rows], values[rows])
    assert writer.publish() == tmp_path / "store"

    store = open_datastore(tmp_path / "store", in_memory=in_memory, verify=True)
    assert store.keys is not None
    assert isinstance(store.keys, np.memmap) is not in_memory
    assert store.keys.dtype == dtype
    assert np.array_equal(store.keys, keys.astype(dtype))
    assert np.array_equal(store.values, values)
    assert len(store) == 100
    assert (store.manifest.rows, store.manifest.width) == (100, 6)
    assert store.manifest.origin == origin()
    assert open_datastore(tmp_path / "store").fingerprint == store.fingerprint
    assert [file.name for file in tmp_path.iterdir()] == ["store"]


def test_numpy_opens_keys_and_values(tmp_path: Path) -> None:
    keys, values = random_entries(10, 4)
    write_store(tmp_path / "store", keys, values)
    assert {file.name for file in (tmp_path / "store").iterdir()} == {
        *("manifest.json", "keys.npy", "values.npy")
    }
    assert np.array_equal(np.load(tmp_path / "store/keys.npy", allow_pickle=False), keys)
    assert np.array_equal(np.load(tmp_path / "store/values.npy", allow_pickle=False), values)


@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [
        (100, "uint16"),
        (65_536, "uint16"),
        (65_537, "int32"),
        (300_000, "int32"),
        (2**31, "int32"),
        (2**31 + 1, "int64"),
    ],
)
def test_values_have_a_type_that_holds_the_vocabulary(
    tmp_path: Path, vocabulary: int, dtype: str
) -> None:
    assert value_dtype(vocabulary) == dtype
    values = np.array([0, vocabulary // 2, vocabulary - 1])
    store = write_store(tmp_path / "store", np.ones((3, 2), np.float32), values, vocabulary)
    assert store.values.dtype == dtype
    assert store.values.tolist() == values.tolist()


def test_two_datastores_differ_in_their_fingerprints(tmp_path: Path) -> None:
    keys, values = random_entries(10, 4)
    first = write_store(tmp_path / "a", keys, values)
    same = write_store(tmp_path / "b", keys, values)
    keys[7, 2] += 1
    other_key = write_store(tmp_path / "c", keys, values)
    keys[7, 2] -= 1
    values[3] = (values[3] + 1) % 50
    other_value = write_store(tmp_path / "d", keys, values)
    assert first.fingerprint == same.fingerprint
    assert len({store.fingerprint for store in (first, other_key, other_value)}) == 3


def failed_write(path: Path, fail: Callable[[DatastoreWriter], object]) -> str:
    """The message of a writer that must fail, which is gone when this returns."""
    writer = DatastoreWriter(path, 10, 4, origin())
    keys, values = random_entries(10, 4)
    with pytest.raises(DatastoreError) as caught:
        writer.write(np.arange(8), keys[:8], values[:8])
        fail(writer)
    assert_helps(caught)
    return str(caught.value)


def attempt(*rows: int) -> Callable[[DatastoreWriter], object]:
    return lambda writer: writer.write(
        np.array(rows), np.ones((len(rows), 4), np.float32), np.ones(len(rows), np.int64)
    )


@pytest.mark.parametrize(
    ("fail", "says"),
    [
        (DatastoreWriter.publish, "2 tokens missing"),
        (attempt(8, 7), "twice"),
        (attempt(8, 10), "beyond the end"),
        (attempt(-1), "beyond the end"),
    ],
)
def test_every_row_once_or_nothing(
    tmp_path: Path, fail: Callable[[DatastoreWriter], object], says: str
) -> None:
    assert says in failed_write(tmp_path / "store", fail)
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_no_half_store_after_an_exception(tmp_path: Path) -> None:
    def interrupted() -> None:
        keys, values = random_entries(10, 4)
        writer = DatastoreWriter(tmp_path / "store", 10, 4, origin())
        writer.write(np.arange(5), keys[:5], values[:5])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        interrupted()
    assert not (tmp_path / "store").exists()
    del caught
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_an_unfinished_store_does_not_open(tmp_path: Path) -> None:
    """What a killed process leaves behind has no manifest."""
    writer = DatastoreWriter(tmp_path / "store", 10, 4, origin())
    (partial,) = tmp_path.glob(".store.partial-*")
    assert partial.name.startswith(".store.partial-")
    with pytest.raises(DatastoreError, match="no datastore"):
        open_datastore(partial)
    del writer


@pytest.mark.parametrize("bad", [70_000.0, -70_000.0, np.inf, np.nan])
def test_keys_that_float16_cannot_hold(tmp_path: Path, bad: float) -> None:
    writer = DatastoreWriter(tmp_path / "store", 1, 2, origin())
    with pytest.raises(DatastoreError, match="does not fit") as caught:
        writer.write(np.array([0]), np.array([[1, bad]], np.float32), np.array([1]))
    assert_helps(caught, "--dstore-fp32")
    writer.write(np.array([0]), np.array([[1, 65_504]], np.float32), np.array([1]))
    assert open_datastore(writer.publish()).values.tolist() == [1]


def test_float32_holds_what_float16_cannot(tmp_path: Path) -> None:
    keys = np.array([[70_000.0, 1e30]], np.float32)
    store = write_store(tmp_path / "store", keys, np.array([1]))
    assert np.array_equal(np.load(store.path / "keys.npy"), keys)


@pytest.mark.parametrize("what", ["datastore", "folder", "file"])
def test_nothing_is_written_over(tmp_path: Path, what: str) -> None:
    path = tmp_path / "store"
    if what == "datastore":
        write_store(path, *random_entries(10, 4))
    elif what == "folder":
        path.mkdir()
        (path / "thesis.tex").touch()
    else:
        path.write_text("mine")
    with pytest.raises(DatastoreError, match="exists already") as caught:
        DatastoreWriter(path, 10, 4, origin())
    assert_helps(caught, "choose another path")
    assert list(tmp_path.iterdir()) == [path]


def test_somebody_was_faster(tmp_path: Path) -> None:
    keys, values = random_entries(10, 4)
    writer = DatastoreWriter(tmp_path / "store", 10, 4, origin())
    writer.write(np.arange(10), keys, values)
    first = write_store(tmp_path / "store", keys + 1, values)
    with pytest.raises(DatastoreError, match="exists already"):
        writer.publish()
    assert open_datastore(tmp_path / "store").fingerprint == first.fingerprint


def test_a_disk_too_small_is_seen_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 float16 keys of width 8 and uint16 values: 18,000 bytes."""
    assert datastore_bytes(1000, 8, "float16", 50) == 18_000
    free = [17_999]
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 0, free[0]))
    with pytest.raises(DatastoreError, match="cannot hold") as caught:
        DatastoreWriter(tmp_path / "store", 1000, 8, origin())
    assert_helps(caught, "17.6 KiB free")
    assert not list(tmp_path.iterdir())
    free[0] = 18_000
    DatastoreWriter(tmp_path / "store", 1000, 8, origin())
    with pytest.raises(DatastoreError, match="cannot hold") as caught:
        DatastoreWriter(
            tmp_path / "other", 1000, 8, origin(), weights=np.ones(1000, np.int32)
        )  # 4,000 bytes more
    assert_helps(caught, "21.5 KiB free")


def test_a_datastore_is_of_the_oldest_version_that_can_say_it(tmp_path: Path) -> None:
    """Those that were not compressed are what they were before there was compression."""
    keys, values = random_entries(10, 4)
    plain = write_store(tmp_path / "plain", keys, values)
    writer = DatastoreWriter(tmp_path / "keyless", 10, 4, origin(), None)
    writer.write(np.arange(10), keys, values)
    keyless, compressed = open_datastore(writer.publish()), write_compressed(tmp_path / "small")
    manifests = [
        json.loads((store.path / "manifest.json").read_text())
        for store in (plain, keyless, compressed)
    ]
    assert [manifest["version"] for manifest in manifests] == [1, 2, 3]
    fields = {"format", "version", "fingerprint", "rows", "width", "key_dtype", "value_dtype"}
    fields |= {"origin", "files"}
    assert [set(manifest) - fields for manifest in manifests] == [set(), set(), {"compressions"}]
    assert not plain.manifest.merged
    assert plain.manifest.query_width == 4


def test_a_row_twice_in_one_batch_is_refused(tmp_path: Path) -> None:
    """Rows 0, 1, 1 for two rows: the count is full, one entry was overwritten."""
    writer = DatastoreWriter(tmp_path / "store", 2, 4, origin())
    with pytest.raises(DatastoreError, match="twice"):
        writer.write(np.array([0, 1, 1]), np.ones((3, 4), np.float32), np.array([1, 2, 3]))


@pytest.mark.parametrize("value", [-1, 50, 70_000])
def test_token_ids_outside_the_vocabulary_are_refused(tmp_path: Path, value: int) -> None:
    """As uint16 they would turn into other tokens: 70,000 into 4,464, -1 into 65,535."""
    writer = DatastoreWriter(tmp_path / "store", 1, 4, origin(50))
    with pytest.raises(DatastoreError) as caught:
        writer.write(np.array([0]), np.ones((1, 4), np.float32), np.array([value]))
    assert_helps(caught, "0 to 49")


def test_a_datastore_of_nothing_is_not_begun(tmp_path: Path) -> None:
    with pytest.raises(DatastoreError) as caught:
        DatastoreWriter(tmp_path / "store", 0, 4, origin())
    assert_helps(caught, "empty split")
    assert not list(tmp_path.iterdir())
