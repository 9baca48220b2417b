"""The text read so far, against sums written out word by word."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fairseq_knnlm.calibration.past import ADDED, LATELY, MOST, past_features
from fairseq_knnlm.calibration.settings import check_setting
from fairseq_knnlm.experts.history import (
    FEATURE_HALF_LIVES,
    HALF_LIVES,
    SUFFIXES,
    faded_sums,
    history,
    preceding,
)


def text(length: int = 300, types: int = 6, seed: int = 0) -> np.ndarray:
    """Few types, so that the same few words often come again."""
    return np.random.default_rng(seed).integers(0, types, length)


def weight_of(
    tokens: list[int], place: int, suffix: int, half_life: float, word: int | None
) -> float:
    """The sum over earlier places after the same words, of those that hold a word or of all."""
    before = tokens[place - suffix : place]
    total = 0.0
    for earlier in range(suffix, place):
        if tokens[earlier - suffix : earlier] == before and word in (None, tokens[earlier]):
            total += 2 ** (-(place - earlier) / half_life)
    return total


def test_by_hand() -> None:
    """At the end of a b a c a b, b has stood after a 4 places before, and c 2 places before."""
    tokens = np.array([0, 1, 0, 2, 0, 1])
    found = history(tokens)
    column = found.settings.index({"suffix": 1, "half_life": 30.0})
    b, c = 2 ** (-4 / 30), 2 ** (-2 / 30)
    assert found.log_probs[5, column] == pytest.approx(math.log(b / (b + c)), abs=1e-6)
    assert np.isneginf(found.log_probs[3, column])  # only b had followed a
    assert np.isnan(found.log_probs[0]).all()  # nothing was read
    assert np.isnan(found.log_probs[1, column])  # nothing had followed a


def test_every_column_is_the_sum_written_out() -> None:
    tokens = text()
    found = history(tokens)
    listed = tokens.tolist()
    for place in (0, 1, 2, 5, 17, 120, 299):
        for column, setting in enumerate(found.settings):
            suffix, half_life = setting["suffix"], setting["half_life"]
            every, same = (
                weight_of(listed, place, suffix, half_life, word) if place >= suffix else 0.0
                for word in (None, listed[place])
            )
            got = found.log_probs[place, column]
            if not every:
                assert np.isnan(got)
            else:
                assert math.exp(got) == pytest.approx(same / every, abs=1e-6)


def test_the_settings_are_all_suffixes_at_all_half_lives() -> None:
    found = history(text())
    pairs = [(setting["suffix"], setting["half_life"]) for setting in found.settings]
    assert pairs == [(suffix, half_life) for suffix in SUFFIXES for half_life in HALF_LIVES]
    assert found.log_probs.shape == (300, len(pairs))
    assert found.log_probs.dtype == np.float32


def test_probabilities_sum_to_one() -> None:
    """Over all words that could stand in the last place; where it abstains, for all alike."""
    tokens = text(80)
    ends = [history(np.append(tokens, word)).log_probs[-1] for word in range(6)]
    sums = np.exp(ends).sum(axis=0)
    np.testing.assert_allclose(sums[~np.isnan(sums)], 1, atol=1e-5)
    assert (np.isnan(ends).all(axis=0) == np.isnan(sums)).all()
    assert (~np.isnan(sums)).sum() > len(HALF_LIVES)


def test_it_is_a_feature_how_often_the_last_words_were_met() -> None:
    tokens = text()
    met = history(tokens).features["history_met"]
    wanted = [
        math.log1p(weight_of(tokens.tolist(), 200, suffix, half_life, None))
        for suffix in SUFFIXES[1:]
        for half_life in FEATURE_HALF_LIVES
    ]
    np.testing.assert_allclose(met[200], wanted, rtol=1e-5)


def test_nothing_depends_on_what_comes_later() -> None:
    """Features not even on the token itself."""
    tokens, other = text(), text()
    other[150:] = text(seed=1)[150:]
    scores = np.random.default_rng(2).normal(-3, 1, (2, 300, 2))
    scores[1, :150] = scores[0, :150]
    ours, theirs = history(tokens), history(other)
    np.testing.assert_array_equal(ours.log_probs[:150], theirs.log_probs[:150])
    past = [
        past_features(one, score[:, 0], {"two": score[:, 1]})
        for one, score in zip((tokens, other), scores, strict=True)
    ]
    for name, column in (ours.features | past[0]).items():
        changed = (theirs.features | past[1])[name]
        np.testing.assert_array_equal(column[:151], changed[:151], err_msg=name)
        assert not np.array_equal(column[151:], changed[151:], equal_nan=True), name


def test_what_is_forgotten_is_not_gone_by() -> None:
    """Its weight is below what a number can hold."""
    tokens = np.concatenate([[0, 1], np.arange(2, 40_000), [0, 1]])
    found = history(tokens)
    column = found.settings.index({"suffix": 1, "half_life": 30.0})
    assert np.isnan(found.log_probs[-1, column])
    assert found.log_probs[-1, column + len(HALF_LIVES) - 1] == pytest.approx(0, abs=1e-6)


def test_no_text_and_one_word() -> None:
    assert history(np.array([], np.int64)).log_probs.shape == (0, len(SUFFIXES) * len(HALF_LIVES))
    assert np.isnan(history(np.array([3])).log_probs).all()


def test_words_before_are_told_apart() -> None:
    tokens = np.array([5, 7, 5, 7, 7])
    none, one, two = preceding(tokens, 2)
    assert (none == 0).all()
    assert one[0] == -1
    assert one[1] == one[3] != one[2] == one[4]
    assert two[:2].tolist() == [-1, -1]
    assert two[2] == two[4] != two[3]


def test_sums_fade_each_at_its_own_pace() -> None:
    groups, values = np.array([0, 1, 0, 0, -1, -1]), np.array([[1.0, 10.0]] * 6)
    sums = faded_sums(groups, values, [1.0, np.inf])
    assert sums[:, 0].tolist() == [0, 0, 2**-2, 2**-1 + 2**-3, 0, 0]
    assert sums[:, 1].tolist() == [0, 0, 10, 20, 0, 0]


def test_past_by_hand() -> None:
    """The second expert gains 1, -inf and NaN: as much as ``MOST`` and nothing of the last two."""
    tokens = np.array([0, 1, 0, 1])
    lm = np.array([-3.0, -2.0, -4.0, -1.0])
    other = np.array([-2.0, -np.inf, np.nan, -1.0])
    found = past_features(tokens, lm, {"two": other})
    np.testing.assert_allclose(found["lm_last"][:, 0], [np.nan, -3, -2, -4])
    np.testing.assert_allclose(found["two_last"][:, 0], [np.nan, 1, -MOST, 0])
    # The last token follows word 0, as the second did; the third is the first to follow word 1.
    of_all = (-3 - 2 - 4) / 3
    assert found["lm_after"][3, 0] == pytest.approx((-2 + ADDED * of_all) / (1 + ADDED))
    assert found["lm_after"][2, 0] == pytest.approx((-3 - 2) / 2)
    fades = 2 ** (-np.array([3, 2, 1]) / LATELY)
    assert found["lm_lately"][3, 0] == pytest.approx(fades @ lm[:3] / fades.sum())
    assert all(column.dtype == np.float32 for column in found.values())
    assert np.isnan([column[0, 0] for column in found.values()]).all()


def test_an_expert_of_several_columns_has_a_feature_for_each() -> None:
    tokens, scores = text(), np.random.default_rng(3).normal(-3, 1, (300, 4))
    one = past_features(tokens, scores[:, 0], {"three": scores[:, 1:]})
    for place in range(3):
        alone = past_features(tokens, scores[:, 0], {"it": scores[:, 1 + place]})
        for kind in ("last", "lately", "after"):
            np.testing.assert_array_equal(one[f"three_{kind}"][:, place], alone[f"it_{kind}"][:, 0])


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"suffix": 5, "half_life": 30.0}, "suffix"),
        ({"suffix": 0, "half_life": 0.0}, "half_life"),
        ({"suffix": 0, "half_life": 1e999}, "half_life"),
        ({"suffix": 0}, "half_life"),
        ({"suffix": 0, "half_life": 30.0, "theta": 1.0}, "theta"),
    ],
)
def test_settings_that_a_calibration_cannot_have(setting: dict[str, float], says: str) -> None:
    check_setting("history", {"suffix": 4, "half_life": 30.0}, complete=True)
    with pytest.raises(ValueError, match=says):
        check_setting("history", setting, complete=True)
