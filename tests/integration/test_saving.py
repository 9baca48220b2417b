"""Saving without keys: they go from the forward pass into a trained index."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
from conftest import ROOT, Lab, must, run

from fairseq_knnlm.datastore import open_datastore
from fairseq_knnlm.errors import ConfigError, DatastoreError, IndexFileError
from fairseq_knnlm.index.card import read_card
from fairseq_knnlm.index.storage import load

KNN = ["--k", 64, "--lmbda", 0.3, "--knn-temp", 2.0]
STREAM = ["--save-knnlm-dstore", "--no-save-keys", "--dstore-mmap"]


@pytest.fixture(scope="module")
def streamed(lab: Lab) -> Path:
    """The train split, streamed by the real command into an index of full keys."""
    folder = lab.folder / "streamed"
    must("fairseq-eval-lm", *lab.command("train", *STREAM, folder, "--recipe", "IVF16,Flat"))
    return folder


def test_a_streamed_datastore_has_no_keys(streamed: Path, datastore: Path) -> None:
    names = {file.name for file in streamed.iterdir()}
    assert names == {"manifest.json", "values.npy", "knn.index", "documents.npz"}
    found, expected = open_datastore(streamed), open_datastore(datastore)
    assert found.keys is None
    assert found.manifest.key_dtype is None
    assert found.manifest.width == expected.manifest.width
    assert found.manifest.origin.context == expected.manifest.origin.context
    assert np.array_equal(found.values, expected.values)
    card = read_card(streamed / "knn.index")
    assert card is not None
    assert card.datastore == found.fingerprint
    assert card.coverage is not None
    assert card.coverage >= 0.9
    # With full keys, what the lists cover is what is found.
    assert card.recall == pytest.approx(card.coverage, abs=0.01)


def test_it_evaluates_as_the_datastore_with_keys(lab: Lab, streamed: Path, tmp_path: Path) -> None:
    """In float32, as keys go into an index."""
    store = tmp_path / "store"
    lab.evaluate("train", "--save-knnlm-dstore", "--dstore-mmap", store, "--dstore-fp32")
    must("fairseq-knnlm", "build-index", "--dstore", store)
    expected = lab.evaluate("valid", "--knnlm", "--dstore-filename", store, *KNN)
    found = lab.evaluate("valid", "--knnlm", "--dstore-filename", streamed, *KNN, "--probe", 16)
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-4)


@pytest.mark.parametrize(
    "context", [[], ["--context-window", 0, "--sample-break-mode", "complete"]]
)
def test_every_key_has_its_row(lab: Lab, tmp_path: Path, context: list[object]) -> None:
    """Also where fairseq reads blocks by their length, not in the order of the text."""
    flags = [*context, "--max-tokens", 128]
    lab.evaluate("valid", "--save-knnlm-dstore", "--dstore-mmap", tmp_path / "keys", *flags)
    lab.evaluate("valid", *STREAM, tmp_path / "none", "--recipe", "IVF4,Flat", *flags)
    expected = open_datastore(tmp_path / "keys").full_keys().astype(np.float32)
    store = open_datastore(tmp_path / "none")
    index = load(
        store.index_path, datastore=store.fingerprint, rows=len(store), width=expected.shape[1]
    ).index
    index.make_direct_map()
    np.testing.assert_allclose(index.reconstruct_n(0, len(store)), expected, rtol=2e-3, atol=2e-3)


def test_the_automatic_recipe_can_be_streamed_into(lab: Lab, tmp_path: Path) -> None:
    lab.evaluate("valid", *STREAM, tmp_path / "store", "--max-bytes-per-key", 12)
    card = read_card(tmp_path / "store" / "knn.index")
    assert card is not None
    assert card.factory == "PCAR16,IVF64,PQ8x4fsr"
    assert card.recall_at == card.rows - 1 or card.recall_at == 1024
    said = must("fairseq-knnlm", "info", "--dstore", tmp_path / "store")
    assert "keys         in the index only" in said
    assert "every byte as it was written" in must(
        "fairseq-knnlm", "verify", "--dstore", tmp_path / "store"
    )
    for flags in ([], ["--probe", 64]):
        memory = ["--knnlm", "--dstore-filename", tmp_path / "store", *KNN]
        found = lab.evaluate("test", *memory, *flags)
        assert found["loss"] < 10


def test_what_needs_keys_says_so(lab: Lab, streamed: Path) -> None:
    with pytest.raises(DatastoreError, match="holds no keys"):
        lab.evaluate(
            "valid", "--knnlm", "--dstore-filename", streamed, *KNN, "--knn-sim-func", "l2"
        )
    ran = run("python", ROOT / "examples/build_index.py", "--dstore", streamed)
    assert ran.code == 1
    assert "holds no keys" in ran.out


@pytest.mark.parametrize("recipe", ["Flat", "HNSW8", "IVF4,Flat,Refine(SQ8)"])
def test_indexes_that_need_rows_in_order_are_refused(lab: Lab, tmp_path: Path, recipe: str) -> None:
    with pytest.raises(IndexFileError, match="cannot be streamed into"):
        lab.evaluate("valid", *STREAM, tmp_path / "store", "--recipe", recipe)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--no-save-keys"], "--no-save-keys needs"),
        (["--recipe", "paper"], "--recipe needs"),
        (["--save-knnlm-dstore", "--dstore-mmap", "x", "--max-bytes-per-key", 40], "needs"),
    ],
)
def test_flags_of_streaming_alone_are_refused(lab: Lab, flags: list[object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        lab.evaluate("valid", *flags)


def test_faiss_reads_the_streamed_index(streamed: Path) -> None:
    """It is a plain FAISS file, for whoever wants it."""
    index = faiss.read_index(str(streamed / "knn.index"))
    assert index.ntotal == len(np.load(streamed / "values.npy"))
