"""An index goes along with its datastore: from flat to blocks, and to blocks written anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stores import brute_force, random_entries, truncate, write_store

from fairseq_knnlm.datastore import Datastore, open_datastore, outline
from fairseq_knnlm.datastore.compacting import compact
from fairseq_knnlm.datastore.forgetting import forget
from fairseq_knnlm.datastore.into_blocks import into_blocks
from fairseq_knnlm.errors import IndexFileError
from fairseq_knnlm.index.build import BuildOptions
from fairseq_knnlm.index.card import read_card
from fairseq_knnlm.index.cutting import copy_pieces, cut_index
from fairseq_knnlm.index.pieces import pieces_of, training_in
from fairseq_knnlm.index.storage import load
from fairseq_knnlm.runs.build_index import build_index, extend_index
from fairseq_knnlm.runs.compress import compress

ROWS, WIDTH, K = 900, 8, 10
RECIPES = ("Flat", "SQ8", "IVF16,Flat", "IVF16,PQ4x4", "PCAR8,IVF16,PQ4x4fsr", "IVF16,RaBitQfs")


def store_with(path: Path, recipe: str) -> Datastore:
    store = write_store(path, *random_entries(ROWS, WIDTH))
    options = BuildOptions(queries=20, k=K)
    build_index(store, store.index_path, options, recipe=recipe, device="cpu")
    return store


def answers(store: Datastore, k: int = K, **how: Any) -> tuple[np.ndarray, np.ndarray]:
    searcher = load(
        store.index_path,
        datastore=store.fingerprint,
        rows=len(store),
        width=WIDTH,
        blocks=store.blocks,
        nprobe=None if read_card(store.index_path).nprobe == 0 else 16,  # type: ignore[union-attr]
        **how,
    )
    queries = torch.randn(30, WIDTH, generator=torch.manual_seed(9))
    distances, ids = searcher.search(queries, k)
    return distances.numpy(), ids.numpy()


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_answers_as_before(tmp_path: Path, recipe: str) -> None:
    """Bit for bit, also once it was extended by nothing."""
    store = store_with(tmp_path / "store", recipe)
    card, before = read_card(store.index_path), answers(store)
    left = into_blocks(store.path)
    assert all(map(np.array_equal, answers(left), before))  # at no time there is none
    assert cut_index(left)
    for found, true in zip(answers(left), before, strict=True):
        assert np.array_equal(found, true)
    cut = read_card(left.index_path)
    assert card is not None
    assert cut is not None
    assert cut.in_pieces
    for name in ("factory", "metric", "rows", "nprobe", "recall", "coverage", "exact"):
        assert getattr(cut, name) == getattr(card, name), name
    assert cut_index(left)
    assert extend_index(open_datastore(left.path)) == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_was_forgotten_is_not_found(tmp_path: Path, recipe: str) -> None:
    """The others are, at the distances they had; writing the blocks anew changes nothing."""
    store = store_with(tmp_path / "store", recipe)
    distances, ids = answers(store, ROWS)
    cut_index(into_blocks(store.path))
    left = forget(store.path, [(0, 70), (300, 301), (880, ROWS)])
    rows = [*range(70, 300), *range(301, 880)]
    stays = np.isin(ids, rows)
    numbers = np.full(ROWS, -1)
    numbers[rows] = range(len(rows))
    for _ in range(2):
        found = answers(left, len(rows))
        for n in range(len(ids)):
            order = np.lexsort((found[1][n], found[0][n]))
            true = np.lexsort((numbers[ids[n]][stays[n]], distances[n][stays[n]]))
            assert np.array_equal(found[1][n][order], numbers[ids[n]][stays[n]][true])
            assert np.array_equal(found[0][n][order], distances[n][stays[n]][true])
        compacted = compact(store.path, copy_pieces)
        left = compacted or left
    assert compacted is None  # the second time


def test_exact_search_finds_the_nearest_that_are_left(tmp_path: Path) -> None:
    store = store_with(tmp_path / "store", "Flat")
    cut_index(into_blocks(store.path))
    left = open_datastore(forget(store.path, [(10, 500)]).path)
    queries = torch.randn(30, WIDTH, generator=torch.manual_seed(9)).numpy()
    _, ids = brute_force(np.array(left.keys), queries, K, "l2")
    assert np.array_equal(answers(left)[1], ids)


def test_codes_that_were_copied_are_the_codes(tmp_path: Path) -> None:
    store = store_with(tmp_path / "store", "IVF16,PQ4x4")
    cut_index(into_blocks(store.path))
    left = forget(store.path, [(10, 20)])
    card = read_card(left.index_path)
    assert card is not None

    def codes(one: Datastore) -> np.ndarray:
        training = training_in(one.index_path, card.bytes)
        return np.concatenate(
            [some for some, _ in pieces_of(one.blocks, training, card.piece_bytes)]
        )

    before = codes(left)
    assert compact(store.path, copy_pieces) is not None
    assert np.array_equal(codes(outline(store.path)), before)


@pytest.mark.parametrize("recipe", ["HNSW8", "IVF16,PQ4x4,Refine(SQ8)"])
def test_what_holds_more_than_codes_is_left(tmp_path: Path, recipe: str) -> None:
    store = store_with(tmp_path / "store", recipe)
    content, before = store.index_path.read_bytes(), answers(store)
    left = into_blocks(store.path)
    assert not cut_index(left)
    assert store.index_path.read_bytes() == content
    assert all(map(np.array_equal, answers(left), before))  # as long as all of it is there
    with pytest.raises(IndexFileError, match="another datastore"):
        answers(forget(store.path, [(0, 1)]))


def test_that_of_another_datastore_is_left(tmp_path: Path) -> None:
    store = store_with(tmp_path / "store", "Flat")
    into_blocks(store.path)
    other = write_store(tmp_path / "other", *random_entries(30, WIDTH))
    store.index_path.rename(other.index_path)
    assert not cut_index(into_blocks(other.path))
    assert cut_index(outline(store.path))  # which has none


def test_damage_is_told(tmp_path: Path) -> None:
    store = store_with(tmp_path / "store", "Flat")
    left = into_blocks(store.path)
    truncate(store.index_path)
    with pytest.raises(IndexFileError):
        cut_index(left)


@pytest.mark.parametrize("choice", [{"merge": 4}, {"pca": 5}, {"merge": 2, "pca": 3}])
def test_compressed_as_if_it_had_never_held_them(
    tmp_path: Path, choice: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    store = store_with(tmp_path / "store", "Flat")
    cut_index(into_blocks(store.path))
    left = open_datastore(forget(store.path, [(100, 250), (700, 703)]).path)
    rows = [*range(100), *range(250, 700), *range(703, ROWS)]
    keys, values = random_entries(ROWS, WIDTH)
    other = write_store(tmp_path / "other", keys[rows], values[rows])
    build_index(other, other.index_path, BuildOptions(queries=0), recipe="Flat", device="cpu")
    ours, theirs = (
        open_datastore(compress(each, tmp_path / name, seed=3, **choice))
        for name, each in (("ours", left), ("theirs", other))
    )
    assert np.array_equal(ours.values, theirs.values)
    assert np.array_equal(np.array(ours.keys), np.array(theirs.keys))
    if "merge" in choice:
        assert np.array_equal(np.array(ours.weights), np.array(theirs.weights))
    assert ("holds 3 texts" in caplog.text) == ("merge" not in choice)
