"""The neighbours' opinion of a batch, and what it leaves in the score table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from stores import build_index, random_entries, write_store

from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.experts import TEMPERATURES, KnnExpert, Opinion
from fairseq_knnlm.index import SearchIndex
from fairseq_knnlm.lm import Scored
from fairseq_knnlm.neighbours import Retriever

ROWS, WIDTH, TOKENS, T = 300, 12, 40, 9.0


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    return write_store(tmp_path / "store", *random_entries(ROWS, WIDTH, 5), vocabulary=5)


def asked() -> Scored:
    rng = torch.manual_seed(4)
    keys = torch.randn(TOKENS, WIDTH, generator=rng)
    targets = torch.randint(5, (TOKENS,), generator=rng)
    return Scored(targets, keys, keys, torch.ones(1, TOKENS, dtype=torch.bool))


def opinion(store: Datastore, k: int, recipe: str = "Flat", *, for_table: bool = True) -> Opinion:
    assert store.keys is not None
    index, card = build_index(store.keys, recipe, nprobe=1)
    retriever = Retriever(SearchIndex(index, card), store, "l2")
    return KnnExpert(retriever, k, T, for_table=for_table).opinion(asked())


def plain(store: Datastore, k: int, temperature: float) -> tuple[np.ndarray, ...]:
    """log p_kNN, sorted distances and matches, by brute force in float64."""
    assert store.keys is not None
    question = asked()
    keys = question.keys.double().numpy()
    distances = ((keys[:, None] - store.keys[None].astype(np.float64)) ** 2).sum(axis=2)
    nearest = np.argsort(distances, axis=1)[:, :k]
    near = np.take_along_axis(distances, nearest, axis=1)
    matches = store.values[nearest] == question.targets.numpy()[:, None]
    weights = np.exp(-near / temperature)
    with np.errstate(divide="ignore"):
        log_probs = np.log((weights * matches).sum(axis=1) / weights.sum(axis=1))
    return log_probs, near, matches.sum(axis=1)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_the_opinion_is_brute_force(store: Datastore, k: int) -> None:
    found = opinion(store, k)
    log_probs, near, matches = plain(store, k, T)
    np.testing.assert_allclose(found.log_probs.numpy(), log_probs, atol=1e-5)
    assert found.available.all()
    assert found.columns["matches"].tolist() == matches.tolist()
    ranks = [rank - 1 for rank in (1, 2, 4, 8, 16) if rank <= k]
    np.testing.assert_allclose(found.columns["distances"].numpy(), near[:, ranks], rtol=1e-5)


def test_the_table_holds_every_temperature(store: Datastore) -> None:
    columns = opinion(store, 20).columns["knn_by_temperature"].numpy()
    assert columns.shape == (TOKENS, len(TEMPERATURES))
    expected = np.stack([plain(store, 20, t)[0] for t in TEMPERATURES], axis=1)
    np.testing.assert_allclose(columns, expected, atol=1e-4)


def test_few_queries_at_a_time_are_as_good(
    store: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = opinion(store, 20)
    monkeypatch.setattr("fairseq_knnlm.experts.QUERIES_AT_A_TIME", 7)
    apart = opinion(store, 20)
    torch.testing.assert_close(apart.log_probs, together.log_probs)
    assert torch.equal(apart.available, together.available)
    assert set(apart.columns) == set(together.columns)
    for name, column in apart.columns.items():
        torch.testing.assert_close(column, together.columns[name])


def test_without_a_table_there_are_no_columns(store: Datastore) -> None:
    silent, talking = opinion(store, 5, for_table=False), opinion(store, 5)
    assert silent.columns == {}
    assert torch.equal(silent.log_probs, talking.log_probs)


def test_missing_neighbours_do_not_match(store: Datastore) -> None:
    """One list of about ten entries: at most that many can agree."""
    found = opinion(store, 100, "IVF32,Flat")
    assert found.available.all()
    assert found.columns["matches"].max() < 30
    expected = opinion(store, 100, "IVF32,Flat", for_table=False)
    assert torch.equal(found.log_probs, expected.log_probs)


def test_distances_of_missing_neighbours_stay_out_of_the_table(tmp_path: Path) -> None:
    """IVF finds about ten of 100; the rest were given their distance to row 0."""
    keys, values = random_entries(300, 12)
    store = write_store(tmp_path / "store", keys, values)
    index, card = build_index(keys, "IVF32,Flat", nprobe=1)
    asked = torch.from_numpy(keys[:20] + 0.1)
    retriever = Retriever(SearchIndex(index, card), store, "l2")
    near = retriever.search(asked, 100)
    targets = torch.zeros(20, dtype=torch.long)
    scored = Scored(targets, asked, asked, torch.ones(1, 20, dtype=torch.bool))
    columns = KnnExpert(retriever, 100, 1.0, for_table=True).opinion(scored).columns
    found = columns["distances"]  # at ranks 1, 2, 4, 8, 16, 32, 64
    true = near.distances.masked_fill(~near.valid, torch.inf).sort(dim=1).values
    torch.testing.assert_close(found, true[:, [0, 1, 3, 7, 15, 31, 63]])
