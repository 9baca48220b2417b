"""Which batches are a share's, and what results of shares come to: by hand and by fractions."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from fairseq_knnlm.calibration.sections import borders
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.runs.sums import ExactSum, added
from fairseq_knnlm.tasks.loading import check_looks_back
from fairseq_knnlm.tasks.shares import batches_before


@pytest.mark.parametrize(
    ("tokens", "of", "expected"),
    [
        ([64] * 6, 2, [0, 3, 6]),
        ([64] * 6, 4, [0, 1, 3, 4, 6]),
        ([64] * 6, 6, [0, 1, 2, 3, 4, 5, 6]),
        ([10, 10, 10, 70], 2, [0, 3, 4]),
        ([70, 10, 10, 10], 3, [0, 1, 2, 4]),
        ([1, 1, 1, 1000], 4, [0, 1, 2, 3, 4]),
        ([1000, 1, 1, 1], 4, [0, 1, 2, 3, 4]),
        ([5], 1, [0, 1]),
    ],
)
def test_borders_by_hand(tokens: list[int], of: int, expected: list[int]) -> None:
    assert borders(np.array(tokens), of).tolist() == expected


def test_shares_are_as_near_to_equal_as_batches_allow() -> None:
    """Each border is the nearest to its part of the text, and no share is empty."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        tokens = rng.integers(1, 1000, rng.integers(1, 40))
        of = int(rng.integers(1, len(tokens) + 1))
        found = borders(tokens, of).tolist()
        assert found[0] == 0 and found[-1] == len(tokens) and len(found) == of + 1
        assert all(start < stop for start, stop in itertools.pairwise(found))
        if of <= len(tokens) // 10:
            shares = [int(tokens[a:b].sum()) for a, b in itertools.pairwise(found)]
            assert max(shares) - tokens.sum() / of <= tokens.max()


@pytest.mark.parametrize(
    ("looks_back", "expected"), [(0, 0), (1, 1), (10, 1), (11, 2), (30, 2), (31, 3), (999, 3)]
)
def test_batches_before_by_hand(looks_back: int, expected: int) -> None:
    assert batches_before(np.array([5, 20, 10]), looks_back) == expected


def test_there_is_nothing_before_the_first_share() -> None:
    assert batches_before(np.array([], dtype=np.int64), 100) == 0


def test_all_text_cannot_be_read_before_each_share() -> None:
    assert check_looks_back(5) == 5
    with pytest.raises(ConfigError, match="goes by all text before a token"):
        check_looks_back(None)


def numbers(count: int, seed: int) -> np.ndarray:
    """Log-probabilities, among them the largest and smallest float32."""
    rng = np.random.default_rng(seed)
    some = -np.exp(rng.normal(0, 12, count)).astype(np.float32)
    ends = np.array([0, -0.0, -1e-45, -1.1754944e-38, -3.4028235e38], np.float32)
    return rng.permutation(np.concatenate([some, ends]))


@pytest.mark.parametrize("groups", [1, 2, 7, 400])
def test_sums_are_exact_whatever_their_groups(groups: int) -> None:
    terms = numbers(1000, 3)
    exact = sum(map(Fraction, terms.tolist()))
    shares = []
    for some in np.array_split(terms, groups):
        share = ExactSum()
        for few in np.array_split(some, 3):
            share.add(few)
        assert share.parts is not None
        assert sum(map(Fraction, share.parts)) == sum(map(Fraction, some.tolist()))
        assert share.value == float(sum(map(Fraction, some.tolist())))
        shares.append(share.parts)
    assert added(shares) == float(exact)


def test_what_has_no_probability_has_no_sum() -> None:
    share = ExactSum()
    share.add(np.array([-1.5, -np.inf], np.float32))
    share.add(np.array([-2.5], np.float32))
    assert share.parts is None
    assert share.value == -math.inf
    assert added([[-1.0], None]) == -math.inf


def test_a_sum_of_nothing() -> None:
    assert (ExactSum().value, ExactSum().parts, added([[], []])) == (0.0, [], 0.0)
