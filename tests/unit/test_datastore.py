"""Opening a datastore: what is read is what was written, and damage is told."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from stores import (
    alter,
    assert_helps,
    lengthen,
    random_entries,
    truncate,
    write_compressed,
    write_store,
)

from fairseq_knnlm.datastore import (
    Compression,
    check_numbers,
    open_datastore,
    outline,
    reader,
)
from fairseq_knnlm.errors import DatastoreError


def test_keys_can_be_left_out(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", *random_entries(10, 4))
    (store.path / "keys.npy").unlink()
    assert open_datastore(store.path, load_keys=False).keys is None


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


def test_an_outline_reads_no_arrays(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", *random_entries(10, 4))
    for name in ("keys.npy", "values.npy"):
        (store.path / name).unlink()
    found = outline(store.path)
    assert (found.manifest, found.fingerprint) == (store.manifest, store.fingerprint)
    assert found.keys is None
    assert found.nbytes == 0


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
