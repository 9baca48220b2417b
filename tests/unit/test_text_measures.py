"""Measures of written texts, against counting by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from experiments import text_measures as measures

from fairseq_knnlm.experts.kneser_ney import NGramModel


def count(tokens: list[int], vocabulary: int, order: int) -> NGramModel:
    return NGramModel.count(np.array(tokens), vocabulary, order, progress=False)


def test_stretches_are_evenly_spread() -> None:
    assert measures.spread(100, 3, 10).tolist() == [0, 33, 66]
    assert measures.spread(25, 10, 10).tolist() == [0, 12]  # no room for more
    assert measures.spread(10, 5, 10).tolist() == [0]
    assert measures.spread(9, 5, 10).tolist() == []


@pytest.mark.parametrize("size", [1, 3, 10])
def test_stretches_never_overlap_or_end_behind_the_text(size: int) -> None:
    for length in range(size, 60):
        for wanted in range(1, 12):
            starts = measures.spread(length, wanted, size).tolist()
            assert len(starts) == min(wanted, length // size)
            assert all(after - before >= size for before, after in pairwise(starts))
            assert starts[-1] + size <= length


def test_distinct_counts_all_texts_together() -> None:
    texts = np.array([[1, 2, 1, 2], [1, 2, 3, 3]])
    assert measures.distinct(texts, 1) == 3 / 8
    assert measures.distinct(texts, 2) == 4 / 6  # 12 21 12, 12 23 33; not across texts


def test_repeated_counts_each_text_by_itself() -> None:
    texts = np.array([[1, 2, 3, 4, 1, 2, 3, 4, 1], [1, 2, 3, 4, 5, 6, 7, 8, 9]])
    # 1234 2341 3412 4123 1234 2341: the last two stood there before.
    assert measures.repeated(texts) == pytest.approx([2 / 6, 0])
    assert measures.repeated(np.full((1, 9), 7)) == pytest.approx([5 / 6])


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ([9, 1, 2, 1, 2, 1, 2], True),
        ([1, 2, 1, 2, 1, 2, 1], True),  # ends within the phrase: 2 1, three times
        ([1, 2, 3, 1, 2, 3, 1, 2, 3], True),
        ([1, 2, 3, 1, 2, 3], False),  # twice only
        ([1, 2, 1, 2, 1, 2, 9], False),  # not at the end
        ([1, 2, 1, 2, 9, 1, 2], False),  # something between
        ([5, 5, 5, 5, 5, 5], True),  # as 5 5, three times
        ([1, 5, 5, 5, 5, 5], False),
        ([1, 2, 3], False),
    ],
)
def test_a_loop_is_a_phrase_of_two_said_three_times_at_the_end(
    text: list[int], loops: bool
) -> None:
    assert measures.ends_in_loop(np.array(text)) == loops
    assert measures.looping(np.array([text, text])).tolist() == [loops, loops]


def test_what_is_copied_stands_in_one_of_the_sources() -> None:
    texts = np.array([[1, 2, 3, 4, 9], [6, 6, 6, 6, 6]])
    sources = [np.array([0, 1, 2, 3, 2], np.uint16), np.array([3, 4, 9], np.int32), np.array([4])]
    # 123 and 349 do; 234 does not, though 2 ends one source and 34 begins another.
    assert measures.copied(texts, sources, 3) == pytest.approx([2 / 3, 0])
    assert measures.copied(texts, [], 3).tolist() == [0, 0]


def test_what_is_echoed_stands_in_the_texts_own_prompt() -> None:
    texts, prompts = np.array([[1, 2, 3, 3], [1, 2, 3, 3]]), np.array([[9, 1, 2], [3, 3, 3]])
    assert measures.echoed(texts, prompts, 2) == pytest.approx([1 / 3, 1 / 3])  # 12; 33
    assert measures.echoed(texts, prompts, 3).tolist() == [0, 0]


def test_shared_grams_are_clipped() -> None:
    """The example of Papineni et al.: "the" seven times against "the cat is on the mat"."""
    the, cat, is_, on, mat = range(5)
    texts, truths = np.array([[the] * 7]), np.array([[the, cat, is_, on, the, mat]])
    assert measures.shared(texts, truths, 1) == pytest.approx([2 / 7])
    assert measures.shared(texts, truths, 2) == pytest.approx([0])
    assert measures.shared(truths, truths, 4) == pytest.approx([1])
    moved = np.array([[mat, the, cat, is_]])
    assert measures.shared(moved, truths, 2) == pytest.approx([2 / 3])


def test_nats_of_single_tokens_by_hand() -> None:
    """Of five tokens 0 came three times (discount 1.5) and 1 twice (1); the 2.5 are shared by 5."""
    model = count([0, 0, 0, 1, 1], vocabulary=5, order=1)
    found = measures.nats(model, np.array([[4], [4]]), np.array([[0, 1], [0, 3]]))
    by_hand = [-(math.log(0.4) + math.log(p)) / 2 for p in (0.3, 0.1)]
    assert found == pytest.approx(by_hand, rel=1e-6)


def test_nats_of_pairs_by_hand() -> None:
    """After 0 came 1 three times: 1.5 of 3 are left for single tokens, which have, each after one
    other token, (1 - 0.5) / 2 and a quarter of the half that is left: 0.375 and for 2 and 3 0.125.
    """
    model = count([0, 1, 0, 1, 0, 1, 0], vocabulary=4, order=2)
    found = measures.nats(model, np.array([[3, 0]]), np.array([[1, 0, 2]]))
    usual, never = 0.5 + 0.5 * 0.375, 0.5 * 0.125
    by_hand = -(math.log(usual) + math.log(usual) + math.log(never)) / 3
    assert found == pytest.approx([by_hand], rel=1e-6)


def test_all_tokens_together_are_certain() -> None:
    """Whatever stands before: known, in part known, or new."""
    tokens = np.random.default_rng(0).integers(0, 6, 200).tolist()
    model = count(tokens, vocabulary=8, order=4)
    every = np.arange(8)[:, None]
    for before in (tokens[:3], [7, *tokens[4:6]], [7, 7, 7]):
        found = measures.nats(model, np.array([before] * 8), every)
        assert np.exp(-found).sum() == pytest.approx(1, rel=1e-5)


def test_a_mean_and_its_error() -> None:
    value, error = measures.mean(np.array([1.0, 2.0, 3.0, 4.0]))
    assert value == 2.5
    assert error == pytest.approx(1.96 * math.sqrt(5 / 3 / 4))  # variance 5/3, of four
    assert measures.mean(np.array([3.0])) == (3.0, 0.0)
