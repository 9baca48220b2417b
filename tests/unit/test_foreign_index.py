"""Indexes that another program built, and factory strings that a user made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from stores import (
    assert_helps,
    random_entries,
)

from fairseq_knnlm.errors import IndexFileError
from fairseq_knnlm.index import trial
from fairseq_knnlm.index.card import read_card
from fairseq_knnlm.index.search import SearchIndex
from fairseq_knnlm.index.specification import check_factory
from fairseq_knnlm.index.storage import load

ROWS, WIDTH, K = 1000, 8, 10
OURS = "d" * 64


def keys() -> np.ndarray:
    return random_entries(ROWS, WIDTH)[0]


def loaded(path: Path, **how: Any) -> SearchIndex:
    return load(path, **{"datastore": OURS, "rows": ROWS, "width": WIDTH, **how})


def foreign(path: Path, index: Any) -> Path:
    faiss.write_index(index, str(path))
    return path


def lists_with_ids(ids: np.ndarray) -> Any:
    index = faiss.index_factory(WIDTH, "IVF4,Flat")
    index.train(keys())
    index.add_with_ids(keys(), ids)
    return index


@pytest.mark.parametrize("wrong", [-1, ROWS, 2**40])
def test_ids_beyond_the_datastore_are_refused(tmp_path: Path, wrong: int) -> None:
    ids = np.arange(ROWS)
    ids[7] = wrong
    path = foreign(tmp_path / "x.index", lists_with_ids(ids))
    with pytest.raises(IndexFileError, match="does not hold the rows") as caught:
        loaded(path, foreign=True)
    assert_helps(caught, f"{wrong:,}")


def test_a_metric_that_is_neither_is_refused(tmp_path: Path) -> None:
    index = faiss.IndexFlat(WIDTH, faiss.METRIC_L1)
    index.add(keys())
    with pytest.raises(IndexFileError, match="compares keys in another way"):
        loaded(foreign(tmp_path / "x.index", index), foreign=True)


@pytest.mark.parametrize("content", [b"", b"no index at all", b"IxF2" + b"\xff" * 100])
def test_an_index_that_is_none_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "knn.index").write_bytes(content)
    with pytest.raises(IndexFileError, match="has no card"):
        loaded(tmp_path / "knn.index")
    with pytest.raises(IndexFileError, match="damaged"):
        loaded(tmp_path / "knn.index", foreign=True)


def test_a_foreign_file_that_crashes_faiss_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashing = tmp_path / "crash.py"
    crashing.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setattr(trial, "__file__", str(crashing))
    with pytest.raises(IndexFileError, match="SIGSEGV"):
        loaded(foreign(tmp_path / "x.index", lists_with_ids(np.arange(ROWS))), foreign=True)


@pytest.mark.parametrize(
    "factory", ["PCA0,IVF4,Flat", "HNSW0", "A" * 150, "PQ8x0", "IMI2x20", "", "\xfc", "A" * 10**6]
)
def test_recipes_that_crash_faiss_are_refused(factory: str) -> None:
    with pytest.raises(IndexFileError, match="FAISS cannot make the index") as caught:
        check_factory(factory, 16)
    assert_helps(caught, "--recipe auto")


@pytest.mark.parametrize("factory", ["HNSW8", "IVF4,PQ4x4,RFlat", "PQ4x12", "IMI2x4,Flat"])
def test_recipes_that_work_are_let_pass(factory: str) -> None:
    check_factory(factory, 16)


@pytest.mark.parametrize("shape", [{"rows": ROWS + 1}, {"width": WIDTH + 1}])
def test_an_index_of_another_shape_is_refused(tmp_path: Path, shape: dict[str, int]) -> None:
    """All that can be said of an index without a card."""
    path = foreign(tmp_path / "knn.index", lists_with_ids(np.arange(ROWS)))
    loaded(path, foreign=True)
    with pytest.raises(IndexFileError, match="another datastore"):
        loaded(path, foreign=True, **shape)


def test_an_index_that_somebody_else_built(tmp_path: Path) -> None:
    quantizer = faiss.IndexFlatIP(WIDTH)
    index = faiss.IndexIVFFlat(quantizer, WIDTH, 64, faiss.METRIC_INNER_PRODUCT)
    index.train(keys())
    index.add(keys())
    faiss.write_index(index, str(tmp_path / "knn.index"))
    assert read_card(tmp_path / "knn.index", foreign=True) is None
    found = loaded(tmp_path / "knn.index", foreign=True)
    assert (found.card.metric, found.card.nprobe, found.card.exact) == ("ip", 32, False)
    assert found.index.nprobe == 32
