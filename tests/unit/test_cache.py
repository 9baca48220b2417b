"""The continuous cache against plain lines in float64: strictly earlier text, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from stores import Answer, Question, ask, asking, assert_helps, contexts, joined
from torch import Tensor

from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.experts import cache as module
from fairseq_knnlm.experts import recent
from fairseq_knnlm.experts.cache import CacheExpert, CacheSetting, cache_grid

TOKENS, WIDTH, VOCABULARY, EOS = 130, 8, 6, 0
EVERY = [
    CacheSetting(suffix, theta, window)
    for suffix in range(4)
    for theta in (0.0, 0.4, 1.5)
    for window in (1, 3, 40, 4000)
]
#: Where a text is cut into batches: also into one of a single token, and one of none.
CUTS = [0, 1, 3, 50, 50, 90, TOKENS]


def text() -> list[int]:
    """Repeats itself a little; lines end often, and sometimes two or more of them in a row."""
    rng = random.Random(5)
    tokens = rng.choices(range(VOCABULARY), weights=[4, 3, 2, 2, 1, 1], k=TOKENS)
    tokens[60:75] = tokens[10:25]
    tokens[30:33] = tokens[101:104] = [EOS] * 3
    return tokens


def features(seed: int = 1) -> Tensor:
    return 2 * torch.randn(TOKENS, WIDTH, generator=torch.manual_seed(seed))


def whole() -> Question:
    """The text as one batch."""
    return asking(features(), torch.tensor(text()), contexts(text()))


def documents(tokens: Sequence[int]) -> list[int]:
    """A new one after every two line ends."""
    found, number = [], 0
    for place in range(len(tokens)):
        number += place >= 2 and tokens[place - 2] == tokens[place - 1] == EOS
        found.append(number)
    return found


def earlier(question: Question, place: int, setting: CacheSetting, *, reset: bool) -> list[int]:
    """The positions that count."""
    tokens, context = question.targets.tolist(), question.contexts.before.tolist()
    ours = context[place][: setting.suffix]
    number = documents(tokens) if reset else [0] * len(tokens)
    return [
        i
        for i in range(max(place - setting.window, 0), place)
        if number[i] == number[place] and context[i][: setting.suffix] == ours and -1 not in ours
    ]


def products(question: Question) -> np.ndarray:
    vectors = question.contexts.features.double().numpy()
    return vectors @ vectors.T


def plain(question: Question, settings: Sequence[CacheSetting], *, reset: bool = False) -> Tensor:
    """(N, S) float64: Grave et al.'s formula, position by position."""
    scores, tokens = products(question), question.targets.numpy()
    found = torch.full((len(tokens), len(settings)), torch.nan, dtype=torch.float64)
    for place in range(len(tokens)):
        for column, setting in enumerate(settings):
            seen = earlier(question, place, setting, reset=reset)
            if seen:
                weights = setting.theta * scores[place, seen]
                weights = np.exp(weights - weights.max())
                agreed = weights[tokens[seen] == tokens[place]].sum()
                found[place, column] = float(agreed / weights.sum())
    return found.log()


def expert(settings: Sequence[CacheSetting] = EVERY, **how: bool) -> CacheExpert:
    return CacheExpert(settings, EOS, **how)


def in_batches(cache: CacheExpert, question: Question, cuts: Sequence[int] = CUTS) -> Answer:
    slices = [slice(*pair) for pair in pairwise(cuts)]
    return joined([ask(cache, question[one]) for one in slices])


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Below exp(-85) a float32 has no room for a share of the whole: as good as impossible."""
    found, expected = found.clamp_min(-85), expected.clamp_min(-85)
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=1e-4, atol=1e-4, equal_nan=True
    )


def assert_same(found: Answer, expected: Answer) -> None:
    assert_close(found.log_probs, expected.log_probs)
    assert set(found.features) == set(expected.features)
    for name, feature in expected.features.items():
        assert_close(found.features[name], feature)


@pytest.mark.parametrize("reset", [False, True])
def test_every_setting_is_the_formula(reset: bool) -> None:
    """Windows, thetas and suffixes, all at once and in any order."""
    settings = random.Random(1).sample(EVERY, len(EVERY))
    cache = expert(settings, reset=reset)
    found = ask(cache, whole()).log_probs
    assert found.shape == (TOKENS, len(EVERY))
    assert found.dtype == torch.float32
    assert_close(found, plain(whole(), settings, reset=reset))
    assert found.isnan().any() and found.isneginf().any() and found.isfinite().any()
    assert cache.settings[0] == vars(settings[0])


@pytest.mark.parametrize("setting", EVERY[::7])
def test_a_setting_alone_says_the_same(setting: CacheSetting) -> None:
    """Whatever larger windows are kept for others."""
    assert_close(ask(expert([setting]), whole()).log_probs, plain(whole(), [setting]))


def test_settings_may_come_twice() -> None:
    found = ask(expert([EVERY[2], EVERY[9], EVERY[2]]), whole()).log_probs
    assert torch.equal(found[1:, 0], found[1:, 2])


@pytest.mark.parametrize("queries_at_a_time", [1, 7, 256])
@pytest.mark.parametrize("reset", [False, True])
def test_batches_of_any_size_are_one_text(
    reset: bool, queries_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ask(expert(reset=reset, features=True), whole())
    monkeypatch.setattr(recent, "QUERIES_AT_A_TIME", queries_at_a_time)
    assert_same(in_batches(expert(reset=reset, features=True), whole()), expected)


@pytest.mark.parametrize("window", [1, 2, 5])
def test_a_small_window_forgets_across_batches(window: int) -> None:
    settings = [CacheSetting(0, 0.4, window)]
    for reset in (False, True):
        found = in_batches(expert(settings, reset=reset), whole()).log_probs
        assert_close(found, plain(whole(), settings, reset=reset))


def test_rows_may_come_in_any_order_within_a_batch() -> None:
    expected = ask(expert(features=True), whole())
    cache, rng = expert(features=True), torch.manual_seed(2)
    for cut in (slice(0, 60), slice(60, TOKENS)):
        order = torch.randperm(len(range(TOKENS)[cut]), generator=rng) + cut.start
        found = ask(cache, whole()[order])
        assert_close(found.log_probs, expected.log_probs[order])
        for name, feature in expected.features.items():
            assert_close(found.features[name], feature[order])


def test_what_comes_later_changes_nothing() -> None:
    """Tokens and features from a position on: what is said before it stays the same."""
    question = whole()
    expected = ask(expert(features=True, reset=True), question)
    for place in (1, 40, 101, TOKENS - 1):
        vectors, tokens = features().clone(), torch.tensor(text())
        vectors[place:] = features(seed=9)[place:]
        tokens[place:] = (tokens[place:] + 1) % VOCABULARY
        context = contexts(tokens.tolist())
        found = ask(expert(features=True, reset=True), asking(vectors, tokens, context))
        torch.testing.assert_close(
            found.log_probs[:place], expected.log_probs[:place], equal_nan=True
        )
        for name, feature in expected.features.items():
            torch.testing.assert_close(found.features[name][:place], feature[:place])


@pytest.mark.parametrize("cuts", [[0, TOKENS], CUTS])
def test_a_token_that_only_comes_later_is_impossible(cuts: list[int]) -> None:
    """A planted one, whose features are every query's best match."""
    place, planted = 70, VOCABULARY
    tokens, vectors = text(), features()
    tokens[place] = planted
    vectors[:, 0], vectors[place, 0] = 5.0, 50.0
    settings = [CacheSetting(0, 1.0, window) for window in (1, 40, 4000)]
    context = contexts(tokens)
    # The planted token is asked for at every position in turn, the text before it as it is.
    for asked in (1, 30, place - 1, place, place + 1, place + 35, place + 45):
        targets = torch.tensor(tokens)
        targets[asked] = planted
        question = asking(vectors, targets, context)
        found = in_batches(expert(settings), question, cuts).log_probs[asked].exp()
        expected = [1 <= asked - place <= setting.window for setting in settings]
        assert (found > 0).tolist() == expected
        assert found[torch.tensor(expected)].tolist() == pytest.approx([1.0] * sum(expected))


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("place", [0, 1, 5, 31, 32, 33, 60, 103, 104, TOKENS - 1])
def test_a_vocabulary_sums_to_one(place: int, reset: bool) -> None:
    """Every token in turn at one position; features do not know which. Also after empty lines."""
    question = whole()[slice(0, place + 1)]
    said = []
    for token in range(VOCABULARY):
        targets = question.targets.clone()
        targets[-1] = token
        other = replace(question, targets=targets)
        said.append(ask(expert(reset=reset, features=True), other))
    probs = torch.stack([answer.log_probs[-1] for answer in said]).exp()
    abstains = probs.isnan()
    assert torch.equal(abstains.any(dim=0), abstains.all(dim=0))
    speaks = ~abstains[0]
    torch.testing.assert_close(probs.sum(dim=0)[speaks], torch.ones(int(speaks.sum())))
    for name, feature in said[0].features.items():
        assert all(torch.equal(answer.features[name][-1], feature[-1]) for answer in said)


def test_where_nothing_was_seen_it_abstains() -> None:
    """At the beginning of all text, and where nobody shares the suffix."""
    found = ask(expert(), whole()).log_probs
    assert found[0].isnan().all()
    assert not found[1:, [setting.suffix == 0 for setting in EVERY]].isnan().any()
    tokens = torch.arange(20)
    found = ask(expert(), asking(features()[:20], tokens, contexts(tokens.tolist())))
    assert found.log_probs[1:].isneginf().any()
    assert found.log_probs[:, [setting.suffix > 0 for setting in EVERY]].isnan().all()


@pytest.mark.parametrize("cuts", [[0, TOKENS], CUTS, [0, 31, 32, 33, TOKENS]])
def test_reset_forgets_at_empty_lines(cuts: list[int]) -> None:
    """Wherever batches are cut, and though the model saw one token of context."""
    settings = [CacheSetting(0, theta, window) for theta in (0.0, 0.4) for window in (3, 4000)]
    for seen in (1, 4):
        question = asking(features(), torch.tensor(text()), contexts(text(), seen))
        found = in_batches(expert(settings, reset=True), question, cuts).log_probs
        assert_close(found, plain(question, settings, reset=True))
        assert found[32:34].isnan().all()
        assert not found[34].isnan().any()
        remembers = in_batches(expert(settings), question, cuts).log_probs
        assert not remembers[1:].isnan().any()


def test_an_unknown_context_is_shared_with_nobody() -> None:
    question = asking(features(), torch.tensor(text()), contexts(text(), seen=1))
    found = ask(expert(), question).log_probs
    assert_close(found, plain(question, EVERY))
    assert found[:, [setting.suffix > 1 for setting in EVERY]].isnan().all()


def test_what_is_no_text_gets_no_answer_and_is_not_remembered() -> None:
    """Rows of -1, as an added beginning of sentence has."""
    expected = ask(expert(features=True), whole())
    places = torch.tensor([0, 17, 17, 80, TOKENS])  # each stands before the row of that number
    tokens = torch.cat([torch.tensor(text()), torch.full((len(places),), 3)])
    vectors = torch.cat([features(), 30 * torch.ones(len(places), WIDTH)])
    context = torch.cat([contexts(text()), torch.full((len(places), 4), 3)])
    rows = torch.cat([torch.arange(TOKENS), torch.full((len(places),), -1)])
    order = torch.cat([torch.arange(TOKENS) * 1.0, places - 0.5]).argsort()
    question = asking(vectors[order], tokens[order], context[order], rows[order])
    found = ask(expert(features=True), question)
    text_rows = question.contexts.rows >= 0
    assert found.log_probs[~text_rows].isnan().all()
    assert_close(found.log_probs[text_rows], expected.log_probs)
    for name, feature in found.features.items():
        assert feature[~text_rows].isnan().all()
        assert_close(feature[text_rows], expected.features[name])


def test_a_batch_without_text() -> None:
    """As where rows are not known at all."""
    nothing = asking(features(), torch.tensor(text()), rows=torch.full((TOKENS,), -1))
    cache = expert(features=True)
    found = ask(cache, nothing)
    assert found.log_probs.shape == (TOKENS, len(EVERY))
    assert found.log_probs.isnan().all()
    assert_same(ask(cache, whole()), ask(expert(features=True), whole()))


@pytest.mark.parametrize("start", [0, 59])
def test_a_batch_that_goes_back_is_refused(start: int) -> None:
    cache = expert()
    ask(cache, whole()[slice(0, 60)])
    with pytest.raises(ConfigError, match="text in its order") as caught:
        ask(cache, whole()[slice(start, 70)])
    assert_helps(caught, "tokens after row 59", f"row {start}")
    ask(cache, whole()[slice(60, 70)])


def test_features_are_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes of the cache at two thetas and windows, and positions that share 0, 1 and 2 tokens."""
    windows = (5, 60)
    monkeypatch.setattr(module, "FEATURE_WINDOWS", windows)
    found = ask(expert(EVERY[:1], features=True), whole()).features
    scores = products(whole()) / WIDTH**0.5
    sizes, shared = [], []
    for place in range(TOKENS):
        seen = range(max(place - max(windows), 0), place)
        top = max((scores[place, i] for i in seen), default=0.0)
        sizes.append(
            [
                sum(np.exp(theta * (scores[place, i] - top)) for i in seen if place - i <= window)
                for theta in module.FEATURE_THETAS
                for window in windows
            ]
        )
        counts = [
            len(earlier(whole(), place, CacheSetting(suffix, 0, max(windows)), reset=False))
            for suffix in range(3)
        ]
        shared.append(counts)
    assert set(found) == {"cache_size", "cache_shared"}
    assert_close(found["cache_size"], torch.tensor(sizes).clamp_min(1e-6).log())
    assert_close(found["cache_shared"], torch.tensor(shared).log1p())


def test_features_are_left_out_and_change_no_prediction() -> None:
    plain, featured = ask(expert(), whole()), ask(expert(features=True), whole())
    assert plain.features == {}
    assert_close(plain.log_probs, featured.log_probs)


def test_large_products_do_not_overflow() -> None:
    """Where exp(theta h.h) is no number. What is less likely than a float32 says is impossible."""
    settings = [CacheSetting(0, 10.0, 4000)]
    found = ask(expert(settings), whole()).log_probs
    expected = plain(whole(), settings)
    likely = expected > -80
    assert likely.any()
    assert not found[1:].isnan().any()
    torch.testing.assert_close(found[likely].double(), expected[likely], rtol=1e-3, atol=1e-3)
    assert (found[expected < -110] < -80).all()


def test_half_precision_features() -> None:
    question = whole()
    half = replace(question.contexts, features=question.contexts.features.half())
    rounded = replace(question.contexts, features=half.features.float())
    found, expected = (
        ask(expert(), replace(question, contexts=contexts)) for contexts in (half, rounded)
    )
    assert torch.equal(found.log_probs.nan_to_num(9), expected.log_probs.nan_to_num(9))


def test_the_grid_of_a_score_table() -> None:
    grid = cache_grid(64)
    assert len(set(grid)) == len(grid)
    assert {setting.suffix for setting in grid} == {0, 1, 2}
    assert {setting.window for setting in grid} == set(module.WINDOWS)
    assert CacheSetting(0, 1 / 8, 4000) in grid


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("window", [1, 3, 40])
def test_who_read_what_it_looks_back_to_says_the_same(window: int, reset: bool) -> None:
    """To the bit, wherever it begins, also just behind or between two line ends."""
    settings = [replace(setting, window=window) for setting in EVERY]
    question = whole()
    far = expert(settings, reset=reset).looks_back
    for start in range(1, TOKENS - 1, 2):
        cuts = [0, start, min(start + 9, TOKENS - 1), TOKENS]
        expected = in_batches(expert(settings, reset=reset), question, cuts).log_probs[start:]
        late = expert(settings, reset=reset)
        ask(late, question[max(0, start - far) : start])
        found = in_batches(late, question, cuts[1:]).log_probs
        assert torch.equal(found.nan_to_num(nan=9.0), expected.nan_to_num(nan=9.0)), start


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("start", [1, 50, 103])
def test_who_follows_another_goes_on_as_if_it_had_read_the_text(start: int, reset: bool) -> None:
    """With fewer columns, a shorter window too; whom it follows notices nothing."""
    question = whole()
    few = [setting for setting in EVERY if setting.window <= 40][::5]
    one, alone, late = (expert(some, reset=reset) for some in (EVERY, few, few))
    for reader in (one, alone):
        ask(reader, question[:start])
    late.follow(one)
    rest = question[start:]
    expected = ask(alone, rest).log_probs
    assert_close(ask(late, rest).log_probs, expected)
    undisturbed = expert(EVERY, reset=reset)
    ask(undisturbed, question[:start])
    assert_close(ask(one, rest).log_probs, ask(undisturbed, rest).log_probs)
