"""The datastore on disk: written whole or not at all, and read as it was written."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import (
    alter,
    assert_helps,
    lengthen,
    origin,
    random_entries,
    truncate,
    write_compressed,
    write_store,
)

from fairseq_knnlm import files
from fairseq_knnlm.datastore import (
    FORMAT,
    VERSION,
    Compression,
    DatastoreWriter,
    check_numbers,
    datastore_bytes,
    open_datastore,
    outline,
    reader,
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


def test_keys_can_be_left_out(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", *random_entries(10, 4))
    (store.path / "keys.npy").unlink()
    assert open_datastore(store.path, load_keys=False).keys is None


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


@pytest.mark.parametrize(
    "name", ["keys.npy", "values.npy", "manifest.json", "projection.npy", "weights.npy"]
)
@pytest.mark.parametrize("spoil", [truncate, alter, lengthen, Path.unlink])
def test_damage_is_told(tmp_path: Path, name: str, spoil: Callable[[Path], None]) -> None:
    store = write_compressed(tmp_path / "store")
    file = store.path / name
    if (name, spoil) == ("manifest.json", lengthen):
        file.write_text(file.read_text() + "{")
    else:
        spoil(file)
    with pytest.raises(DatastoreError) as caught:
        open_datastore(store.path)
    assert_helps(caught, str(store.path))


def test_the_message_counts_the_bytes(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", *random_entries(100, 6))
    truncate(store.path / "keys.npy")
    with pytest.raises(DatastoreError) as caught:
        open_datastore(store.path)
    size = 128 + 100 * 6 * 4
    assert_helps(caught, f"expected: {size:,} bytes", f"found:    {size - 7:,} bytes")


def test_swapped_files_are_told(tmp_path: Path) -> None:
    """Keys of another datastore of the same shape."""
    keys, values = random_entries(100, 6)
    ours = write_store(tmp_path / "ours", keys, values)
    theirs = write_store(tmp_path / "theirs", keys + 1, values)
    shutil.copy(theirs.path / "keys.npy", ours.path / "keys.npy")
    with pytest.raises(DatastoreError, match=r"keys\.npy is damaged"):
        open_datastore(ours.path)


@pytest.mark.parametrize("name", ["projection.npy", "weights.npy"])
def test_arrays_of_another_shape_are_told(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a manifest and its files agree with each other, and not with the datastore."""
    monkeypatch.setattr(reader, "altered", lambda *_, **__: False)
    store = write_compressed(tmp_path / "store")
    array = np.load(store.path / name)
    np.save(store.path / name, array.reshape(-1, 2))
    with pytest.raises(DatastoreError, match=rf"{name} is damaged"):
        open_datastore(store.path)


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_compressed_datastore_as_it_was_written(tmp_path: Path, in_memory: bool) -> None:
    written = write_compressed(tmp_path / "store")
    store = open_datastore(written.path, load_keys=False, in_memory=in_memory, verify=True)
    assert store.projection is not None and store.weights is not None
    assert isinstance(store.weights, np.memmap) is not in_memory
    assert np.array_equal(store.projection, np.load(store.path / "projection.npy"))
    assert store.weights.tolist() == [1, 4] * 50
    assert (store.manifest.width, store.manifest.query_width) == (6, 9)
    assert store.manifest.merged
    (step,) = store.manifest.compressions
    assert step == Compression("d" * 64, rows=250, width=9, pca=6, merge=4, seed=1)
    assert step.describe() == "from 250 entries of width 9 by --merge 4 --pca 6 --seed 1"
    assert written.nbytes == 100 * (6 * 2 + 2 + 4) + 9 * 6 * 4
    assert store.nbytes == written.nbytes - 100 * 6 * 2


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


def test_verify_reads_what_opening_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fairseq_knnlm.files.integrity.CHUNK_BYTES", 16)
    store = write_store(tmp_path / "store", *random_entries(1000, 6))
    file = store.path / "keys.npy"
    content = bytearray(file.read_bytes())
    content[16 * 40] ^= 1  # chunk 40 of 1,508 is not in a sample of 32
    file.write_bytes(bytes(content))
    open_datastore(store.path)
    with pytest.raises(DatastoreError, match="checksums differ"):
        open_datastore(store.path, verify=True)


def test_a_newer_version_is_told(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", *random_entries(10, 4))
    manifest = json.loads((store.path / "manifest.json").read_text())
    manifest["version"] = VERSION + 1
    (store.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DatastoreError, match="newer fairseq-knnlm"):
        open_datastore(store.path)


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, Path.touch])
def test_no_datastore_there(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x")
    with pytest.raises(DatastoreError, match="no datastore at") as caught:
        open_datastore(tmp_path / "x")
    assert_helps(caught, "--save-knnlm-dstore")


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        ({"dictionary": "c" * 64}, "another dictionary"),
        ({"key_type": "decoder_output"}, "--knn-keytype last_ffn_input"),
        ({"width": 5}, "another key width"),
        ({"model": "c" * 64}, "another checkpoint"),
    ],
)
def test_a_foreign_model_is_refused(tmp_path: Path, theirs: dict[str, object], says: str) -> None:
    store = write_store(tmp_path / "store", *random_entries(10, 4))
    ours = {"dictionary": "b" * 64, "key_type": "last_ffn_input", "width": 4, "model": "a" * 64}
    store.check_origin(**ours)
    with pytest.raises(DatastoreError) as caught:
        store.check_origin(**{**ours, **theirs})
    assert_helps(caught, says)


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


def reseal(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Another manifest, whose seal is right."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    version = manifest.pop("version")
    fields = {key: manifest[key] for key in manifest if key not in ("format", "fingerprint")}
    files.write_sealed(path / "manifest.json", FORMAT, version, fields)


def put(value: object, *where: str | int) -> Callable[[dict[str, Any]], object]:
    def change(manifest: dict[str, Any]) -> None:
        at: Any = manifest
        for key in where[:-1]:
            at = at[key]
        at[where[-1]] = value

    return change


def drop(*where: str | int) -> Callable[[dict[str, Any]], object]:
    def change(manifest: dict[str, Any]) -> None:
        at: Any = manifest
        for key in where[:-1]:
            at = at[key]
        del at[where[-1]]

    return change


FIELDS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no rows": (drop("rows"), "`rows`"),
    "rows 0": (put(0, "rows"), "$.rows"),
    "rows below 0": (put(-100, "rows"), "$.rows"),
    "rows 10^18": (put(10**18, "rows"), "$.rows"),
    "rows 10^400": (put(10**400, "rows"), "$.rows"),
    "rows 10^12 in small files": (put(10**12, "rows"), "$.files"),
    "rows a float": (put(100.0, "rows"), "$.rows"),
    "rows a text": (put("100", "rows"), "$.rows"),
    "rows a bool": (put(True, "rows"), "$.rows"),
    "a thousand rows more": (put(1100, "rows"), "$.files"),
    "width 0": (put(0, "width"), "$.width"),
    "width 10^9": (put(10**9, "width"), "$.width"),
    "another width": (put(5, "width"), "$.width"),
    "keys of integers": (put("int8", "key_dtype"), "$.key_dtype"),
    "keys of objects": (put("object", "key_dtype"), "$.key_dtype"),
    "keys of twice the bytes": (put("float32", "key_dtype"), "$.files"),
    "keys that there are not": (put(None, "key_dtype"), "keys.npy"),
    "values of floats": (put("float32", "value_dtype"), "$.value_dtype"),
    "values too small for the vocabulary": (put(10**6, "origin", "vocabulary"), "$.value_dtype"),
    "vocabulary 0": (put(0, "origin", "vocabulary"), "$.origin.vocabulary"),
    "no origin": (drop("origin"), "`origin`"),
    "origin a list": (put([], "origin"), "$.origin"),
    "model no fingerprint": (put("abc", "origin", "model"), "$.origin.model"),
    "split a number": (put(3, "origin", "split"), "$.origin.split"),
    "context deeper": (put({"x": {}}, "origin", "context"), "$.origin.context"),
    "unknown field": (put(1, "colour"), "colour"),
    "unknown field of the origin": (put(1, "origin", "colour"), "colour"),
    "files a list": (put([], "files"), "$.files"),
    "no values": (drop("files", "values.npy"), "values.npy"),
    "no weights": (drop("files", "weights.npy"), "weights.npy"),
    "no projection": (drop("files", "projection.npy"), "projection.npy"),
    "a file of another folder": (put({"bytes": 1, "chunks": []}, "files", "../x"), "../x"),
    "bytes below 0": (put(-1, "files", "keys.npy", "bytes"), "$.files"),
    "bytes 10^18": (put(10**18, "files", "keys.npy", "bytes"), "keys.npy.bytes"),
    "chunks of nothing": (put([], "files", "keys.npy", "chunks"), "keys.npy.chunks"),
    "chunks are numbers": (put([1], "files", "keys.npy", "chunks"), "chunks"),
    "chunks of four digits": (put(["abcd"], "files", "keys.npy", "chunks"), "chunks"),
    "compressions a text": (put("x", "compressions"), "$.compressions"),
    "uncompressed with weights": (put([], "compressions"), "$.files"),
    "pca above the width": (put(10, "compressions", 0, "pca"), "$.compressions[0]"),
    "pca of another width": (put(5, "compressions", 0, "pca"), "$.width"),
    "merge 0": (put(0, "compressions", 0, "merge"), "merge"),
    "rows merged from none": (put(0, "compressions", 0, "rows"), "compressions[0].rows"),
    "merged from no datastore": (put("", "compressions", 0, "datastore"), "datastore"),
}


@pytest.mark.parametrize("case", list(FIELDS))
def test_fields_of_the_manifest(tmp_path: Path, case: str) -> None:
    """Although the seal is right."""
    path = write_compressed(tmp_path / "store").path
    reseal(path, lambda _: None)
    open_datastore(path)
    change, says = FIELDS[case]
    reseal(path, change)
    with pytest.raises(DatastoreError) as caught:
        open_datastore(path)
    assert_helps(caught, str(path / "manifest.json"), says)


def test_one_row_less_than_the_arrays_have(tmp_path: Path) -> None:
    path = write_compressed(tmp_path / "store").path
    reseal(path, put(99, "rows"))
    with pytest.raises(DatastoreError) as caught:
        open_datastore(path)
    assert_helps(caught, "keys.npy", "(99, 6)", "(100, 6)")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 200_000, "brackets"),
        ('{"rows": NaN}', "NaN"),
        ('{"rows": -Infinity}', "Infinity"),
        ("", "no JSON"),
        ("\udcff", "UTF-8"),
        ("3", "another kind"),
        ('{"format": "fairseq-knnlm datastore", "version": "1"}', "version"),
        ('{"format": "fairseq-knnlm datastore", "version": 1}', "altered"),
        ('{"format": "fairseq-knnlm index", "version": 1}', "another kind"),
    ],
)
def test_what_is_no_manifest(tmp_path: Path, text: str, says: str) -> None:
    path = write_store(tmp_path / "store", *random_entries(10, 4)).path
    (path / "manifest.json").write_text(text, errors="surrogateescape")
    with pytest.raises(DatastoreError) as caught:
        open_datastore(path)
    assert_helps(caught, says)


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def a_device(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def a_dangling_link(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.with_name("nowhere"))


@pytest.mark.parametrize("name", ["keys.npy", "values.npy", "manifest.json", "weights.npy"])
@pytest.mark.parametrize("spoil", [a_folder, a_pipe, a_device, a_dangling_link])
def test_what_is_no_file_is_not_waited_for(
    tmp_path: Path, name: str, spoil: Callable[[Path], None]
) -> None:
    store = write_compressed(tmp_path / "store")
    spoil(store.path / name)
    with pytest.raises(DatastoreError) as caught:
        open_datastore(store.path)
    assert_helps(caught, str(store.path))


@pytest.mark.parametrize("place", [0, 6, 8, 20, 40, 60, 127])
def test_a_header_that_was_sealed_damaged(tmp_path: Path, place: int) -> None:
    """The checksums are of the damaged file: NumPy's dozen exceptions become one message."""
    path = write_store(tmp_path / "store", *random_entries(100, 4)).path
    content = bytearray((path / "keys.npy").read_bytes())
    content[place] ^= 0x55
    (path / "keys.npy").write_bytes(bytes(content))
    reseal(path, put(files.checksums(path / "keys.npy"), "files", "keys.npy", "chunks"))
    try:
        store = open_datastore(path)
    except DatastoreError as error:
        assert "keys.npy is damaged" in str(error)
    else:  # a byte that says nothing
        assert store.keys is not None
        assert store.keys.shape == (100, 4)


def test_an_outline_reads_no_arrays(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", *random_entries(10, 4))
    for name in ("keys.npy", "values.npy"):
        (store.path / name).unlink()
    found = outline(store.path)
    assert (found.manifest, found.fingerprint) == (store.manifest, store.fingerprint)
    assert found.keys is None
    assert found.nbytes == 0


def test_a_datastore_of_nothing_is_not_begun(tmp_path: Path) -> None:
    with pytest.raises(DatastoreError) as caught:
        DatastoreWriter(tmp_path / "store", 0, 4, origin())
    assert_helps(caught, "empty split")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rows", [1, 10, 1000])
def test_numbers_that_no_datastore_holds(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of fault once, with its first row and how many there are, also across chunks."""
    monkeypatch.setattr(reader, "CHECKED_ROWS", rows)
    keys, values = random_entries(100, 4)
    check = check_numbers
    assert not list(check("keys.npy", keys, 50, empty_keys=False))
    assert not list(check("values.npy", values, 50))
    assert not list(check("weights.npy", np.ones(100, np.int32), 50))
    keys[[17, 40, 99], 2] = np.nan, np.inf, -np.inf
    keys[[60, 61]] = 0
    assert list(check("keys.npy", keys, 50)) == [
        "NaN or infinity in 3 of 100 rows, first in row 17"
    ]
    assert [text.split()[-1] for text in check("keys.npy", keys, 50, empty_keys=False)] == [
        *("17", "60")
    ]
    values[[3, 77]] = 50, -1
    assert list(check("values.npy", values, 50)) == [
        "a number that is no token id below 50 in 2 of 100 rows, first in row 3"
    ]
    (said,) = check("weights.npy", np.array([1, 1, 0], np.int32), 50)
    assert said == "a weight below 1 in 1 of 3 rows, first in row 2"
    (said,) = check("projection.npy", np.array([[1, np.nan]], np.float32), 50)
    assert "first in row 0" in said


@pytest.mark.parametrize(
    "module",
    ["fairseq_knnlm.datastore", "fairseq_knnlm.datastore.legacy", "fairseq_knnlm.files.arrays"],
)
def test_a_datastore_can_be_read_where_there_is_nothing_heavy(module: str) -> None:
    """Reading one needs NumPy; torch, fairseq and FAISS take seconds to load, or are not there."""
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "numpy" in loaded
    assert not loaded & {"torch", "fairseq", "fairseq_cli", "faiss", "omegaconf", "hydra"}
