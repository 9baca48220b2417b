"""``fairseq-knnlm compress``: a smaller datastore."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cli_calls import Capture, indexed_store, refuse, say, small_store

from fairseq_knnlm.datastore import Datastore


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    return small_store(tmp_path)


@pytest.fixture
def indexed(tmp_path: Path, capsys: Capture) -> Datastore:
    return indexed_store(tmp_path, capsys)


def test_compress_says_what_it_saved(indexed: Datastore, tmp_path: Path, capsys: Capture) -> None:
    """400 entries of 16 bytes and 2; the projection takes 8 x 4 floats, a weight 4 bytes."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere.index"
    shutil.move(indexed.path / "knn.index", elsewhere)
    compress = ["compress", "--dstore", indexed.path, "--out"]
    said = say(capsys, *compress, out, "--pca", 4)
    assert said.startswith(f"{out}: 400 -> 400 entries, 7.0 KiB -> 4.0 KiB\n")
    assert "fairseq-knnlm build-index" in said
    merged = tmp_path / "merged"
    assert "build-index" in refuse(capsys, *compress, merged, "--merge", 100)
    say(capsys, *compress, merged, "--merge", 100, "--indexfile", elsewhere, "--seed", 2)
    assert "compressed   from 400 entries of width 8 by --merge 100 --seed 2" in say(
        capsys, "info", "--dstore", merged
    )
    assert "exists already" in refuse(capsys, *compress, out, "--pca", 4)
    assert "--pca P" in refuse(capsys, *compress, tmp_path / "new")


def test_compress_into_the_datastore_is_refused(store: Datastore, capsys: Capture) -> None:
    for out, says in {".": "exists already", "smaller": "lies in the datastore"}.items():
        place = store.path / out
        said = refuse(capsys, "compress", "--dstore", store.path, "--out", place, "--pca", 2)
        assert says in said
