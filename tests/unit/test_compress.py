"""Smaller datastores: merging against plain Python, PCA against NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from stores import assert_helps, brute_force, build_index, clustered, knn_log_probs, write_store

from fairseq_knnlm.datastore import Datastore, open_datastore
from fairseq_knnlm.errors import ConfigError, DatastoreError, IndexFileError, KnnlmError
from fairseq_knnlm.index.search import SearchIndex
from fairseq_knnlm.index.storage import load as load_index
from fairseq_knnlm.index.storage import save as save_index
from fairseq_knnlm.retrieval.local import LocalRetriever
from fairseq_knnlm.runs import compress as module
from fairseq_knnlm.runs.compress import alike_neighbours, compress, fit_pca, greedy_merge

ROWS, WIDTH, K, SEED = 600, 8, 5, 3


def build(store: Datastore, recipe: str = "Flat", **options: object) -> None:
    """The index of a datastore, in its place."""
    index, card = build_index(store.full_keys(), recipe, **options)  # type: ignore[arg-type]
    save_index(index, card, store.index_path, store.fingerprint)


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    """Entries in clusters and three values, so that near ones often agree."""
    values = np.random.default_rng(2).choice(3, size=ROWS, p=[0.6, 0.3, 0.1])
    store = write_store(tmp_path / "store", clustered(ROWS, WIDTH), values)
    build(store)
    return store


def search_index(store: Datastore) -> SearchIndex:
    shape = {"rows": len(store), "width": store.manifest.width}
    return load_index(store.index_path, datastore=store.fingerprint, **shape)


def plain_merge(store: Datastore, order: list[int], k: int) -> dict[int, int]:
    """He et al.'s greedy merging word for word, over neighbours by brute force."""
    assert store.keys is not None
    _, nearest = brute_force(store.keys, store.keys, k + 1, "l2")
    values = store.values.tolist()
    weights = dict.fromkeys(range(len(store)), 1)
    for entry in order:
        if entry in weights:
            for other in nearest[entry, 1:].tolist():
                if weights.get(other) == 1 and values[other] == values[entry]:
                    weights[entry] += weights.pop(other)
    return weights


def visits(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The orders in which entries are visited from now on."""
    seen: list[np.ndarray] = []

    def spy(alike: np.ndarray, order: np.ndarray, weights: np.ndarray) -> None:
        seen.append(order)
        greedy_merge(alike, order, weights)

    monkeypatch.setattr(module, "greedy_merge", spy)
    return seen


@pytest.mark.parametrize("rows_at_a_time", [7, 16_384])
@pytest.mark.parametrize("k", [1, K, 40])
def test_merging_is_plain_python(
    store: Datastore, tmp_path: Path, k: int, rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also entries that are not visited: anywhere in the order they change nothing."""
    monkeypatch.setattr(module, "ROWS_AT_A_TIME", rows_at_a_time)
    seen = visits(monkeypatch)
    smaller = open_datastore(compress(store, tmp_path / "out", merge=k, seed=SEED))
    (order,) = (visited.tolist() for visited in seen)
    expected = plain_merge(store, sorted(set(range(ROWS)) - set(order)) + order, k)
    survivors = sorted(expected)
    assert ROWS / (k + 1) <= len(survivors) < ROWS
    assert len(order) < ROWS
    assert smaller.weights is not None
    assert smaller.weights.tolist() == [expected[row] for row in survivors]
    assert smaller.weights.sum() == ROWS
    assert np.array_equal(smaller.keys, store.full_keys()[survivors])
    assert np.array_equal(smaller.values, store.values[survivors])
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_the_order_is_random_and_the_seeds(
    store: Datastore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = visits(monkeypatch)
    made = [compress(store, tmp_path / str(n), merge=K, seed=s) for n, s in enumerate([1, 1, 2])]
    assert np.array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[0], seen[2])
    assert np.array_equal(np.sort(seen[0]), np.sort(seen[2]))
    assert not np.array_equal(seen[0], np.sort(seen[0]))
    first, same, other = (open_datastore(path).fingerprint for path in made)
    assert first == same != other


class Answers:
    """An index that finds what it is told to."""

    def __init__(self, *ids: list[int]) -> None:
        self.ids = torch.tensor(ids)

    def search(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.ids.shape == (len(queries), k)
        return torch.zeros(self.ids.shape), self.ids


def test_an_entry_is_no_neighbour_of_its_own(tmp_path: Path) -> None:
    """Found or not, first or not; where it is not found, one neighbour is too many."""
    keys, values = np.zeros((6, 2), np.float32), np.array([7, 7, 7, 7, 8, 7])
    store = write_store(tmp_path / "store", keys, values)
    index = Answers([1, 0, 2], [0, 2, 3], [2, 4, 5], [-1, -1, -1])
    alike = alike_neighbours(store, index, 2, slice(0, 4))  # type: ignore[arg-type]
    assert alike.tolist() == [[1, -1, 2], [0, 2, -1], [-1, -1, 5], [-1, -1, -1]]


def test_an_approximate_index_merges_what_it_finds(tmp_path: Path) -> None:
    keys = clustered(3000)
    values = np.random.default_rng(0).integers(2, size=3000)
    store = write_store(tmp_path / "store", keys, values)
    build(store, "IVF16,PQ4x4fsr", nprobe=4)
    smaller = open_datastore(compress(store, tmp_path / "out", merge=K))
    assert smaller.weights is not None
    assert smaller.weights.sum() == 3000
    assert 1 <= smaller.weights.min() < smaller.weights.max() <= K + 1


def test_pca_of_full_width_turns_the_keys(store: Datastore, tmp_path: Path) -> None:
    smaller = open_datastore(compress(store, tmp_path / "out", pca=WIDTH))
    assert smaller.projection is not None
    assert smaller.weights is None
    before, _ = brute_force(store.full_keys(), store.full_keys()[:50], ROWS, "l2")
    after, _ = brute_force(smaller.full_keys(), smaller.full_keys()[:50], ROWS, "l2")
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-8)
    assert np.abs(smaller.projection).max() < 0.95  # not just another order of the columns


@pytest.mark.parametrize("rows_at_a_time", [7, 16_384])
def test_pca_is_numpys_eigh(
    tmp_path: Path, rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On keys far from the origin, whose mean is not among the components."""
    monkeypatch.setattr(module, "ROWS_AT_A_TIME", rows_at_a_time)
    keys = clustered(ROWS, WIDTH) * np.linspace(1, 3, WIDTH, dtype="f4") + np.float32(50)
    keys = np.ascontiguousarray(keys)
    store = write_store(tmp_path / "store", keys, np.zeros(ROWS, int))
    smaller = open_datastore(compress(store, tmp_path / "out", pca=3))
    assert smaller.projection is not None
    assert smaller.projection.dtype == np.float32
    _, directions = np.linalg.eigh(np.cov(keys.astype(np.float64), rowvar=False))
    expected, _ = brute_force(keys @ directions[:, -3:], keys[:50] @ directions[:, -3:], ROWS, "l2")
    found, _ = brute_force(smaller.full_keys(), keys[:50] @ smaller.projection, ROWS, "l2")
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert (smaller.manifest.width, smaller.manifest.query_width) == (3, WIDTH)


def test_a_sample_decides_nearly_the_same_components(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variance that is kept, in float64."""
    keys = clustered(4000, WIDTH) * np.linspace(1, 3, WIDTH, dtype="f4")
    best = np.linalg.eigvalsh(np.cov(keys, rowvar=False))[-3:].sum()
    kept = np.var(keys @ fit_pca(keys, 3, seed=0), axis=0).sum()
    monkeypatch.setattr(module, "PCA_ROWS", 500)
    sampled = fit_pca(keys, 3, seed=0)
    assert best * 0.98 < np.var(keys @ sampled, axis=0).sum() < kept <= best * 1.001
    assert not np.array_equal(sampled, fit_pca(keys, 3, seed=1))
    np.testing.assert_allclose(sampled.T @ sampled, np.eye(3), atol=1e-6)


def test_compressed_again(store: Datastore, tmp_path: Path) -> None:
    """PCA, then merging in the projected space, then both once more."""
    first = open_datastore(compress(store, tmp_path / "first", pca=6))
    build(first)
    second = open_datastore(compress(first, tmp_path / "second", merge=2))
    build(second, "IVF4,Flat", nprobe=4)
    third = open_datastore(compress(second, tmp_path / "third", pca=4, merge=2))
    assert np.array_equal(first.projection, second.projection)
    assert third.projection is not None
    assert third.projection.shape == (WIDTH, 4)
    assert third.manifest.query_width == WIDTH
    assert third.weights is not None and second.weights is not None
    assert second.weights.sum() == third.weights.sum() == ROWS
    assert len(third) < len(second) < len(first)
    steps = [(step.datastore, step.width, step.pca) for step in third.manifest.compressions]
    assert steps == [
        (store.fingerprint, WIDTH, 6),
        (first.fingerprint, 6, None),
        (second.fingerprint, 6, 4),
    ]
    # A key of the third is a key of the first datastore, projected.
    projected = store.full_keys() @ third.projection
    distances, _ = brute_force(projected, third.full_keys(), 1, "l2")
    assert distances.max() < 1e-8


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_keys_keep_their_type_and_origin(tmp_path: Path, dtype: str) -> None:
    store = write_store(tmp_path / "store", clustered(50), np.zeros(50, int), dtype=dtype)
    smaller = open_datastore(compress(store, tmp_path / "out", pca=3))
    assert smaller.manifest.key_dtype == dtype
    assert smaller.manifest.origin == store.manifest.origin
    step = smaller.manifest.compressions[0]
    assert step.describe() == "from 50 entries of width 8 by --pca 3 --seed 0"
    assert not smaller.manifest.merged


def test_merged_entries_are_as_good_as_repeated_ones(tmp_path: Path) -> None:
    """Where entries merged lie at the same key, every neighbour found says the same."""
    rng = np.random.default_rng(5)
    distinct = rng.normal(size=(40, WIDTH)).astype(np.float32)
    owner = np.repeat(np.arange(40), 4)
    store = write_store(tmp_path / "store", distinct[owner], owner % 7)
    build(store)
    smaller = open_datastore(compress(store, tmp_path / "out", merge=3))
    build(smaller)
    assert smaller.weights is not None
    assert smaller.weights.tolist() == [4] * 40
    asked = torch.from_numpy(rng.normal(size=(20, WIDTH)).astype(np.float32))
    everyone, few = (
        LocalRetriever(search_index(s), s, "l2").search(asked, len(s)) for s in (store, smaller)
    )
    assert everyone.log_weights is None
    assert few.log_weights is not None
    for token in range(7):
        found, expected = (
            knn_log_probs(n.distances, n.values == token, n.valid, [0.5, 4.0], n.log_weights)
            for n in (few, everyone)
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


BAD: dict[str, tuple[type[KnnlmError], dict[str, object], str]] = {
    "nothing to do": (ConfigError, {}, "--pca P"),
    "no dimension": (ConfigError, {"pca": 0}, "1 to 8"),
    "more dimensions than there are": (ConfigError, {"pca": WIDTH + 1}, "1 to 8"),
    "no neighbour": (ConfigError, {"merge": 0}, "1 to 599"),
    "more neighbours than there are": (ConfigError, {"merge": ROWS}, "1 to 599"),
    "no such index": (IndexFileError, {"merge": 1, "index": Path("none")}, "build-index"),
}


def test_more_dimensions_than_keys(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", clustered(5, WIDTH), np.zeros(5, int))
    with pytest.raises(ConfigError, match="--pca") as caught:
        compress(store, tmp_path / "out", pca=6)
    assert "1 to 5, the number of the keys" in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert open_datastore(compress(store, tmp_path / "out", pca=5)).manifest.width == 5


def test_keys_that_are_no_numbers_have_no_components() -> None:
    keys = clustered(50)
    keys[30, 2] = np.nan
    with pytest.raises(DatastoreError, match="no numbers") as caught:
        fit_pca(keys, 3, seed=0)
    assert_helps(caught, "fairseq-knnlm verify")


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input(store: Datastore, tmp_path: Path, case: str) -> None:
    kind, flags, says = BAD[case]
    with pytest.raises(kind) as caught:
        compress(store, tmp_path / "out", **flags)  # type: ignore[arg-type]
    message = str(caught.value)
    assert says in message
    assert "expected:" in message
    assert "found:" in message
    assert [file.name for file in tmp_path.iterdir()] == ["store"]


def test_merging_needs_the_index_of_these_keys(store: Datastore, tmp_path: Path) -> None:
    other = write_store(tmp_path / "other", store.full_keys() + 1, store.values)
    with pytest.raises(IndexFileError, match="another datastore"):
        compress(other, tmp_path / "out", merge=1, index=store.index_path)
    build(store, metric="ip")
    with pytest.raises(IndexFileError, match="compares distances") as caught:
        compress(store, tmp_path / "out", merge=1)
    assert_helps(caught, "--metric ip", "build-index")
    store.index_path.unlink()
    with pytest.raises(IndexFileError, match="looks for neighbours") as caught:
        compress(store, tmp_path / "out", merge=1)
    assert_helps(caught, "fairseq-knnlm build-index --dstore")


def test_nothing_is_written_over(store: Datastore, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(DatastoreError, match="exists already") as caught:
        compress(store, tmp_path / "out", pca=2)
    assert_helps(caught, "a new path")


def test_a_datastore_without_keys(store: Datastore, tmp_path: Path) -> None:
    keyless = open_datastore(store.path, load_keys=False)
    for flags in ({"pca": 2}, {"merge": 2}):
        with pytest.raises(DatastoreError, match="holds no keys") as caught:
            compress(keyless, tmp_path / "out", **flags)
        assert_helps(caught, "with its keys")
    assert not (tmp_path / "out").exists()
