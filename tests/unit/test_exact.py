"""Exact search in torch against FAISS's, on whatever devices there are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stores import brute_force, build_index, random_entries

from fairseq_knnlm.index import exact as module
from fairseq_knnlm.index.exact import ExactSearch
from fairseq_knnlm.index.search import SearchIndex

ROWS, WIDTH, K = 700, 16, 25
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("scores", "queries"), [(1, 1), (7000, 13), (2**27, 1024)])
def test_it_finds_what_faiss_finds(
    device: str,
    metric: str,
    dtype: str,
    scores: int,
    queries: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In any number of blocks."""
    monkeypatch.setattr(module, "SCORES_AT_A_TIME", scores)
    monkeypatch.setattr(module, "QUERIES_AT_A_TIME", queries)
    keys = random_entries(ROWS if scores > 1 else 60, WIDTH)[0].astype(dtype)
    index, card = build_index(keys, "Flat", metric=metric)
    asked = torch.randn(30, WIDTH, generator=torch.manual_seed(0))
    expected, true = SearchIndex(index, card).search(asked, K)
    distances, ids = ExactSearch(keys, card, device).search(asked, K)
    assert torch.equal(ids, true)
    torch.testing.assert_close(distances, expected, rtol=1e-4, atol=1e-4)


def test_fewer_keys_than_asked_for_and_no_queries() -> None:
    keys = random_entries(5, WIDTH)[0]
    _, card = build_index(keys, "Flat")
    search = ExactSearch(keys, card, "cpu")
    distances, ids = search.search(torch.zeros(2, WIDTH), 8)
    assert ids[:, 5:].tolist() == [[-1] * 3] * 2
    assert sorted(ids[0, :5].tolist()) == list(range(5))
    assert torch.isinf(distances[:, 5:]).all()
    assert search.search(torch.zeros(0, WIDTH), 3)[1].shape == (0, 3)


def test_a_key_is_its_own_nearest_neighbour_at_no_distance() -> None:
    keys = 100 + random_entries(50, WIDTH)[0]
    _, card = build_index(keys, "Flat")
    distances, ids = ExactSearch(keys, card, "cpu").search(torch.from_numpy(keys), 1)
    assert ids[:, 0].tolist() == list(range(50))
    assert distances.min() >= 0


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("offset", [0, 100, 1000])
def test_it_is_exact_where_keys_lie_far_from_zero(offset: int, metric: str, dtype: str) -> None:
    """Against float64, where |q|^2 - 2 q.x + |x|^2 in float32 is off by the distances' own size."""
    rng = np.random.default_rng(5)
    keys = (offset + rng.normal(size=(2000, 64))).astype(dtype)
    asked = (offset + rng.normal(size=(20, 64))).astype(np.float32)
    _, card = build_index(keys.astype(np.float32), "Flat", metric=metric)
    expected, true = brute_force(keys, asked, 16, metric)
    distances, ids = ExactSearch(keys, card, "cpu").search(torch.from_numpy(asked), 16)
    # float16 keys at 1,000 lie on a grid, where many distances are the same.
    np.testing.assert_allclose(distances.numpy(), expected, rtol=2e-6)
    if metric == "l2":
        found = ((asked[:, None].astype(float) - keys[ids.numpy()].astype(float)) ** 2).sum(axis=2)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        if dtype == "float32":
            assert np.array_equal(ids.numpy(), true)
