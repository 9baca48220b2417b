"""``fairseq-knnlm verify``: every byte checked."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_calls import (
    ROWS,
    WIDTH,
    Capture,
    call,
    indexed_store,
    legacy_store,
    refuse,
    said_and_wrong,
    say,
    small_store,
    whole_store,
)
from stores import alter, random_entries, truncate, write_compressed, write_store

from fairseq_knnlm import files
from fairseq_knnlm.datastore import Datastore, Documents, read_documents, write_documents
from fairseq_knnlm.experts.kneser_ney import NGramModel
from fairseq_knnlm.experts.ngram_file import save_counts


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    return small_store(tmp_path)


@pytest.fixture
def indexed(tmp_path: Path, capsys: Capture) -> Datastore:
    return indexed_store(tmp_path, capsys)


@pytest.fixture
def whole(tmp_path: Path, capsys: Capture) -> Datastore:
    return whole_store(tmp_path, capsys)


#: Files of which each is spoilt.
SPOILT = (
    *("keys.npy", "values.npy", "knn.index", "ngram.npz", "documents.npz"),
    *("calibration.json", "valid.npz"),
)


def test_info_and_verify_of_a_compressed_datastore(tmp_path: Path, capsys: Capture) -> None:
    store = write_compressed(tmp_path / "store")
    said = say(capsys, "info", "--dstore", store.path)
    assert "100 entries of width 6" in said
    assert "compressed   from 250 entries of width 9 by --merge 4 --pca 6 --seed 1" in said
    assert "(keys.npy, values.npy, projection.npy, weights.npy)" in say(
        capsys, "verify", "--dstore", store.path
    )
    say(capsys, "build-index", "--dstore", store.path)
    assert "Flat, of this datastore" in say(capsys, "verify", "--dstore", store.path)
    alter(store.path / "weights.npy")
    assert call("verify", "--dstore", store.path) == 1
    assert "weights.npy is damaged" in capsys.readouterr().err


def test_verify_finds_everything_in_order(indexed: Datastore, capsys: Capture) -> None:
    said = say(capsys, "verify", "--dstore", indexed.path)
    assert f"{ROWS} entries, every byte as it was written" in said
    assert "IVF8,Flat" in said
    assert "of this datastore" in said


@pytest.mark.parametrize("spoil", [truncate, alter])
@pytest.mark.parametrize("name", ["keys.npy", "values.npy", "manifest.json", "knn.index"])
def test_verify_finds_damage(
    indexed: Datastore,
    name: str,
    spoil: Callable[[Path], None],
    capsys: Capture,
) -> None:
    spoil(indexed.path / name)
    call("verify", "--dstore", indexed.path)
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert f"{name} is damaged" in said


@pytest.mark.parametrize("name", ["keys.npy", "knn.index"])
def test_verify_reads_every_byte(
    tmp_path: Path,
    name: str,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also what opening a huge datastore leaves unread: here all but both ends."""
    monkeypatch.setattr("fairseq_knnlm.files.integrity.CHUNK_BYTES", 64)
    path = tmp_path / "store"
    write_store(path, *random_entries(ROWS, WIDTH))
    say(capsys, "build-index", "--dstore", path, "--recipe", "IVF8,Flat")
    monkeypatch.setattr("fairseq_knnlm.files.integrity.CHUNKS_ON_OPEN", 2)
    alter(path / name)
    say(capsys, "info", "--dstore", path)
    call("verify", "--dstore", path)
    assert f"{name} is damaged" in capsys.readouterr().err


def test_verify_refuses_the_index_of_another_datastore(indexed: Datastore, capsys: Capture) -> None:
    keys, values = random_entries(ROWS, WIDTH)
    other = write_store(indexed.path.with_name("other"), keys + 1, values, dtype="float16")
    shutil.copy(indexed.path / "knn.index", other.path / "knn.index")
    call("verify", "--dstore", other.path)
    assert "index of another datastore" in capsys.readouterr().err


def test_verify_does_not_vouch_for_files_without_checksums(tmp_path: Path, capsys: Capture) -> None:
    """Files of urvashik/knnlm carry none: nothing says they are as they were written."""
    keys, values = random_entries(300, 8)
    keys.tofile(tmp_path / "old_keys.npy")
    values.tofile(tmp_path / "old_vals.npy")
    call("verify", "--dstore", tmp_path / "old", "--dstore-size", "300")
    captured = capsys.readouterr()
    assert "every byte as it was written" not in captured.out


def test_verify_looks_at_everything(whole: Datastore, capsys: Capture) -> None:
    said, wrong = said_and_wrong(capsys, 0, "verify", "--dstore", whole.path)
    assert wrong == ""
    for name, summary in {
        "store": "400 entries, every byte as it was written (keys.npy, values.npy)",
        "knn.index": "IVF8,Flat, nprobe 4",
        "ngram.npz": "n-grams up to 3 tokens",
        "documents.npz": "documents of this datastore: ",
        "calibration.json": "knn, fixed, fitted for this datastore",
        "valid.npz": "score table of valid, 960 tokens",
    }.items():
        assert f"{name}: {summary}" in said
    (whole.path / "notes.txt").touch()
    (whole.path / ".knn.index.partial-abc").touch()
    said, wrong = said_and_wrong(capsys, 0, "verify", "--dstore", whole.path)
    assert "notes.txt: a file that fairseq-knnlm does not know" in said
    assert ".knn.index.partial-abc: of a run that has not ended" in said


def test_verify_lists_all_that_is_wrong(whole: Datastore, capsys: Capture) -> None:
    for name in SPOILT:
        alter(whole.path / name)
    said, wrong = said_and_wrong(capsys, 1, "verify", "--dstore", whole.path)
    assert wrong.count("expected:") >= len(SPOILT)
    for name in SPOILT:
        assert f"{whole.path / name} " in wrong
    assert said.count("not as it should be") == len(SPOILT) - 1  # keys and values are one thing


@pytest.mark.parametrize(
    "name", ["knn.index", "ngram.npz", "documents.npz", "calibration.json", "more"]
)
def test_verify_waits_for_no_pipe(whole: Datastore, name: str, capsys: Capture) -> None:
    (whole.path / name).unlink(missing_ok=True)
    os.mkfifo(whole.path / name)
    said, wrong = said_and_wrong(
        capsys, 0 if name == "more" else 1, "verify", "--dstore", whole.path
    )
    assert "a device or pipe" in said + wrong


def test_verify_reads_the_numbers(store: Datastore, tmp_path: Path, capsys: Capture) -> None:
    """NaN among the keys and tokens beyond the vocabulary, under checksums that are right."""
    keys, values = np.load(store.path / "keys.npy"), np.load(store.path / "values.npy")
    keys[[50, 51], 3] = np.nan
    values[77] = 50
    manifest = json.loads((store.path / "manifest.json").read_text())
    for name, array in {"keys.npy": keys, "values.npy": values}.items():
        np.save(store.path / name, array)
        manifest["files"][name]["chunks"] = files.checksums(store.path / name)
    del manifest["fingerprint"], manifest["format"], manifest["version"]
    files.write_sealed(store.path / "manifest.json", "fairseq-knnlm datastore", 1, manifest)
    _, wrong = said_and_wrong(capsys, 1, "verify", "--dstore", store.path)
    assert "NaN or infinity in 2 of 400 rows, first in row 50" in wrong
    assert "no token id below 50 in 1 of 400 rows, first in row 77" in wrong


def test_verify_tells_the_n_grams_of_another_text(store: Datastore, capsys: Capture) -> None:
    """Under the fingerprint of this datastore."""
    save_counts(NGramModel.count(store.values[:9], 50, 3), store.ngram_path, store.fingerprint)
    _, wrong = said_and_wrong(capsys, 1, "verify", "--dstore", store.path)
    assert "not counted from this datastore" in wrong


# Documents


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--document-boundary", "x"], "--document-boundary does nothing without --documents"),
        (["--data", "."], "--data does nothing without --documents"),
        (["--documents", "--document-boundary", "x"], "--data DATA, the folder"),
        (["--documents", "--document-boundary", "(", "--data", "."], "no regular expression"),
        (["--documents", "--document-boundary="], "--document-boundary is empty"),
        (["--documents", "--data", "nowhere"], "no dictionary at nowhere"),
        (["--documents", "--data", "tests"], "a folder without dict.txt"),
    ],
)
def test_what_finds_no_documents_is_refused(
    store: Datastore, flags: list[str], words: str, capsys: Capture
) -> None:
    said = refuse(capsys, "verify", "--dstore", store.path, *flags)
    assert words in said
    assert "expected: " in said
    assert not store.documents_path.exists()


def lines_store(folder: Path) -> Datastore:
    """``/ a / / b c / / a`` with 2 for the end of a line."""
    values = np.array([2, 5, 2, 2, 6, 7, 2, 2, 5])
    return write_store(folder / "store", np.ones((9, 4), np.float32), values)


def test_documents_are_found_and_verified(tmp_path: Path, capsys: Capture) -> None:
    store = lines_store(tmp_path)
    assert "documents    none; find them" in say(capsys, "info", "--dstore", store.path)
    said = say(capsys, "verify", "--dstore", store.path, "--documents")
    assert "documents.npz: documents of this datastore: 3, with empty lines between them" in said
    found = read_documents(store)
    assert found is not None
    assert found.starts.tolist() == [0, 4, 8]
    assert "documents    3, with empty lines" in say(capsys, "info", "--dstore", store.path)


@pytest.mark.parametrize(
    ("starts", "boundary"), [([0, 4], None), ([0, 4, 5], None), ([0, 5, 8], "b"), ([0, 1, 2], ".")]
)
def test_verify_tells_the_documents_of_another_text(
    tmp_path: Path, starts: list[int], boundary: str | None, capsys: Capture
) -> None:
    """In a file whose checksums and fingerprint are right."""
    store = lines_store(tmp_path)
    write_documents(store, Documents(np.array(starts), len(store), 2, boundary))
    _, wrong = said_and_wrong(capsys, 1, "verify", "--dstore", store.path)
    assert "documents.npz was not made of this datastore's values" in wrong
    say(capsys, "verify", "--dstore", store.path, "--documents")
    say(capsys, "verify", "--dstore", store.path)


def test_documents_of_merged_entries_are_refused(tmp_path: Path, capsys: Capture) -> None:
    store = write_compressed(tmp_path / "store")
    assert "has no text" in refuse(capsys, "verify", "--dstore", store.path, "--documents")
    assert "documents    none, since entries were merged" in say(
        capsys, "info", "--dstore", store.path
    )
    other = lines_store(tmp_path / "other")
    write_documents(other, Documents(np.array([0]), len(other), 2))
    shutil.copy(other.documents_path, store.documents_path)
    _, wrong = said_and_wrong(capsys, 1, "verify", "--dstore", store.path)
    assert "has no text" in wrong


def test_a_place_where_documents_cannot_be_written(tmp_path: Path, capsys: Capture) -> None:
    store = lines_store(tmp_path)
    store.documents_path.mkdir()
    said = refuse(capsys, "verify", "--dstore", store.path, "--documents")
    assert "--documents cannot be written" in said


def test_documents_of_an_old_datastore(tmp_path: Path, capsys: Capture) -> None:
    """Files of urvashik/knnlm do not know their dictionary."""
    prefix = legacy_store(tmp_path)
    old = ["--dstore", prefix, "--dstore-size", ROWS, "--dstore-fp16"]
    said = say(capsys, "verify", *old, "--documents")
    assert "old_documents.npz: documents of this datastore: " in said
    (tmp_path / "dict.txt").write_text("a 1\n")
    data = ["--data", tmp_path, "--document-boundary", "a"]
    said = refuse(capsys, "verify", *old, "--documents", *data)
    assert "another dictionary than that of --data" in said
