"""Files exactly as urvashik/knnlm writes them: np.memmap without a header."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from stores import alter, assert_helps, lengthen, random_entries, truncate

from fairseq_knnlm.datastore import Datastore, open_datastore
from fairseq_knnlm.datastore import legacy as module
from fairseq_knnlm.datastore.legacy import convert, is_legacy, keys_file, open_legacy, values_file
from fairseq_knnlm.errors import DatastoreError

ROWS, WIDTH = 60, 6


def write_legacy(
    prefix: Path, keys: np.ndarray, values: np.ndarray, *, fp16: bool, size: int | None = None
) -> Path:
    """As eval_lm.py of urvashik/knnlm does; ``size`` is its --dstore-size."""
    size = len(keys) if size is None else size
    key_type, value_type = (np.float16, np.int16) if fp16 else (np.float32, np.int64)
    dstore_keys = np.memmap(
        f"{prefix}_keys.npy", dtype=key_type, mode="w+", shape=(size, keys.shape[1])
    )
    dstore_vals = np.memmap(f"{prefix}_vals.npy", dtype=value_type, mode="w+", shape=(size, 1))
    dstore_keys[: len(keys)] = keys.astype(key_type)
    dstore_vals[: len(keys)] = values.reshape(-1, 1).astype(value_type)
    dstore_keys.flush()
    dstore_vals.flush()
    return prefix


@pytest.fixture(params=[False, True], ids=["fp32", "fp16"])
def fp16(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def prefix(tmp_path: Path, fp16: bool) -> Path:
    return write_legacy(tmp_path / "old", *random_entries(ROWS, WIDTH), fp16=fp16)


def refused(prefix: Path, rows: int | None, *, fp16: bool, vocabulary: int | None = 50) -> str:
    with pytest.raises(DatastoreError) as caught:
        open_legacy(prefix, rows, fp16=fp16, vocabulary=vocabulary)
    assert_helps(caught)
    return str(caught.value)


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("vocabulary", [50, None])
def test_reads_what_was_written(
    prefix: Path, fp16: bool, in_memory: bool, vocabulary: int | None
) -> None:
    keys, values = random_entries(ROWS, WIDTH)
    store = open_legacy(prefix, ROWS, fp16=fp16, vocabulary=vocabulary, in_memory=in_memory)
    assert is_legacy(prefix)
    assert len(store) == ROWS
    assert store.keys is not None
    assert isinstance(store.keys, np.memmap) is not in_memory
    assert store.keys.dtype == ("float16" if fp16 else "float32")
    assert np.array_equal(store.keys, keys.astype(store.keys.dtype))
    assert np.array_equal(store.values, values)
    assert store.manifest.width == WIDTH
    assert store.manifest.origin.key_type == "last_ffn_input"
    assert store.index_path.name == "old_knn.index"
    assert store.calibration_path.name == "old_calibration.json"


def test_keys_can_be_left_out(prefix: Path, fp16: bool) -> None:
    assert open_legacy(prefix, ROWS, fp16=fp16, vocabulary=50, load_keys=False).keys is None


def test_is_legacy_needs_both_files(prefix: Path) -> None:
    values_file(prefix).unlink()
    assert not is_legacy(prefix)
    assert not is_legacy(prefix.with_name("nothing"))


def test_the_size_must_be_given(prefix: Path, fp16: bool) -> None:
    message = refused(prefix, None, fp16=fp16)
    assert "--dstore-size" in message
    assert "fairseq-knnlm import" in message


@pytest.mark.parametrize("rows", [ROWS - 1, ROWS + 1, 2 * ROWS, ROWS // 2, 1, 0, -3])
def test_a_wrong_size_is_refused(prefix: Path, fp16: bool, rows: int) -> None:
    """Also one that divides the length of the keys."""
    assert "--dstore-size" in refused(prefix, rows, fp16=fp16)


def test_the_wrong_type_is_refused(prefix: Path, fp16: bool) -> None:
    assert "--dstore-fp16" in refused(prefix, ROWS, fp16=not fp16)


@pytest.mark.parametrize("file", [keys_file, values_file])
@pytest.mark.parametrize("spoil", [truncate, lengthen])
def test_a_wrong_length_is_refused(
    prefix: Path, fp16: bool, file: Callable[[Path], Path], spoil: Callable[[Path], None]
) -> None:
    spoil(file(prefix))
    assert file(prefix).name in refused(prefix, ROWS, fp16=fp16)


@pytest.mark.parametrize(("vocabulary", "fits"), [(32_768, True), (32_769, False), (40_000, False)])
def test_int16_ends_at_32767(tmp_path: Path, vocabulary: int, fits: bool) -> None:
    """An id above it became negative when it was written; a smaller vocabulary is safe."""
    keys, values = random_entries(ROWS, WIDTH)
    prefix = write_legacy(tmp_path / "old", keys, values, fp16=True)
    if fits:
        open_legacy(prefix, ROWS, fp16=True, vocabulary=vocabulary)
    else:
        assert "overflow" in refused(prefix, ROWS, fp16=True, vocabulary=vocabulary)


def test_int64_holds_any_vocabulary(tmp_path: Path) -> None:
    keys, values = random_entries(ROWS, WIDTH)
    values[5] = 267_742
    prefix = write_legacy(tmp_path / "old", keys, values, fp16=False)
    store = open_legacy(prefix, ROWS, fp16=False, vocabulary=267_744)
    assert store.values[5] == 267_742


def test_overflowed_ids_are_refused(tmp_path: Path) -> None:
    """Id 40,000 as int16 is -25,536; the vocabulary need not be known to see that."""
    keys, values = random_entries(ROWS, WIDTH)
    values[5] = 40_000
    prefix = write_legacy(tmp_path / "old", keys, values, fp16=True)
    for vocabulary in (None, 50):
        assert "-25,536" in refused(prefix, ROWS, fp16=True, vocabulary=vocabulary)


def test_ids_outside_the_vocabulary_are_refused(prefix: Path, fp16: bool) -> None:
    assert "0 to 29" in refused(prefix, ROWS, fp16=fp16, vocabulary=30)


@pytest.mark.parametrize("unfilled", [1, 20])
def test_rows_that_were_never_filled_are_refused(tmp_path: Path, fp16: bool, unfilled: int) -> None:
    """--dstore-size was larger than the text: the files are full length, the end is zeros."""
    size = ROWS + unfilled
    entries = random_entries(ROWS, WIDTH)
    prefix = write_legacy(tmp_path / "old", *entries, fp16=fp16, size=size)
    assert "never filled" in refused(prefix, size, fp16=fp16)


def opened(prefix: Path, fp16: bool) -> Datastore:
    return open_legacy(prefix, ROWS, fp16=fp16, vocabulary=50)


@pytest.mark.parametrize("file", [keys_file, values_file])
def test_the_fingerprint_follows_the_content(
    prefix: Path, fp16: bool, file: Callable[[Path], Path]
) -> None:
    before = opened(prefix, fp16).fingerprint
    assert opened(prefix, fp16).fingerprint == before
    alter(file(prefix))
    assert opened(prefix, fp16).fingerprint != before


@pytest.mark.parametrize("chunk", [7, 60, 1000])
def test_convert_keeps_every_entry(tmp_path: Path, prefix: Path, fp16: bool, chunk: int) -> None:
    old = opened(prefix, fp16)
    new = open_datastore(convert(old, tmp_path / "new", chunk=chunk), verify=True)
    assert old.keys is not None
    assert new.keys is not None
    assert new.keys.dtype == old.keys.dtype
    assert np.array_equal(new.keys, old.keys)
    assert new.values.dtype == "uint16"
    assert np.array_equal(new.values, old.values)
    assert new.manifest.origin.vocabulary == 50


def test_convert_writes_over_nothing(tmp_path: Path, prefix: Path, fp16: bool) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "thesis.tex").touch()
    with pytest.raises(DatastoreError, match="exists already"):
        convert(opened(prefix, fp16), tmp_path / "new")


@pytest.mark.parametrize("row", [0, ROWS // 2, ROWS - 1])
@pytest.mark.parametrize(("value", "says"), [(0, "never filled"), (np.nan, "NaN"), (np.inf, "NaN")])
def test_holes_and_what_is_no_number(
    tmp_path: Path, fp16: bool, row: int, value: float, says: str
) -> None:
    """Of a small datastore the sample is the whole."""
    keys, values = random_entries(ROWS, WIDTH)
    keys[row] = value
    prefix = write_legacy(tmp_path / "old", keys, values, fp16=fp16)
    said = refused(prefix, ROWS, fp16=fp16)
    assert says in said
    assert f"row {row}" in said


def refuse_to_convert(store: Datastore, out: Path, *says: str) -> None:
    with pytest.raises(DatastoreError) as caught:
        convert(store, out, chunk=7)
    assert_helps(caught, *says)


@pytest.mark.parametrize(("value", "says"), [(0, "never filled"), (np.nan, "NaN")])
def test_converting_looks_at_every_key(
    tmp_path: Path, value: float, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is not in the sample of opening, here both ends."""
    monkeypatch.setattr(module, "SAMPLE", 2)
    keys, values = random_entries(ROWS, WIDTH)
    keys[33] = value
    prefix = write_legacy(tmp_path / "old", keys, values, fp16=False)
    store = open_legacy(prefix, ROWS, fp16=False, vocabulary=50)
    refuse_to_convert(store, tmp_path / "new", says, "row 33")
    gc.collect()
    assert {file.name for file in tmp_path.iterdir()} == {"old_keys.npy", "old_vals.npy"}


def test_a_width_that_is_none(tmp_path: Path) -> None:
    """One row of 4 MB: a forgotten digit of --dstore-size."""
    np.ones(10**6 + 1, np.float32).tofile(tmp_path / "old_keys.npy")
    np.ones(1, np.int64).tofile(tmp_path / "old_vals.npy")
    assert "1,000,000 times 4 bytes" in refused(tmp_path / "old", 1, fp16=False)


@pytest.mark.parametrize("file", [keys_file, values_file])
def test_a_folder_in_the_place_of_a_file(
    prefix: Path, fp16: bool, file: Callable[[Path], Path]
) -> None:
    file(prefix).unlink()
    file(prefix).mkdir()
    assert is_legacy(prefix)
    assert "a folder" in refused(prefix, ROWS, fp16=fp16)
