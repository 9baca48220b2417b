"""From queries to neighbours: exact distances against NumPy, missing neighbours masked."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from stores import assert_helps, build_index, random_entries, write_compressed, write_store

from fairseq_knnlm.datastore import Datastore, open_datastore
from fairseq_knnlm.errors import DatastoreError, IndexFileError, ModelError
from fairseq_knnlm.index import distances as module
from fairseq_knnlm.index.exact import ExactSearch
from fairseq_knnlm.index.search import SearchIndex
from fairseq_knnlm.retrieval.local import LocalRetriever
from fairseq_knnlm.retrieval.neighbours import Neighbours

ROWS, WIDTH, K = 300, 12, 20


@pytest.fixture(params=["float16", "float32"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Datastore:
    return write_store(tmp_path / "store", *random_entries(ROWS, WIDTH), dtype=request.param)


def searcher(store: Datastore, recipe: str = "Flat", metric: str = "l2", **how: int) -> SearchIndex:
    assert store.keys is not None
    index, card = build_index(store.keys, recipe, metric=metric, **how)
    return SearchIndex(index, card)


def queries(rows: int = 15) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.manual_seed(4))


def of_many_types(store: Datastore, values: np.ndarray) -> Datastore:
    """The same keys with other values, of a dictionary that has them all."""
    origin = msgspec.structs.replace(store.manifest.origin, vocabulary=2**63 - 1)
    manifest = msgspec.structs.replace(store.manifest, origin=origin)
    return replace(store, values=values, manifest=manifest)


def distance_to_all(store: Datastore, asked: torch.Tensor, kind: str) -> np.ndarray:
    """(N, rows) float64: squared L2, or the negative inner product."""
    assert store.keys is not None
    keys, xq = store.keys.astype(np.float64), asked.numpy().astype(np.float64)
    if kind == "ip":
        return -xq @ keys.T
    return ((xq[:, None] - keys[None]) ** 2).sum(axis=2)


@pytest.mark.parametrize("gather_bytes", [1, 5000, 2**27])
@pytest.mark.parametrize(("similarity", "kind"), [("l2", "l2"), ("dot", "ip")])
def test_recomputed_distances_are_numpys(
    store: Datastore,
    similarity: str,
    kind: str,
    gather_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the index says, and whatever fits into memory at a time."""
    monkeypatch.setattr(module, "GATHER_BYTES", gather_bytes)
    asked = queries()
    found = LocalRetriever(searcher(store, "IVF4,PQ2x4", nprobe=4), store, similarity).search(
        asked, K
    )
    assert found.valid.all()
    expected = np.take_along_axis(distance_to_all(store, asked, kind), found.ids.numpy(), axis=1)
    np.testing.assert_allclose(found.distances.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert found.distances.dtype == torch.float32


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_an_exact_index_finds_the_nearest(store: Datastore, metric: str) -> None:
    """Its own distances; an inner product comes back negative, so that less is nearer."""
    asked = queries()
    found = LocalRetriever(searcher(store, metric=metric), store, "do_not_recomp_l2").search(
        asked, K
    )
    everything = distance_to_all(store, asked, metric)
    nearest = np.argsort(everything, axis=1)[:, :K]
    assert [set(row) for row in found.ids.tolist()] == [set(row) for row in nearest.tolist()]
    np.testing.assert_allclose(
        found.distances.numpy(), np.sort(everything, axis=1)[:, :K], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dtype", ["uint16", "int16", "int32", "int64"])
def test_values_are_those_of_the_ids(store: Datastore, dtype: str) -> None:
    """Also those above 32,767, which urvashik/knnlm's int16 made negative."""
    values = np.random.default_rng(0).integers(np.iinfo(dtype).max, size=ROWS).astype(dtype)
    store = of_many_types(store, values)
    found = LocalRetriever(searcher(store), store, "l2").search(queries(), K)
    assert np.array_equal(found.values.numpy(), values[found.ids.numpy()])


@pytest.mark.parametrize("similarity", ["l2", "dot", "do_not_recomp_l2"])
def test_what_an_index_does_not_find_is_missing(store: Datastore, similarity: str) -> None:
    """One list of a handful of entries is visited, and more neighbours are asked for."""
    index = searcher(store, "IVF32,Flat", nprobe=1)
    found = LocalRetriever(index, store, similarity).search(queries(), 100)
    assert torch.equal(found.valid, found.ids >= 0)
    assert found.valid[:, 0].all()
    assert not found.valid[:, -1].any()
    kind = "ip" if similarity == "dot" else "l2"
    expected = np.take_along_axis(
        distance_to_all(store, queries(), kind), found.ids.clamp_min(0).numpy(), axis=1
    )
    there = found.valid.numpy()
    np.testing.assert_allclose(found.distances.numpy()[there], expected[there], rtol=1e-4)


def test_more_neighbours_than_entries(store: Datastore) -> None:
    found = LocalRetriever(searcher(store), store, "l2").search(queries(3), ROWS + 5)
    assert found.valid.sum(dim=1).tolist() == [ROWS] * 3
    assert found.ids[:, :ROWS].sort(dim=1).values.tolist() == [list(range(ROWS))] * 3


def test_half_precision_queries_and_none_at_all(store: Datastore) -> None:
    retriever = LocalRetriever(searcher(store), store, "l2")
    half = queries().half()
    found, same = retriever.search(half, K), retriever.search(half.float(), K)
    assert torch.equal(found.ids, same.ids)
    assert torch.equal(found.distances, same.distances)
    nothing = retriever.search(queries(0), K)
    assert nothing.ids.shape == nothing.distances.shape == nothing.values.shape == (0, K)


@pytest.mark.parametrize("similarity", ["l2", "dot", "do_not_recomp_l2"])
def test_queries_are_projected_and_weights_gathered(tmp_path: Path, similarity: str) -> None:
    """By FAISS and by exact search in torch; one entry is missing."""
    store = write_compressed(tmp_path / "store")
    flat = searcher(store)
    asked = torch.randn(15, 9, generator=torch.manual_seed(4))
    for index in (flat, ExactSearch(store.full_keys(), flat.card, "cpu")):
        found = LocalRetriever(index, store, similarity).search(asked.half(), 101)
        projected = asked.half().float() @ torch.from_numpy(np.array(store.projection))
        kind = "ip" if similarity == "dot" else "l2"
        ids = found.ids[:, :100].numpy()
        expected = np.take_along_axis(distance_to_all(store, projected, kind), ids, axis=1)
        np.testing.assert_allclose(found.distances[:, :100], expected, rtol=1e-4, atol=1e-4)
        assert store.weights is not None and found.log_weights is not None
        assert found.log_weights.dtype == torch.float32
        np.testing.assert_allclose(found.log_weights[:, :100], np.log(store.weights[ids]))
        assert not found.valid[:, 100].any()


def test_without_weights_there_are_none(store: Datastore) -> None:
    assert LocalRetriever(searcher(store), store, "l2").search(queries(), K).log_weights is None


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_tokens_before_are_those_of_the_text(store: Datastore, steps: int) -> None:
    """In any shape; the first entries and missing neighbours have none."""
    ids = torch.tensor([[0, 1, 2], [3, 57, -1], [ROWS - 1, steps, steps - 1]])
    found = LocalRetriever(searcher(store), store, "l2").tokens_before(ids, steps)
    text = store.values.tolist()
    expected = [[text[i - steps] if i >= steps else -1 for i in row] for row in ids.tolist()]
    assert found.tolist() == expected


def test_tokens_before_are_no_negative_numbers(store: Datastore) -> None:
    """Above 32,767, where int16 would make them; -1 stays what says that there are none."""
    store = of_many_types(store, np.full(ROWS, 65535, np.uint16))
    found = LocalRetriever(searcher(store), store, "l2").tokens_before(torch.tensor([0, 1, 9]), 1)
    assert found.tolist() == [-1, 65535, 65535]


def test_a_merged_datastore_has_no_text(tmp_path: Path) -> None:
    """What stands one row before an entry was not before it in the text."""
    store = write_compressed(tmp_path / "store")
    found = LocalRetriever(searcher(store), store, "l2").tokens_before(
        torch.arange(6).view(2, 3), 1
    )
    assert found.tolist() == [[-1] * 3] * 2


@pytest.mark.parametrize("weighted", [False, True])
def test_nearest_first(weighted: bool) -> None:
    """Everything moves together; what is missing comes last."""
    rng = np.random.default_rng(1)
    ids = np.array([rng.permutation(50)[:K] for _ in range(8)])
    distances = rng.random((8, K), np.float32)
    missing = rng.random((8, K)) < 0.2
    ids[missing], distances[missing] = -1, np.inf
    weights = rng.random((8, K), np.float32)
    near = Neighbours(
        *map(torch.from_numpy, (ids, distances, ids * 7, ~missing)),
        log_weights=torch.from_numpy(weights) if weighted else None,
    ).nearest_first()
    for row in range(8):
        order = sorted(np.flatnonzero(~missing[row]), key=lambda place: distances[row, place])
        there = len(order)
        assert near.valid[row].tolist() == [True] * there + [False] * (K - there)
        assert near.ids[row, :there].tolist() == ids[row, order].tolist()
        assert near.distances[row, :there].tolist() == distances[row, order].tolist()
        assert near.values[row, :there].tolist() == (7 * ids[row, order]).tolist()
        assert near.distances[row, there:].isinf().all()
        if weighted:
            assert near.log_weights is not None
            assert near.log_weights[row, :there].tolist() == weights[row, order].tolist()
    assert weighted or near.log_weights is None


def test_the_report_says_what_the_distances_are(store: Datastore) -> None:
    flat, coarse = searcher(store), searcher(store, "IVF4,PQ2x4", metric="ip")
    dtype = store.manifest.key_dtype
    assert [
        LocalRetriever(index, store, similarity).distances
        for index, similarity in (
            *((flat, "l2"), (flat, "dot")),
            *((flat, "do_not_recomp_l2"), (coarse, "do_not_recomp_l2")),
        )
    ] == [
        f"exact squared L2, recomputed on {dtype} keys",
        f"exact inner product, recomputed on {dtype} keys",
        "exact squared L2, from the index",
        "approximate inner product, from the index",
    ]


class Names:
    """An index that finds what it is told to."""

    def __init__(self, flat: SearchIndex, ids: list[int], distance: float = 1.0) -> None:
        self.card = flat.card
        self.ids = ids
        self.distance = distance

    def search(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.tensor([self.ids] * len(queries))
        return torch.full(ids.shape, self.distance), ids


@pytest.mark.parametrize("ids", [[0, -2], [3, ROWS], [2**40, 1]])
@pytest.mark.parametrize("similarity", ["l2", "do_not_recomp_l2"])
def test_an_index_that_names_other_entries_is_refused(
    store: Datastore, similarity: str, ids: list[int]
) -> None:
    index = Names(searcher(store), ids)
    with pytest.raises(IndexFileError, match="entries that the datastore does not have") as caught:
        LocalRetriever(index, store, similarity).search(queries(), 2)
    assert_helps(caught, f"{ROWS - 1}")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_keys_that_are_no_numbers_are_found(store: Datastore, bad: float) -> None:
    """Among the neighbours, whose keys are read anyway; and in what an index says of them."""
    assert store.keys is not None
    index = Names(searcher(store), [0, 7, 5])
    keys = np.array(store.keys)
    keys[7, 3] = bad
    broken = replace(store, keys=keys)
    for similarity in ("l2", "dot"):
        with pytest.raises(DatastoreError, match="NaN or infinite") as caught:
            LocalRetriever(index, broken, similarity).search(queries(), 3)
        assert_helps(caught, "verify")
    index.distance = bad
    with pytest.raises(DatastoreError, match="distances that are no numbers"):
        LocalRetriever(index, store, "do_not_recomp_l2").search(queries(), 3)


def test_queries_that_are_no_numbers_are_refused(store: Datastore) -> None:
    """They would find nothing, and leave the language model alone without a word."""
    asked = queries()
    asked[3, 2] = torch.nan
    with pytest.raises(ModelError, match="NaN or infinite"):
        LocalRetriever(searcher(store), store, "l2").search(asked, 3)


@pytest.mark.parametrize("bad", [50, 40_000, 65_535])
def test_values_beyond_the_vocabulary_are_found(store: Datastore, bad: int) -> None:
    values = np.array(store.values)
    values[7] = bad
    index = Names(searcher(store), [0, 7, 5])
    with pytest.raises(DatastoreError, match="no tokens of the dictionary") as caught:
        LocalRetriever(index, replace(store, values=values), "l2").search(queries(), 3)
    assert_helps(caught, f"{bad:,}")


@pytest.mark.parametrize("name", ["keys.npy", "values.npy"])
def test_a_file_that_shrinks_is_told_before_it_is_read(store: Datastore, name: str) -> None:
    """Reading a map behind the end of its file would kill the process."""
    retriever = LocalRetriever(searcher(store), store, "l2")
    assert retriever.search(queries(), K).valid.all()
    os.truncate(store.path / name, 200)
    with pytest.raises(DatastoreError, match="cut off while they were read") as caught:
        retriever.search(queries(), K)
    assert_helps(caught, "200")


def test_keys_that_opening_left_unread_are_checked_while_they_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every chunk in turn is damaged; the sample on opening sees but a few of them."""
    monkeypatch.setattr("fairseq_knnlm.files.integrity.CHUNK_BYTES", 1000)
    monkeypatch.setattr("fairseq_knnlm.files.integrity.CHUNKS_ON_OPEN", 3)
    path = write_store(tmp_path / "store", *random_entries(ROWS, WIDTH)).path
    whole = (path / "keys.npy").read_bytes()
    chunks = -(-len(whole) // 1000)
    assert chunks == 15
    unseen = 0
    for chunk in range(chunks):
        damaged = bytearray(whole)
        damaged[1000 * chunk + 300] ^= 1
        (path / "keys.npy").write_bytes(damaged)
        try:
            store = open_datastore(path)
        except DatastoreError:
            continue
        unseen += 1
        retriever = LocalRetriever(searcher(store), store, "l2")
        with pytest.raises(DatastoreError, match="is damaged") as caught:
            retriever.check_files()
        assert_helps(caught, "keys.npy", "checksums differ")
        with pytest.raises(DatastoreError, match="is damaged"):
            retriever.search(queries(), 3)
        LocalRetriever(searcher(store), store, "do_not_recomp_l2").check_files()
    assert unseen == chunks - 3
    (path / "keys.npy").write_bytes(whole)
    store = open_datastore(path)
    assert LocalRetriever(searcher(store), store, "l2").check_files() == chunks - 3
