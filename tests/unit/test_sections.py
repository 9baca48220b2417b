"""Sections of a text and standard errors over them: by leaving out, by simulation, by fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from fairseq_knnlm.calibration.sections import SECTIONS, Sections, standard_error
from fairseq_knnlm.calibration.share import SectionParts
from fairseq_knnlm.files import typed
from fairseq_knnlm.runs.results import losses
from fairseq_knnlm.runs.sections import SectionSums, joined, section_rows


def jackknife(sums: np.ndarray, tokens: np.ndarray) -> float:
    """The block jackknife: the mean without each section in turn, and how far these spread."""
    size = len(sums)
    left = [(sums.sum() - s) / (tokens.sum() - n) for s, n in zip(sums, tokens, strict=True)]
    spread = np.array(left) - np.mean(left)
    return math.sqrt((size - 1) / size * float(spread @ spread)) / math.log(2)


def test_of_equal_sections_it_is_the_jackknife() -> None:
    rng = np.random.default_rng(0)
    for size in (2, 5, 64):
        sums, tokens = rng.normal(-4000, 60, size), np.full(size, 1000)
        assert standard_error(sums, tokens) == pytest.approx(jackknife(sums, tokens), rel=1e-9)


def test_of_sections_of_several_lengths_it_is_nearly_the_jackknife() -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(900, 1100, 64)
    sums = tokens * rng.normal(-4, 0.1, 64)
    assert standard_error(sums, tokens) == pytest.approx(jackknife(sums, tokens), rel=0.02)


def test_by_hand() -> None:
    """Two sections of 10 tokens, 2 and 4 bits each: a mean of 3, give or take 1."""
    sums = np.array([-20, -40]) * math.log(2)
    assert standard_error(sums, np.array([10, 10])) == pytest.approx(1.0)


def test_tokens_that_depend_on_each_other_count_for_less() -> None:
    """Each token 0.9 of the one before: the mean of N varies as that of N / 19 (known of AR(1))."""
    rng, remembered, size = np.random.default_rng(2), 0.9, 200_000
    noise = rng.normal(size=size)
    losses_ = np.empty(size)
    losses_[0] = 0
    for place in range(1, size):
        losses_[place] = remembered * losses_[place - 1] + noise[place]
    found = Sections.of_tokens(-5 - losses_, -5 - losses_).error
    true = 1 / (1 - remembered) / math.sqrt(size) / math.log(2)
    assert found == pytest.approx(true, rel=0.3)
    alone = losses_.std() / math.sqrt(size) / math.log(2)
    assert found > 3 * alone


def test_a_gain_is_surer_than_the_losses_it_is_of() -> None:
    rng = np.random.default_rng(3)
    base = rng.normal(-5, 2, 10_000)
    sections = Sections.of_tokens(base, base + 0.1)
    assert sections.error == pytest.approx(sections.base_error, rel=1e-9)
    assert sections.gain_error == pytest.approx(0, abs=1e-12)


def test_what_has_no_error() -> None:
    one = Sections(np.array([5, 0]), np.array([-9.0, 0.0]), np.array([-np.inf, 0.0]))
    assert (one.base_error, one.error, one.gain_error) == (None, None, None)
    two = Sections(np.array([5, 5]), np.array([-9.0, -8.0]), np.array([-np.inf, -1.0]))
    assert two.base_error is not None and two.error is None and two.gain_error is None


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 1000])
def test_sections_of_tokens_hold_all_of_them(length: int) -> None:
    log_probs = -np.random.default_rng(4).random(length)
    found = Sections.of_tokens(log_probs, 2 * log_probs)
    assert len(found.tokens) == min(length, SECTIONS)
    assert found.tokens.sum() == length
    assert found.tokens.max() - found.tokens.min() <= 1
    assert found.base.sum() == pytest.approx(log_probs.sum())
    assert found.mixed[0] == pytest.approx(2 * log_probs[: found.tokens[0]].sum())


def test_sections_begin_with_blocks() -> None:
    assert section_rows(np.array([8, 8, 3])).tolist() == [0, 8, 16, 19]
    rows = section_rows(np.full(1000, 8))
    assert len(rows) == SECTIONS + 1
    assert (rows % 8 == 0).all()
    assert set(np.diff(rows).tolist()) == {15 * 8, 16 * 8}


def test_sums_of_shares_join_to_the_last_digit() -> None:
    """Whichever batches come in whichever order to whichever share."""
    rng = np.random.default_rng(5)
    edges = section_rows(np.full(10, 7))
    base, mixed = (-rng.exponential(5, 70).astype(np.float32) for _ in range(2))
    whole, shares = SectionSums(edges), [SectionSums(edges) for _ in range(3)]
    whole.take(np.arange(70), base, mixed)
    for number, some in enumerate(np.array_split(rng.permutation(70), 9)):
        shares[number % 3].take(some, base[some], mixed[some])
    found = joined([typed(share.parts, SectionParts) for share in shares])
    assert found.tokens.tolist() == [7] * 10
    for section in range(10):
        here = slice(7 * section, 7 * section + 7)
        assert found.base[section] == float(sum(map(Fraction, base[here].tolist())))
        assert found.mixed[section] == whole.sections.mixed[section]


def test_results_have_the_errors_of_their_sections() -> None:
    sections = Sections(np.array([10, 10]), *(np.array([-20, -40]) * x for x in (1.0, 0.5)))
    found = losses(tokens=20, base_log_prob=-60, log_prob=-30, seconds=1, sections=sections)
    assert found["gain"] == pytest.approx(1.5 / math.log(2))
    assert found["base_loss_error"] == pytest.approx(1 / math.log(2))
    assert found["loss_error"] == found["gain_error"] == pytest.approx(0.5 / math.log(2))


def test_sections_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="sections of"):
        typed({"tokens": [1], "base_log_prob": [], "log_prob": []}, SectionParts)
