"""What followed the same tokens before, against plain lines in float64: a walk over all places."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from stores import Answer, Question, ask, asking, assert_helps, contexts, joined
from torch import Tensor

from fairseq_knnlm.calibration.settings import check_setting
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.experts import repeats
from fairseq_knnlm.experts.kind import Models, Opened
from fairseq_knnlm.experts.suffix import (
    HALF_LIVES,
    KIND,
    SuffixExpert,
    SuffixOptions,
    SuffixSetting,
    read_through,
)

TOKENS, VOCABULARY, EOS, WINDOW = 160, 6, 0, 70
SETTINGS = [SuffixSetting(half_life) for half_life in (2.0, 30.0, 1e6)]
#: Where a text is cut into batches: also into one of a single token, and one of none.
CUTS = [0, 1, 3, 50, 50, 90, TOKENS]


def text(seed: int = 5) -> list[int]:
    """Repeats itself; lines end often, and sometimes two or more of them in a row."""
    rng = random.Random(seed)
    tokens = rng.choices(range(VOCABULARY), weights=[2, 6, 3, 2, 1, 1], k=TOKENS)
    tokens[60:75] = tokens[10:25]
    tokens[120:128] = tokens[62:70]
    tokens[30:33] = tokens[101:104] = [EOS] * 3
    return tokens


def question(tokens: Sequence[int] | None = None, seen: int = 4) -> Question:
    tokens = list(tokens or text())
    vectors = torch.zeros(len(tokens), 2)
    return asking(vectors, torch.tensor(tokens), contexts(tokens, seen))


def expert(settings: Sequence[SuffixSetting] = SETTINGS, **how: object) -> SuffixExpert:
    given = {"window": WINDOW, **how}
    return SuffixExpert(settings, EOS, **given)  # type: ignore[arg-type]


def in_batches(suffix: SuffixExpert, asked: Question, cuts: Sequence[int] = CUTS) -> Answer:
    return joined([ask(suffix, asked[slice(*pair)]) for pair in pairwise(cuts)])


def shared(tokens: Sequence[int], i: int, j: int) -> int:
    """How many tokens before both are the same, six at most."""
    length = 0
    while length < 6 and j > length and tokens[i - 1 - length] == tokens[j - 1 - length]:
        length += 1
    return length


def places(tokens: Sequence[int], i: int, *, reset: bool = False) -> list[tuple[int, int]]:
    """Earlier places that count, each with the tokens it shares."""
    begin = max(
        [0] + [p for p in range(2, i + 1) if reset and tokens[p - 2] == tokens[p - 1] == EOS]
    )
    every = [(j, shared(tokens, i, j)) for j in range(max(1, i - WINDOW, begin), i)]
    kept = {
        pair for n in (1, 2) for pair in [one for one in every if one[1] >= n][-repeats.LATEST :]
    }
    return sorted(kept)


def distribution(
    tokens: Sequence[int], i: int, half_life: float, *, reset: bool = False
) -> dict[int, float]:
    """p of each token that is possible, by the recursion; empty where nothing is known."""
    found: dict[int, float] = {}
    for n in range(1, 7):
        counts: dict[int, float] = defaultdict(float)
        for j, length in places(tokens, i, reset=reset):
            if length >= n:
                counts[tokens[j]] += 2.0 ** -min((i - j) / half_life, 64.0)
        prior = 1.0 if n > 1 else 0.0
        total = sum(counts.values()) + prior
        if counts:
            words = {*counts, *found}
            found = {w: (counts[w] + prior * found.get(w, 0.0)) / total for w in words}
    return found


def plain(tokens: Sequence[int], *, reset: bool = False) -> Tensor:
    """(N, S) float64, log p of each token."""
    rows = []
    for i, token in enumerate(tokens):
        ways = [distribution(tokens, i, one.half_life, reset=reset) for one in SETTINGS]
        rows.append([way.get(token, 0.0) if way else math.nan for way in ways])
    return torch.tensor(rows, dtype=torch.float64).log()


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=1e-5, atol=1e-5, equal_nan=True
    )


def assert_same(found: Answer, expected: Answer) -> None:
    """But for rounding, which differs between a number alone and one of many."""
    assert_close(found.log_probs, expected.log_probs)
    assert set(found.features) == set(expected.features)
    for name, feature in expected.features.items():
        assert_close(found.features[name], feature)


@pytest.mark.parametrize("latest", [1, 3, 32])
@pytest.mark.parametrize("reset", [False, True])
def test_every_setting_is_the_recursion(
    reset: bool, latest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeats, "LATEST", latest)
    found = ask(expert(reset=reset), question()).log_probs
    assert found.dtype == torch.float32
    assert_close(found, plain(text(), reset=reset))
    assert found.isnan().any() and found.isneginf().any() and found.isfinite().any()


def test_by_hand() -> None:
    """a b c a b d a b ?: c and d followed "a b", three and six tokens ago."""
    a, b, c, d = 1, 2, 3, 4
    tokens = [a, b, c, a, b, d, a, b, c]
    found = ask(expert([SuffixSetting(3.0)]), question(tokens)).log_probs[:, 0].exp()
    # After "b" c weighs 1/4 and d 1/2, and after "a b" the same; longer matches are there of none:
    # "d a b" and "c a b" differ.
    once = 0.25 / 0.75
    assert found[8].item() == pytest.approx((0.25 + once) / (0.75 + 1.0))
    assert found[:3].isnan().tolist() == [True, True, True]
    assert found[3].isnan()  # nothing came after c before
    assert found[4].item() == pytest.approx(1.0)  # b after a, as before
    assert found[5].item() == 0.0  # d after b, where c was


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("cuts", [CUTS, [0, 31, 32, 33, TOKENS], list(range(TOKENS + 1))])
def test_batches_of_any_size_are_one_text(cuts: list[int], reset: bool) -> None:
    expected = ask(expert(reset=reset, features=True), question())
    found = in_batches(expert(reset=reset, features=True), question(), cuts)
    assert_same(found, expected)


def test_rows_may_come_in_any_order_within_a_batch() -> None:
    expected = ask(expert(features=True), question())
    suffix, rng = expert(features=True), torch.manual_seed(2)
    for cut in (slice(0, 60), slice(60, TOKENS)):
        order = torch.randperm(len(range(TOKENS)[cut]), generator=rng) + cut.start
        found = ask(suffix, question()[order])
        picked = {name: feature[order] for name, feature in expected.features.items()}
        assert_same(found, Answer(expected.log_probs[order], picked))


def test_what_comes_later_changes_nothing() -> None:
    """Tokens from a position on: what is said up to it stays the same, but of the token itself."""
    expected = expert(features=True).predict(question().contexts)
    for place in (1, 40, 101, TOKENS - 1):
        tokens = text()
        tokens[place:] = [(token + 1) % VOCABULARY for token in tokens[place:]]
        found = expert(features=True).predict(question(tokens).contexts)
        for token in range(VOCABULARY):
            asked = torch.full((TOKENS,), token)
            one, other = (x.log_prob(asked)[: place + 1] for x in (found, expected))
            assert torch.equal(one.nan_to_num(9.0), other.nan_to_num(9.0))
        for name, feature in expected.features.items():
            one, other = (x[: place + 1].nan_to_num(9.0) for x in (found.features[name], feature))
            assert torch.equal(one, other), name


@pytest.mark.parametrize("reset", [False, True])
def test_all_tokens_are_those_asked_one_by_one(reset: bool) -> None:
    """And what they have sums to 1 wherever it does not abstain."""
    asked = question()
    prediction = expert(reset=reset).predict(asked.contexts)
    for setting in range(len(SETTINGS)):
        every = prediction.log_probs(setting)
        assert not isinstance(every, Tensor)
        whole = every.over(VOCABULARY)
        for token in range(VOCABULARY):
            one = prediction.log_prob(torch.full((TOKENS,), token))[:, setting]
            assert_close(whole[:, token], one)
        sums = whole.exp().sum(dim=1)
        knows = ~sums.isnan()
        assert_close(sums[knows], torch.ones(int(knows.sum())))


def test_features_are_plain_lines() -> None:
    found = ask(expert(SETTINGS[:1], features=True), question()).features
    assert set(found) == {"suffix_counts", "suffix_types", "suffix_best", "suffix_gap"}
    tokens = text()
    for i in range(TOKENS):
        there = places(tokens, i)
        counts = [sum(length >= n for _, length in there) for n in range(1, 7)]
        types = [len({tokens[j] for j, length in there if length >= n}) for n in range(1, 5)]
        assert_close(found["suffix_counts"][i], torch.tensor(counts).log1p())
        assert_close(found["suffix_types"][i], torch.tensor(types).log1p())
        likely, gap = torch.full((len(HALF_LIVES),), math.nan), math.nan
        if there:
            best = max(there, key=lambda pair: (pair[1], pair[0]))[0]
            ways = [distribution(tokens, i, half_life)[tokens[best]] for half_life in HALF_LIVES]
            likely, gap = torch.tensor(ways), math.log(i - best)
        assert_close(found["suffix_best"][i], likely)
        assert_close(found["suffix_gap"][i], torch.tensor(gap))


def test_features_are_left_out_and_change_no_prediction() -> None:
    plainly, featured = ask(expert(), question()), ask(expert(features=True), question())
    assert plainly.features == {}
    assert torch.equal(plainly.log_probs.nan_to_num(9.0), featured.log_probs.nan_to_num(9.0))
    nothing = ask(expert([], features=True), question())
    assert nothing.log_probs.shape == (TOKENS, 0)


def test_one_token_of_context_is_enough() -> None:
    """What the model saw does not matter: the tokens are those that were read."""
    assert_same(ask(expert(), question(seen=1)), ask(expert(), question()))


@pytest.mark.parametrize("reset", [False, True])
def test_who_read_what_it_looks_back_to_says_the_same(reset: bool) -> None:
    """To the bit, wherever it begins, also just behind or between two line ends."""
    far = expert().looks_back
    assert far == WINDOW + 6
    for start in range(1, TOKENS - 1, 2):
        cuts = [0, start, min(start + 9, TOKENS - 1), TOKENS]
        expected = in_batches(expert(reset=reset), question(), cuts).log_probs[start:]
        late = expert(reset=reset)
        ask(late, question()[max(0, start - far) : start])
        found = in_batches(late, question(), cuts[1:]).log_probs
        assert torch.equal(found.nan_to_num(9.0), expected.nan_to_num(9.0)), start


def test_what_is_no_text_gets_no_answer_and_is_not_remembered() -> None:
    """Rows of -1, as an added beginning of sentence has; and a batch of nothing else."""
    asked = question()
    suffix = expert(features=True)
    nothing = replace(asked.contexts, rows=torch.full((TOKENS,), -1))
    found = ask(suffix, Question(nothing, asked.targets))
    assert found.log_probs.shape == (TOKENS, len(SETTINGS))
    assert found.log_probs.isnan().all()
    first = torch.tensor([0, *range(TOKENS)])
    rows = torch.tensor([-1, *range(TOKENS)])
    doubled = asked[first]
    found = ask(suffix, Question(replace(doubled.contexts, rows=rows), doubled.targets))
    assert found.log_probs[0].isnan().all()
    assert_close(found.log_probs[1:], ask(expert(), asked).log_probs)


def test_tokens_that_were_not_read_are_like_no_other() -> None:
    """Rows 40 to 59 are missing: neither is a suffix found across the gap, nor in it."""
    tokens = text()
    there = torch.tensor([*range(40), *range(60, TOKENS)])
    found = ask(expert([SuffixSetting(1e6)]), question()[there]).log_probs
    # As if one token stood there that stands nowhere else, before the first row and after the last.
    filled = [*tokens[:39], VOCABULARY, *tokens[60:]]
    whole = ask(expert([SuffixSetting(1e6)]), question(filled)).log_probs
    kept = torch.tensor([*range(39), *range(42, len(filled))])
    assert found[40].isnan().all()
    assert_close(found[kept], whole[kept])


@pytest.mark.parametrize("start", [0, 59])
def test_a_batch_that_goes_back_is_refused(start: int) -> None:
    suffix = expert()
    ask(suffix, question()[slice(0, 60)])
    with pytest.raises(ConfigError, match="in its order") as caught:
        ask(suffix, question()[slice(start, 70)])
    assert_helps(caught, "tokens after row 59", f"row {start}")
    ask(suffix, question()[slice(60, 70)])


def several(tokens: Sequence[Sequence[int]], rows: range) -> Question:
    """The same rows of several texts of one length."""
    parts = [question(one)[slice(rows.start, rows.stop)] for one in tokens]
    whole = [
        torch.cat(some)
        for some in zip(*[(p.contexts.before, p.targets) for p in parts], strict=True)
    ]
    found = asking(
        torch.zeros(len(whole[1]), 2),
        whole[1],
        whole[0],
        torch.cat([p.contexts.rows for p in parts]),
    )
    texts = torch.arange(len(tokens)).repeat_interleave(len(rows))
    return replace(found, contexts=replace(found.contexts, texts=texts))


def test_texts_are_on_their_own_and_follow_the_hypotheses_of_a_beam() -> None:
    first, second = text(5), text(6)
    alone = [ask(expert(), question(one)).log_probs for one in (first, second)]
    suffix = expert()
    found = ask(suffix, several([first, second], range(90)))
    assert_close(found.log_probs, torch.cat([one[:90] for one in alone]))
    # Now both go on where the second stood.
    suffix.reorder(torch.tensor([1, 1]))
    found = ask(suffix, several([second, second], range(90, TOKENS)))
    assert_close(found.log_probs, torch.cat([alone[1][90:]] * 2))
    # A new text begins in each place.
    found = ask(suffix, several([first, second], range(90)))
    assert_close(found.log_probs, torch.cat([one[:90] for one in alone]))


def test_all_tokens_of_several_texts() -> None:
    """Which have different numbers of places to go by."""
    texts = [text(5), [1] * TOKENS, list(range(TOKENS))]
    prediction = expert().predict(several(texts, range(TOKENS)).contexts)
    every = prediction.log_probs(1)
    assert not isinstance(every, Tensor)
    whole = every.over(TOKENS).view(len(texts), TOKENS, TOKENS)
    for number, one in enumerate(texts):
        for place in range(0, TOKENS, 7):
            expected = distribution(one, place, SETTINGS[1].half_life)
            found = whole[number, place]
            assert found.isnan().all() == (not expected)
            probs = torch.tensor([expected.get(token, 0.0) for token in range(TOKENS)])
            if expected:
                torch.testing.assert_close(found.exp(), probs, rtol=1e-5, atol=1e-6)


def test_a_draft_is_taken_back() -> None:
    """Contexts that were predicted at once, of which the last never were."""
    tokens = text()
    expected = ask(expert(), question()).log_probs
    suffix = expert()
    ask(suffix, several([tokens], range(80)))
    draft = [*tokens[:85], *[(token + 1) % VOCABULARY for token in tokens[85:90]], *tokens[90:]]
    suffix.predict(several([draft], range(80, 90)).contexts)
    suffix.forget(torch.tensor([5]))
    # Row 84 is the last that stays; what came after it is known by the next one.
    found = ask(suffix, several([tokens], range(85, TOKENS)))
    assert_close(found.log_probs, expected[85:])


@pytest.mark.parametrize("size", [0, 1, 7, TOKENS])
def test_reading_a_text_through(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SuffixExpert, "at_a_time", 32)
    tokens = text()[:size]
    found, features = read_through(torch.tensor(tokens, dtype=torch.long), SETTINGS, window=WINDOW)
    assert found.shape == (size, len(SETTINGS))
    assert all(len(feature) == size for feature in features.values())
    if size:
        assert_close(found, plain(tokens))
        expected = ask(expert(features=True), question(tokens)).features
        assert_same(Answer(found, features), Answer(found, expected))


def opened(**flags: object) -> Opened:
    return Opened("suffix", KIND, SuffixOptions(**flags), None)  # type: ignore[arg-type]


def test_the_kind() -> None:
    models = Models(first=None, width=8, eos=EOS, others={})
    grid = KIND.grid(opened(), models)
    assert [setting.half_life for setting in grid] == list(HALF_LIVES)
    made = KIND.make(opened(suffix_window=WINDOW), models, SETTINGS, False)
    assert_same(ask(made, question()), ask(expert(), question()))
    assert KIND.described(opened(suffix_reset=True), models) == {"window": 8192, "reset": True}


def test_settings_in_calibrations() -> None:
    check_setting("suffix", {"half_life": 500.0}, complete=True)
    for setting in ({}, {"half_life": 0.0}, {"half_life": math.inf}, {"half_life": 5.0, "k": 0}):
        with pytest.raises(ValueError, match=r"half_life|k"):
            check_setting("suffix", setting, complete=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"suffix_half_life": 0.0}, "--suffix-half-life"),
        ({"suffix_half_life": math.nan}, "--suffix-half-life"),
        ({"suffix_half_life": math.inf}, "--suffix-half-life"),
        ({"suffix_window": 0}, "--suffix-window"),
        ({"suffix_window": 10**9}, "--suffix-window"),
    ],
)
def test_flags_out_of_bounds_are_refused(flags: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KIND.check(SuffixOptions(**flags), True)  # type: ignore[arg-type]
