"""N-gram probabilities, against the formula written out with dictionaries."""

from __future__ import annotations

import json
import math
import resource
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from stores import random_entries, truncate, write_store

from fairseq_knnlm.datastore import open_datastore
from fairseq_knnlm.datastore.forgetting import forget
from fairseq_knnlm.errors import NGramError
from fairseq_knnlm.experts import ngram_file as module
from fairseq_knnlm.experts.kneser_ney import FALLBACK, NGramModel, estimate_discounts
from fairseq_knnlm.experts.ngram import counted
from fairseq_knnlm.experts.ngram_file import counted_from, describe_counts, load_counts, save_counts

ORDERS = (1, 2, 3, 4, 5)
VOCABULARY = 12
FIELDS = ("log_probs", "lengths", "counts", "types")
MINE = "a" * 64


def corpus(length: int = 400, seed: int = 0, used: int = VOCABULARY - 2) -> np.ndarray:
    """Few types often and many seldom, the last of the vocabulary never; stretches come twice."""
    rng = np.random.default_rng(seed)
    chances = 1 / np.arange(1, used + 1) ** 1.2
    tokens = rng.choice(used, size=length, p=chances / chances.sum())
    half = length // 2
    return np.concatenate([tokens[:half], tokens[: half // 2], tokens[half:]]).astype(np.uint16)


def count(tokens: np.ndarray, order: int = 5, vocabulary: int = VOCABULARY) -> NGramModel:
    return NGramModel.count(tokens, vocabulary, order, progress=False)


class Formula:
    """Interpolated modified Kneser-Ney as the papers write it, one token at a time."""

    def __init__(self, texts: Sequence[np.ndarray], vocabulary: int, order: int) -> None:
        self.vocabulary, self.order = vocabulary, order
        raw = [
            Counter(
                tuple(text[i : i + n].tolist()) for text in texts for i in range(len(text) - n + 1)
            )
            for n in range(1, order + 1)
        ]
        self.counts = [Counter(gram[1:] for gram in longer) for longer in raw[1:]] + [raw[-1]]

    def discount(self, n: int, count: int) -> float:
        n1, n2, n3, n4 = (list(self.counts[n - 1].values()).count(times) for times in (1, 2, 3, 4))
        discounts = FALLBACK
        if n1 and n2 and n3:
            y = n1 / (n1 + 2 * n2)
            estimated = (0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
            discounts = estimated if min(estimated[1:]) > 0 else FALLBACK
        return discounts[min(count, 3)]

    def prob(self, context: tuple[int, ...], token: int) -> float:
        context = context[max(len(context) - self.order + 1, 0) :]
        n = len(context) + 1
        lower = self.prob(context[1:], token) if context else 1 / self.vocabulary
        after = {gram[-1]: c for gram, c in self.counts[n - 1].items() if gram[:-1] == context}
        if not after:
            return lower
        total = sum(after.values())
        left_over = sum(self.discount(n, c) for c in after.values())
        own = after.get(token, 0)
        return (own - self.discount(n, own) + left_over * lower) / total

    def known(self, context: tuple[int, ...]) -> tuple[int, int, int]:
        """Length of the longest known context, its count and its types."""
        for length in range(min(len(context), self.order - 1), -1, -1):
            end = context[len(context) - length :]
            after = [c for gram, c in self.counts[length].items() if gram[:-1] == end]
            if after:
                return length, sum(after), len(after)
        return 0, 1, 1


@dataclass(frozen=True)
class Scores:
    """What a model says of the tokens of a text, each an array of the text's shape."""

    log_probs: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray
    types: np.ndarray


def score(model: NGramModel, tokens: np.ndarray, skip: int = 0) -> Scores:
    """Of ``tokens[skip:]`` of one text, or several (..., M), each given what stands before it."""
    seen, tokens = model.order + 1, tokens.astype(np.int64)  # one more than counts
    padded = np.pad(tokens, [(0, 0)] * (tokens.ndim - 1) + [(seen, 0)], constant_values=-1)
    windows = np.lib.stride_tricks.sliding_window_view(padded, seen, axis=-1)
    windows = windows[..., skip:-1, :] if tokens.shape[-1] else windows[..., :0, :]
    targets = tokens[..., skip:]
    after = model.after(windows.reshape(-1, seen))
    found = (after.log_prob(targets.reshape(-1)), after.lengths, after.counts, after.types)
    return Scores(*(column.reshape(targets.shape) for column in found))


def distribution(model: NGramModel, context: np.ndarray) -> np.ndarray:
    return model.after(context[None]).probs()[0]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("length", [0, 1, 2, 5, 40, 400])
def test_the_formula(length: int, order: int) -> None:
    """Also for texts shorter than the order, down to none at all."""
    tokens, unseen = corpus(length), corpus(60, seed=1, used=VOCABULARY)
    formula = Formula([tokens], VOCABULARY, order)
    scores = score(count(tokens, order), unseen)
    contexts = [tuple(unseen[max(i - 4, 0) : i].tolist()) for i in range(len(unseen))]
    expected = [formula.prob(c, int(w)) for c, w in zip(contexts, unseen, strict=True)]
    lengths, counts, types = zip(*[formula.known(context) for context in contexts], strict=True)
    np.testing.assert_allclose(scores.log_probs, np.log(expected), rtol=1e-6, atol=1e-6)
    assert scores.lengths.tolist() == list(lengths)
    np.testing.assert_allclose(scores.counts, np.log(counts), rtol=1e-6)
    np.testing.assert_allclose(scores.types, np.log(types), rtol=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("order", ORDERS)
def test_distributions_after_what_only_a_text_begins_with(order: int) -> None:
    """Such contexts are followed by grams that are counted, but never behind another token."""
    tokens = np.concatenate([[11, 10, 9], corpus(40, used=8)]).astype(np.uint16)
    formula = Formula([tokens], VOCABULARY, order)
    model = count(tokens, order)
    for context in ((11,), (11, 10), (5, 11, 10), (11, 10, 9), (10,)):
        expected = [formula.prob(context, token) for token in range(VOCABULARY)]
        padded = np.array([-1] * (model.order + 1) + list(context))[-model.order - 1 :]
        found = distribution(model, padded)
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=str(context))
        assert found.sum() == pytest.approx(1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("breaks", [[0, 1, 3, 200, 200 + 4, 230], [0, 499], list(range(500))])
def test_no_gram_goes_from_one_text_to_the_next(
    tmp_path: Path, breaks: list[int], order: int
) -> None:
    """Texts shorter than the order are among them; the file knows how many grams there can be."""
    tokens, unseen = corpus(400), corpus(60, seed=1, used=VOCABULARY)
    formula = Formula(np.split(tokens, breaks[1:]), VOCABULARY, order)
    model = NGramModel.count(tokens, VOCABULARY, order, progress=False, breaks=breaks)
    save_counts(model, tmp_path / "counts.npz", MINE)
    contexts = [tuple(unseen[max(i - 4, 0) : i].tolist()) for i in range(len(unseen))]
    expected = [formula.prob(c, int(w)) for c, w in zip(contexts, unseen, strict=True)]
    for one in (model, load_counts(tmp_path / "counts.npz", MINE, breaks=breaks)):
        scores = score(one, unseen)
        np.testing.assert_allclose(scores.log_probs, np.log(expected), rtol=1e-6, atol=1e-6)
    if order > 1:
        with pytest.raises(NGramError, match=f"counts_{order}"):
            load_counts(tmp_path / "counts.npz", MINE)


def test_the_longest_corpus_has_estimated_discounts() -> None:
    """And the short ones have not, so that both are tested above."""
    estimated = [tuple(order.discounts) != FALLBACK for order in count(corpus(400)).orders]
    assert estimated[2:] == [True] * 3
    assert {tuple(order.discounts) for order in count(corpus(5)).orders} == {FALLBACK}


def test_types_of_scores() -> None:
    scores = score(count(corpus()), corpus(seed=1))
    assert scores.log_probs.dtype == scores.counts.dtype == scores.types.dtype == np.float32
    assert set(scores.lengths) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("length", [0, 3, 400])
def test_every_type_together_makes_one(length: int, order: int) -> None:
    """After nothing, seen and unseen contexts, and longer ones than count."""
    tokens = corpus(length)
    model, formula = count(tokens, order), Formula([tokens], VOCABULARY, order)
    for context in (tokens[:0], tokens[5:6], tokens[5:9], tokens[:30], np.array([11, 0, 11, 0])):
        probs = distribution(model, context)
        assert probs.shape == (VOCABULARY,)
        assert probs.min() > 0
        assert abs(probs.sum() - 1) < 1e-9
        expected = [formula.prob(tuple(context.tolist()), token) for token in range(VOCABULARY)]
        np.testing.assert_allclose(probs, expected, atol=1e-9)


def test_an_unseen_context_leaves_it_to_the_order_below() -> None:
    model, tokens = count(corpus()), corpus()
    for context in (tokens[:0], tokens[:1], tokens[:3]):
        longer = np.append([11], context)
        assert np.array_equal(distribution(model, longer), distribution(model, context))


def test_nothing_counted_is_uniform() -> None:
    assert np.allclose(distribution(count(corpus(0)), np.array([3])), 1 / VOCABULARY, atol=0)


def test_skipped_tokens_are_context() -> None:
    model, tokens = count(corpus()), corpus(80, seed=1)
    full = score(model, tokens)
    for skip in (0, 1, 3, 70, len(tokens)):
        rest = score(model, tokens, skip=skip)
        for name in FIELDS:
            assert np.array_equal(getattr(rest, name), getattr(full, name)[skip:])


def test_order_minus_one_tokens_of_context_are_enough() -> None:
    model, tokens = count(corpus(), order=3), corpus(80, seed=1)
    enough = score(model, tokens[18:], skip=2)
    assert np.array_equal(enough.log_probs, score(model, tokens).log_probs[20:])


@pytest.mark.parametrize("order", ORDERS)
def test_several_texts_at_once(order: int) -> None:
    """(N, M) and (A, B, M): each row by itself."""
    model, texts = count(corpus(), order), corpus(96, seed=1).reshape(12, -1)
    for skip in (0, 4):
        alone = [score(model, text, skip=skip) for text in texts]
        together = score(model, texts, skip=skip)
        stacked = score(model, texts.reshape(3, 4, -1), skip=skip)
        for name in FIELDS:
            expected = np.stack([getattr(scores, name) for scores in alone])
            assert np.array_equal(getattr(together, name), expected)
            assert np.array_equal(getattr(stacked, name), expected.reshape(3, 4, -1))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("place", range(4))
def test_an_unknown_token_ends_the_context(order: int, place: int) -> None:
    """-1 at any place of the context: what follows it is all that counts.

    Every type was counted, also the last of the vocabulary, next to which -1 comes in keys.
    """
    model = count(corpus(used=VOCABULARY), order)
    tokens = corpus(300, seed=1, used=VOCABULARY).astype(np.int64)
    texts = np.lib.stride_tricks.sliding_window_view(tokens, 5).copy()
    expected = score(model, texts[:, place + 1 :], skip=3 - place)
    texts[:, place] = -1
    found = score(model, texts, skip=4)
    for name in FIELDS:
        assert np.array_equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("text", [[1, 2, -1], [1, VOCABULARY, 2]])
def test_no_unknown_token_is_scored_and_none_of_another_dictionary(text: list[int]) -> None:
    with pytest.raises(NGramError, match="not in the dictionary"):
        score(count(corpus()), np.array([text]), skip=2)


def test_features_do_not_know_the_target() -> None:
    model, tokens = count(corpus()), corpus(80, seed=1)
    for place in (0, 1, 7, 40):
        texts = [np.append(tokens[:place], token) for token in range(VOCABULARY)]
        scores = [score(model, text, skip=place) for text in texts]
        assert len({float(s.log_probs[0]) for s in scores}) > 1
        for name in ("lengths", "counts", "types"):
            assert len({float(getattr(s, name)[0]) for s in scores}) == 1


@pytest.mark.parametrize(
    "counts",
    [
        [],
        [0],
        [1] * 9,
        [2] * 9,
        [7] * 9,
        [2, 3, 4],
        [1, 3, 4],
        [1, 2, 4],
        [1, 2, 3],
        [1, 2, 3] + [4] * 9,
        [1] * 9 + [2] + [3] * 9,
        [1] * 50 + [2] * 20 + [3] * 9 + [4] * 5 + [100],
    ],
)
def test_discounts_lie_between_nothing_and_the_count(counts: list[int]) -> None:
    none, *discounts = estimate_discounts(np.array(counts, np.int32))
    assert none == 0
    assert all(0 < discount <= times for times, discount in enumerate(discounts, start=1))


def test_discounts_by_hand() -> None:
    """Y = 50 / (50 + 2 x 20) = 5/9."""
    discounts = estimate_discounts(np.repeat([0, 1, 2, 3, 4, 9], [7, 50, 20, 9, 5, 3]))
    expected = [0, 1 - 10 / 9 * 20 / 50, 2 - 15 / 9 * 9 / 20, 3 - 20 / 9 * 5 / 9]
    np.testing.assert_allclose(discounts, expected)


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_tokens_of_another_dictionary_are_refused(token: int) -> None:
    tokens = np.append(corpus(), token).astype(np.int32)
    model = count(corpus())
    refusing = [count, partial(score, model)]
    if token >= 0:  # below 0 it is an unknown token of a context
        refusing.append(partial(distribution, model))
    for refuse in refusing:
        with pytest.raises(NGramError, match=r"expected: ids from 0 to 11\n +found: +ids from"):
            refuse(tokens)


def test_a_large_vocabulary_does_not_wrap() -> None:
    """Keys above 2^32, of tokens at the upper end."""
    vocabulary = 2**31
    tokens = corpus() + np.int64(vocabulary - VOCABULARY)
    scores = score(count(tokens, vocabulary=vocabulary), tokens)
    formula = Formula([tokens], vocabulary, 5)
    expected = [formula.prob(tuple(tokens[i - 4 : i].tolist()), int(tokens[i])) for i in (50, 300)]
    np.testing.assert_allclose(scores.log_probs[[50, 300]], np.log(expected), rtol=1e-6)
    with pytest.raises(AssertionError):
        count(tokens, vocabulary=2**62)


@pytest.mark.parametrize("order", [1, 5])
@pytest.mark.parametrize("length", [0, 3, 400])
def test_round_trip(tmp_path: Path, length: int, order: int) -> None:
    model = count(corpus(length), order)
    path = tmp_path / "new" / "counts"
    save_counts(model, path, MINE)
    assert list(path.parent.iterdir()) == [path]
    loaded = load_counts(path, MINE)
    assert (loaded.order, loaded.vocabulary, loaded.tokens) == (order, VOCABULARY, model.tokens)
    ours, theirs = score(model, corpus(seed=1)), score(loaded, corpus(seed=1))
    assert np.array_equal(ours.log_probs, theirs.log_probs)
    for a, b in zip(model.orders, loaded.orders, strict=True):
        assert all(np.array_equal(x, vars(b)[name]) for name, x in vars(a).items())
        assert all(x.dtype == vars(b)[name].dtype for name, x in vars(a).items())


def test_numpy_opens_it_without_pickle(tmp_path: Path) -> None:
    save_counts(count(corpus(), 2), tmp_path / "counts.npz", MINE)
    with np.load(tmp_path / "counts.npz", allow_pickle=False) as archive:
        assert set(archive.files) == {"card", "keys_1", "counts_1", "keys_2", "counts_2"}
        card = json.loads(str(archive["card"][0]))
        assert archive["counts_2"].sum() == card["tokens"] - 1 == len(corpus()) - 1
    assert card["format"] == module.FORMAT


def test_another_datastore_is_refused(tmp_path: Path) -> None:
    save_counts(count(corpus()), tmp_path / "counts.npz", "b" * 64)
    with pytest.raises(NGramError) as caught:
        load_counts(tmp_path / "counts.npz", MINE)
    message = str(caught.value)
    assert "expected: datastore aaaaaaaaaaaa..." in message
    assert "found:    datastore bbbbbbbbbbbb..." in message
    assert f"delete {tmp_path / 'counts.npz'}" in message


def flip_data(file: Path) -> None:
    """One bit of a key."""
    content = file.read_bytes()
    place = content.index(count(corpus()).orders[-1].keys.tobytes()) + 5
    file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])


def change(file: Path, **fields: object) -> None:
    with np.load(file, allow_pickle=False) as archive:
        arrays = dict(archive)
    card = json.loads(str(arrays.pop("card")[0])) | fields
    np.savez(file, allow_pickle=False, card=np.array([json.dumps(card)]), **arrays)


def newer(file: Path) -> None:
    change(file, version=module.VERSION + 1)


def foreign(file: Path) -> None:
    change(file, format="fairseq-knnlm score table")


def longer(file: Path) -> None:
    change(file, order=6)


def text(file: Path) -> None:
    file.write_text("1 2 3\n")


def pickled(file: Path) -> None:
    np.savez(file, card=np.array([{"format": module.FORMAT}], dtype=object))


@pytest.mark.parametrize(
    "spoil", [truncate, flip_data, newer, foreign, longer, text, pickled, Path.unlink]
)
def test_damage_is_told(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    path = tmp_path / "counts.npz"
    save_counts(count(corpus()), path, MINE)
    spoil(path)
    with pytest.raises(NGramError) as caught:
        load_counts(path, MINE)
    message = str(caught.value)
    assert f"{path} cannot be read" in message
    assert "expected: n-gram counts" in message
    assert "to do:    delete" in message


def rewrite(file: Path, **arrays: np.ndarray | None) -> None:
    """Other arrays, whose checksums are right; None takes one out."""
    with np.load(file, allow_pickle=False) as archive:
        found = {**archive, **arrays}
    np.savez(
        file,
        allow_pickle=False,
        **{name: array for name, array in found.items() if array is not None},
    )


FAULTS: dict[str, tuple[Callable[[Path, NGramModel], object], str]] = {
    "order 0": (lambda file, _: change(file, order=0), "$.order"),
    "order of a text": (lambda file, _: change(file, order="5"), "$.order"),
    "order of a billion": (lambda file, _: change(file, order=10**9), "$.order"),
    "order 4 of 5": (lambda file, _: change(file, order=4), "order 4"),
    "vocabulary 0": (lambda file, _: change(file, vocabulary=0), "$.vocabulary"),
    "a smaller vocabulary": (lambda file, _: change(file, vocabulary=7), "keys_1"),
    "tokens below 0": (lambda file, _: change(file, tokens=-1), "$.tokens"),
    "other tokens": (lambda file, _: change(file, tokens=17), "counts_5"),
    "tokens of 2^40": (lambda file, _: change(file, tokens=2**40), "counts_1"),
    "datastore is no text": (lambda file, _: change(file, datastore=None), "$.datastore"),
    "unknown field": (lambda file, _: change(file, colour="red"), "colour"),
    "no counts": (lambda file, _: rewrite(file, counts_3=None), "counts_3"),
    "one array more": (lambda file, _: rewrite(file, keys_6=np.arange(3)), "keys_6"),
    "keys that descend": (
        lambda file, model: rewrite(file, keys_2=model.orders[1].keys[::-1]),
        "keys_2",
    ),
    "a key twice": (
        lambda file, model: rewrite(file, keys_2=model.orders[1].keys // 3 * 3),
        "keys_2",
    ),
    "a key below 0": (
        lambda file, model: rewrite(file, keys_1=model.orders[0].keys - 1),
        "keys_1",
    ),
    "keys of contexts that there are not": (
        lambda file, model: rewrite(file, keys_3=model.orders[2].keys + 10**9),
        "keys_3",
    ),
    "keys of 32 bits": (
        lambda file, model: rewrite(file, keys_1=model.orders[0].keys.astype("i4")),
        "keys_1",
    ),
    "a count below 0": (
        lambda file, model: rewrite(file, counts_2=model.orders[1].counts - 9),
        "counts_2",
    ),
    "a count of 0 in the highest order": (
        lambda file, model: rewrite(file, counts_5=np.zeros_like(model.orders[4].counts)),
        "counts_5",
    ),
    "no 0 at the end": (
        lambda file, model: rewrite(file, counts_2=model.orders[1].counts + 1),
        "counts_2",
    ),
    "counts too short": (
        lambda file, model: rewrite(file, counts_2=model.orders[1].counts[1:]),
        "counts_2",
    ),
    "counts as floats": (
        lambda file, model: rewrite(file, counts_2=model.orders[1].counts.astype("f4")),
        "counts_2",
    ),
    "one count more": (
        lambda file, model: rewrite(
            file, counts_2=model.orders[1].counts + (np.arange(len(model.orders[1].counts)) == 0)
        ),
        "counts_2",
    ),
}


@pytest.mark.parametrize("case", list(FAULTS))
def test_what_counting_cannot_come_to_is_refused(tmp_path: Path, case: str) -> None:
    """Although every checksum is right."""
    path, model = tmp_path / "counts.npz", count(corpus())
    save_counts(model, path, MINE)
    spoil, says = FAULTS[case]
    spoil(path, model)
    with pytest.raises(NGramError) as caught:
        load_counts(path, MINE)
    assert "cannot be read" in str(caught.value)
    assert says in str(caught.value)


def test_counts_of_before_a_datastore_was_changed_are_made_anew(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", *random_entries(60, 4))
    counted(store)
    left = open_datastore(forget(store.path, [(5, 20)]).path)
    assert counted_from(left.ngram_path) == store.fingerprint
    model = counted(left)
    assert counted_from(left.ngram_path) == left.fingerprint
    other = NGramModel.count(left.values, 50, breaks=[0, 5], progress=False)
    assert np.array_equal(model.orders[-1].counts, other.orders[-1].counts)


def test_a_description_reads_no_counts(tmp_path: Path) -> None:
    path = tmp_path / "counts.npz"
    save_counts(count(corpus()), path, MINE)
    assert describe_counts(path, MINE) == f"up to 5 tokens, of {len(corpus()):,}"
    with pytest.raises(NGramError, match="another datastore"):
        describe_counts(path, "b" * 64)


def full_disk(path: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def a_folder_there(path: Path) -> None:
    path.mkdir()


def nothing_can_be_locked(path: Path) -> None:
    path.with_name(f".{path.name}.lock").mkdir()


@pytest.mark.parametrize("obstacle", [full_disk, a_folder_there, nothing_can_be_locked])
def test_counts_that_cannot_be_kept_are_used(
    tmp_path: Path, obstacle: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    store = write_store(tmp_path / "store", *random_entries(3000, 2))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = {file.name for file in store.path.iterdir()}
    obstacle(store.ngram_path)
    try:
        model = counted(store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert model.tokens == 3000
    (said,) = caplog.messages
    assert said.startswith("the n-gram counts are not kept: ")
    left = {file.name for file in store.path.iterdir()} - before
    assert left <= {"ngram.npz", ".ngram.npz.lock"}
    assert not store.ngram_path.is_file()


def test_repeated_text_is_remembered() -> None:
    """What was seen often gets nearly all: the point of it."""
    tokens = np.tile(np.arange(10), 50)
    scores = score(count(tokens), tokens, skip=4)
    assert math.exp(scores.log_probs.min()) > 0.9
