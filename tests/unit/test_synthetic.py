"""Of `make bench-scale`: keys that can be made again, and their neighbours by brute force."""

from __future__ import annotations

import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from synthetic import PART, PARTS, Mixture
from truth import Truth

ROWS, WIDTH = 3 * PART + 100, 32


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    return Mixture(WIDTH, 5, 2)


def test_keys_are_the_same_whenever_they_are_made(mixture: Mixture) -> None:
    keys, rows = mixture.keys(0, ROWS)
    assert keys.shape == (ROWS, WIDTH)
    assert np.array_equal(rows, np.arange(ROWS))
    other, places = Mixture(WIDTH, 5, 1).keys(2 * PART, 200)
    assert np.array_equal(other, keys[places])
    sample, at = mixture.sample(ROWS, 2 * PART)
    assert np.array_equal(sample, keys[at])
    chunks = list(mixture.chunks(range(PART, ROWS)))
    assert np.array_equal(np.concatenate([part for part, _ in chunks]), keys[PART:])
    assert max(len(part) for part, _ in chunks) <= PART * PARTS


def test_numbers_have_as_many_bits_as_float16(mixture: Mixture) -> None:
    keys, _ = mixture.keys(0, PART)
    assert np.array_equal(keys[abs(keys) > 1e-4], keys[abs(keys) > 1e-4].astype("f2").astype("f4"))
    assert 0.7 < keys.var() < 1.3


def test_other_seeds_and_queries_are_others(mixture: Mixture) -> None:
    keys, _ = mixture.keys(0, PART)
    assert not np.array_equal(Mixture(WIDTH, 6, 1).keys(0, PART)[0], keys)
    assert not set(map(bytes, mixture.queries(50))) & set(map(bytes, keys))


@pytest.mark.parametrize("at_a_time", [7, 1000, ROWS])
def test_true_neighbours_are_those_of_faiss(mixture: Mixture, at_a_time: int) -> None:
    keys, rows = mixture.keys(0, ROWS)
    queries = mixture.queries(20)
    truth = Truth(queries, 15)
    for start in range(0, ROWS if at_a_time > 7 else 700, at_a_time):
        truth.see(keys[start : start + at_a_time], rows[start : start + at_a_time])
    seen = keys if at_a_time > 7 else keys[:700]
    _, expected = faiss.knn(queries, seen, 15)
    assert truth.recall(expected) == 1
    assert truth.recall(expected[:, :6]) == pytest.approx(6 / 15)


def test_what_was_found_among_parts_is_kept_and_put_together(
    mixture: Mixture, tmp_path: Path
) -> None:
    keys, rows = mixture.keys(0, ROWS)
    queries = mixture.queries(20)
    whole = Truth(queries, 15)
    for start, stop in ((0, 5), (5, PART), (PART, ROWS)):  # one has fewer than are asked for
        part = Truth(queries, 15)
        part.see(keys[start:stop], rows[start:stop])
        part.save(tmp_path / f"{start}.npz")
        whole.add(tmp_path / f"{start}.npz")
    _, expected = faiss.knn(queries, keys, 15)
    assert whole.recall(expected) == 1
