"""``fairseq-knnlm info``: what a datastore is."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_calls import (
    ROWS,
    WIDTH,
    Capture,
    calibration,
    call,
    indexed_store,
    legacy_store,
    refuse,
    say,
    small_store,
    whole_store,
)
from stores import random_entries, truncate, write_store

from fairseq_knnlm import files
from fairseq_knnlm.calibration.stored import write_calibration
from fairseq_knnlm.datastore import Datastore


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    return small_store(tmp_path)


@pytest.fixture
def indexed(tmp_path: Path, capsys: Capture) -> Datastore:
    return indexed_store(tmp_path, capsys)


@pytest.fixture
def whole(tmp_path: Path, capsys: Capture) -> Datastore:
    return whole_store(tmp_path, capsys)


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return legacy_store(tmp_path)


#: Files of which each is spoilt.
SPOILT = (
    *("keys.npy", "values.npy", "knn.index", "ngram.npz", "documents.npz"),
    *("calibration.json", "valid.npz"),
)


def test_info_says_what_the_manifest_says(store: Datastore, capsys: Capture) -> None:
    said = say(capsys, "info", "--dstore", store.path)
    size = sum(file.bytes for file in store.manifest.files.values())
    for words in (
        f"{ROWS} entries of width {WIDTH}",
        "float16, last_ffn_input",
        "uint16, below 50",
        "split        train",
        f"model        {'a' * 64}",
        f"dictionary   {'b' * 64}",
        f"fingerprint  {store.fingerprint}",
        files.human_bytes(size),
        "index        none; build it with `fairseq-knnlm build-index`",
        "calibration  none; fit it with `fairseq-knnlm tune`",
    ):
        assert words in said


def test_info_knows_index_and_calibration(indexed: Datastore, capsys: Capture) -> None:
    write_calibration(indexed.calibration_path, calibration(indexed.fingerprint))
    said = say(capsys, "info", "--dstore", indexed.path)
    assert "index        IVF8,Flat, nprobe 4 (covers 0.51), recall@399 0.51" in said
    fitted = "knn, fixed, fitted on valid, 1,000 tokens; perplexity 150.00 -> 120.25"
    assert f"calibration  {fitted}" in said


def test_info_of_nothing(tmp_path: Path, capsys: Capture) -> None:
    assert "no datastore at" in refuse(capsys, "info", "--dstore", tmp_path / "nowhere")


def test_info_of_an_old_datastore(prefix: Path, capsys: Capture) -> None:
    assert "--dstore-size" in refuse(capsys, "info", "--dstore", prefix)
    said = say(capsys, "info", "--dstore", prefix, "--dstore-size", ROWS, "--dstore-fp16")
    assert f"{ROWS} entries of width {WIDTH}" in said
    assert "model        unknown" in said


def test_info_refuses_a_calibration_of_another_datastore(store: Datastore, capsys: Capture) -> None:
    write_calibration(store.calibration_path, calibration("e" * 64))
    call("info", "--dstore", store.path)
    assert "fitted for another datastore" in capsys.readouterr().out


def test_info_tells_a_damaged_card_from_a_missing_index(tmp_path: Path, capsys: Capture) -> None:
    write_store(tmp_path / "store", *random_entries(300, 8))
    words = ["--dstore", str(tmp_path / "store")]
    call("build-index", *words)
    truncate(tmp_path / "store/knn.index")
    capsys.readouterr()
    call("info", *words)
    captured = capsys.readouterr()
    assert "index        none" not in captured.out
    assert "damaged" in captured.out + captured.err


def test_info_says_of_each_part_what_is_wrong(whole: Datastore, capsys: Capture) -> None:
    sound = say(capsys, "info", "--dstore", whole.path)
    assert "n-grams      up to 3 tokens" in sound
    for name in SPOILT:
        truncate(whole.path / name)
    said = say(capsys, "info", "--dstore", whole.path)
    assert "400 entries of width 8" in said
    for part in ("arrays", "index", "n-grams", "documents", "calibration"):
        line = next(line for line in said.splitlines() if line.startswith(f"  {part} "))
        assert "found:" in line
