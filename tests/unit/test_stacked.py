"""Several arrays that read as one: the oracle is NumPy's concatenation of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fairseq_knnlm.datastore import Stacked
from fairseq_knnlm.index.distances import StackedKeys, distances_to_rows

LENGTHS = ([5], [3, 4], [1, 1, 1], [4, 7, 2, 9])


def parts(lengths: list[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(len(lengths))
    return [rng.normal(size=(length, 3)).astype(np.float16) for length in lengths]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_every_slice_is_that_of_the_whole(lengths: list[int]) -> None:
    stacked, whole = Stacked(parts(lengths)), np.concatenate(parts(lengths))
    edges = [None, *range(-len(whole) - 1, len(whole) + 2)]
    for start in edges:
        for stop in edges:
            assert np.array_equal(stacked[start:stop], whole[start:stop])
            assert np.array_equal(stacked[start:stop:2], whole[start:stop:2])
    assert np.array_equal(stacked[::-1], whole[::-1])


@pytest.mark.parametrize("lengths", LENGTHS)
def test_rows_in_any_order(lengths: list[int]) -> None:
    stacked, whole = Stacked(parts(lengths)), np.concatenate(parts(lengths))
    rows = np.random.default_rng(0).integers(len(whole), size=40)
    assert np.array_equal(stacked[rows], whole[rows])
    assert np.array_equal(stacked[list(rows)], whole[rows])
    assert np.array_equal(stacked[rows[:0]], whole[rows[:0]])
    assert np.array_equal(stacked[len(whole) - 1], whole[-1])
    for row in (-1, len(whole)):
        with pytest.raises(IndexError):
            stacked[np.array([row])]


def test_it_says_what_the_whole_is() -> None:
    stacked, whole = Stacked(parts([4, 7])), np.concatenate(parts([4, 7]))
    assert len(stacked) == 11
    assert (stacked.shape, stacked.dtype, stacked.ndim) == (whole.shape, whole.dtype, whole.ndim)
    assert stacked.nbytes == whole.nbytes
    assert np.array_equal(np.array(stacked), whole)
    assert np.asarray(stacked, np.float32).dtype == np.float32


def test_a_slice_within_a_part_is_no_copy() -> None:
    one, two = parts([4, 7])
    assert np.shares_memory(Stacked([one, two])[5:9], two)


@pytest.mark.parametrize("similarity", ["l2", "dot"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_distances_are_those_of_the_whole(lengths: list[int], similarity: str) -> None:
    keys = [torch.from_numpy(part) for part in parts(lengths)]
    rng = np.random.default_rng(1)
    rows = torch.from_numpy(rng.integers(sum(lengths), size=(6, 4)))
    queries = torch.from_numpy(rng.normal(size=(6, 3)).astype(np.float32))
    found = distances_to_rows(StackedKeys(keys), queries, rows, similarity)
    assert torch.equal(found, distances_to_rows(torch.cat(keys), queries, rows, similarity))
