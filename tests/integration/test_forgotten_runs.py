"""Runs on a datastore of which rows were forgotten, beside one that never held them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Lab

from fairseq_knnlm.cli import main
from fairseq_knnlm.datastore import DatastoreWriter, open_datastore
from fairseq_knnlm.runs.changing import compact_store, forget_parts

GONE = [(0, 7), (200, 420), (421, 422)]
KNN = ["--knnlm", "--experts", "knn", "--k", 16, "--lmbda", 0.3, "--mixer", "fixed"]


def index(path: Path) -> None:
    assert main(["build-index", "--dstore", str(path), "--recipe", "Flat"]) == 0


@pytest.fixture
def store(datastore: Path, tmp_path: Path) -> Path:
    """With an exact index."""
    path = tmp_path / "store"
    shutil.copytree(datastore, path)
    for left in path.glob("*.np[z]"):
        left.unlink()
    index(path)
    return path


def never_held(store: Path, path: Path) -> Path:
    """The same without these rows, in one piece."""
    whole = open_datastore(store)
    rows = [row for row in range(len(whole)) if not any(a <= row < b for a, b in GONE)]
    manifest = whole.manifest
    writer = DatastoreWriter(path, len(rows), manifest.width, manifest.origin, manifest.key_dtype)
    writer.write(np.arange(len(rows)), np.array(whole.keys)[rows], whole.values[rows])
    writer.publish()
    index(path)
    return path


def test_as_of_one_that_never_held_them(lab: Lab, store: Path, tmp_path: Path) -> None:
    """Neighbours are the same, to the last digit, also of blocks that were written anew."""
    before = lab.evaluate("test", *KNN, "--dstore-filename", store)
    other = never_held(store, tmp_path / "other")
    expected = lab.evaluate("test", *KNN, "--dstore-filename", other)
    assert expected != before
    forget_parts(store, [], GONE)
    assert lab.evaluate("test", *KNN, "--dstore-filename", store) == expected
    compact_store(store)
    assert lab.evaluate("test", *KNN, "--dstore-filename", store) == expected


@pytest.mark.parametrize(
    "how",
    [
        ["--experts", "knn,ngram"],
        ["--experts", "knn", "--pointers", "join"],
        ["--experts", "knn", "--pointers", "replace", "--pointer-min", 2],
    ],
)
def test_what_goes_by_the_text_sees_the_same_before_and_after(
    lab: Lab, store: Path, how: list[Any]
) -> None:
    """Where it breaks off is kept when blocks are written anew."""
    words = ["--knnlm", "--k", 16, "--lmbda", 0.3, "--mixer", "fixed", *how]
    forget_parts(store, [], GONE)
    breaks = open_datastore(store).breaks.tolist()
    found = lab.evaluate("test", *words, "--dstore-filename", store)
    compact_store(store)
    assert open_datastore(store).breaks.tolist() == breaks == [0, 193, 194]
    assert lab.evaluate("test", *words, "--dstore-filename", store) == found
