"""Pieces of keys that come in batches are those of stored keys, and a sample measures an index."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
from stores import clustered, write_store

from fairseq_knnlm.datastore import Block, Stretch
from fairseq_knnlm.errors import DatastoreError
from fairseq_knnlm.index.build import BuildOptions, IndexBuilder
from fairseq_knnlm.index.in_blocks import write_pieces
from fairseq_knnlm.index.recipes import Recipe
from fairseq_knnlm.index.streaming import PieceStream, train_for_pieces


def trained(recipe: str, keys: np.ndarray) -> faiss.Index:
    index = faiss.index_factory(keys.shape[1], recipe)
    index.train(keys)
    return index


@pytest.mark.parametrize("recipe", ["IVF8,PQ4x4fsr", "PCAR4,IVF8,PQ4x4fsr", "IVF8,Flat", "SQ8"])
@pytest.mark.parametrize("at_a_time", [1, 7, 300, 1000])
def test_the_piece_is_that_of_stored_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, at_a_time: int
) -> None:
    for module in ("build", "streaming"):  # 100 keys are encoded at a time
        monkeypatch.setattr(f"fairseq_knnlm.index.{module}.CHUNK_BYTES", 100 * 8 * 4)
    keys = clustered(1000)
    store = write_store(tmp_path / "store", keys, np.zeros(1000, int))
    index = trained(recipe, keys)
    block = Block(store.path, 0, Stretch("store", 1000, store.fingerprint))
    write_pieces(index, [block], progress=False)
    (expected,) = store.path.glob("piece-*.npy")
    stream = PieceStream(index)
    for start in range(0, 1000, at_a_time):
        stream.add(keys[start : start + at_a_time])
    (tmp_path / "other").mkdir()
    found = stream.write(tmp_path / "other", store.fingerprint)
    assert found.name == expected.name
    assert found.read_bytes() == expected.read_bytes()


def test_keys_that_are_no_numbers_are_refused() -> None:
    keys = clustered(100)
    stream = PieceStream(trained("IVF2,Flat", keys))
    keys[3, 2] = np.nan
    with pytest.raises(DatastoreError, match="no numbers"):
        stream.add(keys)


@pytest.mark.parametrize("recipe", ["IVF64,Flat", "IVF64,SQ4"])
def test_a_sample_tells_how_good_the_index_is(recipe: str) -> None:
    """The oracle is brute force over all keys, with the lists that the card says."""
    keys = clustered(20_000)
    rows = np.sort(np.random.default_rng(0).choice(20_000, 4_000, replace=False))
    options = BuildOptions(queries=200, k=100, recall=0.8)
    builder = IndexBuilder(Recipe(recipe, 0, 4_000), 8, 20_000, options)
    index, card = train_for_pieces(builder, keys[rows], rows)
    assert (index.ntotal, card.rows, card.recall_at) == (0, 20_000, 100)
    assert card.piece_bytes == index.sa_code_size()
    index.add(keys)
    index.nprobe = card.nprobe
    asked = keys[np.random.default_rng(1).choice(20_000, 300, replace=False)]
    _, true = faiss.knn(asked, keys, 101)
    _, found = index.search(asked, 101)
    pairs = zip(found, true, strict=True)
    recall = np.mean([len(set(some[1:]) & set(all_[1:])) / 100 for some, all_ in pairs])
    assert card.recall == pytest.approx(recall, abs=0.06)
