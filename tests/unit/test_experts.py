"""What each expert says, against brute force and plain loops in float64."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stores import (
    Answer,
    Question,
    ask,
    asking,
    brute_force,
    build_index,
    contexts,
    joined,
    random_entries,
    write_compressed,
    write_store,
)
from torch import Tensor, nn

from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.experts.kind import Models, Opened
from fairseq_knnlm.experts.kneser_ney import NGramModel
from fairseq_knnlm.experts.knn import (
    DISTANCE_RANKS,
    DISTINCT_RANKS,
    SPREADS,
    TEMPERATURES,
    KnnExpert,
    KnnSetting,
    knn_grid,
)
from fairseq_knnlm.experts.lm import LMExpert, ShapeExpert
from fairseq_knnlm.experts.neighbours import KIND, KnnOptions
from fairseq_knnlm.experts.ngram import NGramExpert
from fairseq_knnlm.index.search import SearchIndex
from fairseq_knnlm.lm.contexts import CONTEXT
from fairseq_knnlm.lm.transformer import TransformerLM
from fairseq_knnlm.retrieval.local import LocalRetriever

ROWS, WIDTH, TOKENS, VOCABULARY = 300, 12, 40, 5
EVERY = [
    KnnSetting(suffix, fewer, temperature)
    for suffix in range(4)
    for fewer in (0, 1, 4)
    for temperature in (0.5, 9.0, 200.0)
]


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    return write_store(
        tmp_path / "store", *random_entries(ROWS, WIDTH, VOCABULARY), vocabulary=VOCABULARY
    )


def asked(width: int = WIDTH) -> Question:
    """Tokens whose contexts neighbours often share; a few contexts are unknown, or in part."""
    rng = torch.manual_seed(4)
    keys = torch.randn(TOKENS, width, generator=rng)
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=rng)
    context = torch.randint(VOCABULARY, (TOKENS, CONTEXT), generator=rng)
    context[:3], context[3:6, 1:] = -1, -1
    return asking(keys, targets, context)


def retriever(store: Datastore, recipe: str = "Flat", **how: int) -> LocalRetriever:
    index, card = build_index(store.full_keys(), recipe, **how)
    return LocalRetriever(SearchIndex(index, card), store, "l2")


def expert(
    store: Datastore, k: int, settings: list[KnnSetting] = EVERY, *, features: bool = False
) -> KnnExpert:
    return KnnExpert(retriever(store), k, settings, features=features)


def shared(text: list[int], entry: int, context: list[int]) -> int:
    """How many of the tokens before an entry are those of the context, going back."""
    steps = 0
    while steps < 3 and entry > steps and text[entry - steps - 1] == context[steps]:
        steps += 1
    return steps


class Plain:
    """Nearest entries by brute force, or those given, and what follows from them."""

    def __init__(self, store: Datastore, question: Question, near: Tensor | int) -> None:
        keys = question.contexts.keys
        assert keys is not None
        queries = keys.double().numpy()
        if store.projection is not None:
            queries = queries @ store.projection
        _, order = brute_force(store.full_keys(), queries, len(store), "l2")
        found = order[:, :near].tolist() if isinstance(near, int) else near.tolist()
        self.text = store.values.tolist()
        self.weights = np.ones(len(store)) if store.weights is None else store.weights
        self.queries = []
        for row, query in enumerate(queries):
            apart = ((store.full_keys().astype(np.float64) - query) ** 2).sum(axis=1)
            ids = sorted((i for i in found[row] if i >= 0), key=apart.__getitem__)
            self.queries.append((ids, apart[ids]))
        self.targets = question.targets.tolist()
        self.context = question.contexts.before.tolist()
        self.merged = store.manifest.merged

    def shared(self, entry: int, row: int) -> int:
        return 0 if self.merged else shared(self.text, entry, self.context[row])

    def log_probs(self, setting: KnnSetting) -> list[float]:
        found = []
        for row, (ids, distances) in enumerate(self.queries):
            total = agreed = 0.0
            for entry, distance in list(zip(ids, distances, strict=True))[: setting.k or None]:
                if self.shared(entry, row) >= setting.suffix:
                    weight = self.weights[entry] * math.exp(-distance / setting.temperature)
                    total += weight
                    agreed += weight * (self.text[entry] == self.targets[row])
            found.append(math.log(agreed / total) if agreed else -math.inf if total else math.nan)
        return found

    def features(self, k: int) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}

        def say(name: str, feature: Any) -> None:
            found.setdefault(f"knn_{name}", []).append(feature)

        for row, (ids, distances) in enumerate(self.queries):
            ranks = [rank for rank in DISTANCE_RANKS if rank <= k]
            there = len(ids)
            say("distances", [distances[r - 1] if r <= there else math.nan for r in ranks])
            entropies, tops = [], []
            for parts in SPREADS:
                temperature = (distances[-1] - distances[0]) / parts
                mass: Counter[int] = Counter()
                for entry, distance in zip(ids, distances, strict=True):
                    mass[self.text[entry]] += math.exp(-(distance - distances[0]) / temperature)
                probs = [part / sum(mass.values()) for part in mass.values()]
                entropies.append(-sum(p * math.log(p) for p in probs))
                tops.append(math.log(max(probs)))
            say("entropy", entropies)
            say("top", tops)
            values = [self.text[entry] for entry in ids]
            say("distinct", [math.log(len(set(values[:rank]))) for rank in DISTINCT_RANKS])
            steps = [self.shared(entry, row) for entry in ids]
            say("shared", [math.log1p(sum(s >= least for s in steps)) for least in range(4)])
            last = self.context[row][0]
            say("frequency", math.log1p(self.text.count(last)) if last >= 0 else math.nan)
        return found


def assert_close(found: Tensor, expected: Any, tolerance: float = 1e-4) -> None:
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(
        found.double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True
    )


def assert_same(found: Answer, expected: Answer) -> None:
    torch.testing.assert_close(found.log_probs, expected.log_probs, equal_nan=True)
    assert list(found.features) == list(expected.features)
    for name, feature in found.features.items():
        torch.testing.assert_close(feature, expected.features[name], equal_nan=True)


# Nearest neighbours


@pytest.mark.parametrize("k", [1, 5, 20])
def test_every_setting_is_brute_force(store: Datastore, k: int) -> None:
    """All at once, in any order."""
    settings = random.Random(k).sample(EVERY, len(EVERY))
    one = expert(store, k, settings)
    found, plain = ask(one, asked()).log_probs, Plain(store, asked(), k)
    assert found.shape == (TOKENS, len(EVERY))
    assert found.dtype == torch.float32
    assert one.settings == [
        {"suffix": s.suffix, "k": s.k, "temperature": s.temperature} for s in settings
    ]
    for column, setting in zip(found.T, settings, strict=True):
        assert_close(column, plain.log_probs(setting))
    if k == 20:  # then all three kinds are among the answers
        assert found.isnan().any() and found.isneginf().any() and found.isfinite().any()


@pytest.mark.parametrize("setting", EVERY[::5])
def test_a_setting_alone_says_the_same(store: Datastore, setting: KnnSetting) -> None:
    alone = ask(expert(store, 20, [setting]), asked()).log_probs
    together = ask(expert(store, 20), asked()).log_probs[:, [EVERY.index(setting)]]
    torch.testing.assert_close(alone, together, equal_nan=True)


@pytest.mark.parametrize(
    ("counted", "features", "similarity", "expected"),
    [
        ((4, 1), False, "do_not_recomp_l2", 4),
        ((4, 0), False, "do_not_recomp_l2", 20),
        ((4, 1), True, "do_not_recomp_l2", 20),
        ((4, 1), False, "l2", 20),
        ((64,), False, "do_not_recomp_l2", 20),
    ],
)
def test_no_more_neighbours_are_looked_for_than_count(
    store: Datastore,
    counted: tuple[int, ...],
    features: bool,
    similarity: str,
    expected: int,
) -> None:
    """What is said of those is the same, by brute force."""
    settings = [KnnSetting(0, k, 9.0) for k in counted]
    index, card = build_index(store.full_keys(), "Flat")
    opened = Opened("knn", KIND, KnnOptions(k=20), None)
    opened = replace(opened, parts=LocalRetriever(SearchIndex(index, card), store, similarity))
    made = KIND.make(opened, Models(None, WIDTH, 2, {}), settings, features)
    assert made.k == expected
    question = asked()
    found, plain = ask(made, question).log_probs, Plain(store, question, 20)
    for column, setting in zip(found.T, settings, strict=True):
        assert_close(column, plain.log_probs(setting))


def test_settings_may_come_twice(store: Datastore) -> None:
    found = ask(expert(store, 20, [EVERY[1], EVERY[30], EVERY[1]]), asked()).log_probs
    assert torch.equal(found[:, 0], found[:, 2])


@pytest.mark.parametrize(("recipe", "nprobe", "k"), [("IVF32,Flat", 1, 100), ("IVF4,PQ2x4", 4, 30)])
def test_of_what_an_approximate_index_finds(
    store: Datastore, recipe: str, nprobe: int, k: int
) -> None:
    """One list of some ten entries, so many are missing; and distances in another order."""
    searcher = retriever(store, recipe, nprobe=nprobe)
    near = searcher.search(asked().contexts.keys, k)
    said = ask(KnnExpert(searcher, k, EVERY, features=True), asked())
    plain = Plain(store, asked(), near.ids)
    for column, setting in zip(said.log_probs.T, EVERY, strict=True):
        assert_close(column, plain.log_probs(setting))
    for name, feature in plain.features(k).items():
        assert_close(said.features[name], feature)


def test_merged_entries_count_as_often_as_they_were(tmp_path: Path) -> None:
    """Also where fewer than k count. Their text is gone, so none shares a suffix."""
    store = write_compressed(tmp_path / "store")
    found = ask(expert(store, 20), asked(9)).log_probs
    plain = Plain(store, asked(9), 20)
    for column, setting in zip(found.T, EVERY, strict=True):
        assert_close(column, plain.log_probs(setting))
        assert bool(column.isnan().all()) is (setting.suffix > 0)


def test_what_is_unknown_is_shared_with_nobody(tmp_path: Path) -> None:
    """Neither the first entry, before which nothing stands, nor an unknown context matches."""
    store = write_store(tmp_path / "store", np.zeros((2, WIDTH), np.float32), np.array([3, 3]))
    question = asking(
        torch.zeros(2, WIDTH), torch.tensor([3, 3]), torch.tensor([[-1] * 4, [3, -1, -1, -1]])
    )
    found = ask(expert(store, 2, [KnnSetting(suffix) for suffix in range(4)]), question)
    assert_close(found.log_probs, [[0.0, *[math.nan] * 3], [0.0, 0.0, math.nan, math.nan]])


def test_queries_at_a_time_change_nothing(store: Datastore) -> None:
    together = ask(expert(store, 20, features=True), asked())
    knn = expert(store, 20, features=True)
    parts = [ask(knn, asked()[start : start + 7]) for start in range(0, TOKENS, 7)]
    assert_same(joined(parts), together)


def test_the_search_is_timed(store: Datastore) -> None:
    one = expert(store, 20)
    assert one.search_seconds == 0
    ask(one, asked())
    assert one.search_seconds > 0


@pytest.mark.parametrize("k", [5, 20, 100])
def test_features_are_plain_loops(store: Datastore, k: int) -> None:
    found = ask(expert(store, k, features=True), asked()).features
    expected = Plain(store, asked(), k).features(k)
    assert set(found) == set(expected)
    for name, feature in expected.items():
        assert_close(found[name], feature)


@pytest.mark.parametrize("settings", [EVERY[:1], EVERY[-1:], EVERY[4:30]])
def test_features_do_not_depend_on_the_settings(
    store: Datastore, settings: list[KnnSetting]
) -> None:
    found = ask(expert(store, 20, settings, features=True), asked()).features
    expected = ask(expert(store, 20, features=True), asked()).features
    for name, feature in expected.items():
        assert torch.equal(found[name].nan_to_num(-1), feature.nan_to_num(-1))


def test_features_are_left_out_and_change_no_prediction(store: Datastore) -> None:
    plain = ask(expert(store, 20), asked())
    assert plain.features == {}
    featured = ask(expert(store, 20, features=True), asked())
    torch.testing.assert_close(plain.log_probs, featured.log_probs, equal_nan=True)


def test_a_second_datastore_has_its_own_names(store: Datastore) -> None:
    second = KnnExpert(retriever(store), 20, EVERY[:1], features=True, name="knn2")
    assert all(name.startswith("knn2_") for name in ask(second, asked()).features)


@pytest.mark.parametrize("k", [1, 8, 1024])
def test_the_grid_of_a_score_table(k: int) -> None:
    grid = knn_grid(k)
    assert len(set(grid)) == len(grid)
    assert {s.temperature for s in grid if not s.suffix and not s.k} == set(TEMPERATURES)
    assert {s.k for s in grid if s.k} == {fewer for fewer in (1, 4, 16, 64, 256) if fewer < k}
    assert {s.suffix for s in grid} == {0, 1, 2, 3}
    assert (min(TEMPERATURES), max(TEMPERATURES)) == (0.25, 512)


# The others


def text(length: int = 400) -> list[int]:
    return np.random.default_rng(3).zipf(1.4, length).clip(1, VOCABULARY).astype(int).tolist()


def counted(order: int = CONTEXT + 1) -> NGramModel:
    return NGramModel.count(np.array(text()), VOCABULARY + 1, order, progress=False)


def read(tokens: list[int]) -> Question:
    return asking(torch.zeros(len(tokens), 1), torch.tensor(tokens), contexts(tokens))


@pytest.mark.parametrize("order", [1, 3, 5])
def test_ngrams_are_scored_as_the_text_is(order: int) -> None:
    tokens = text(500)[300:]
    found = ask(NGramExpert(counted(order), features=True), read(tokens))
    windows = contexts(tokens).flip(1).numpy()
    after = counted(order).after(windows)
    assert found.log_probs.shape == (len(tokens), 1)
    assert found.log_probs[:, 0].tolist() == after.log_prob(np.array(tokens)).tolist()
    assert found.features["ngram_length"].tolist() == after.lengths.tolist()
    assert found.features["ngram_count"].tolist() == after.counts.tolist()
    assert found.features["ngram_types"].tolist() == after.types.tolist()


def test_ngrams_without_features() -> None:
    plain = ask(NGramExpert(counted()), read(text(50)))
    featured = ask(NGramExpert(counted(), features=True), read(text(50)))
    assert plain.features == {}
    assert torch.equal(plain.log_probs, featured.log_probs)
    assert NGramExpert(counted(3)).settings == [{"order": 3}]


def test_ngrams_longer_than_the_context_are_a_mistake() -> None:
    with pytest.raises(AssertionError):
        NGramExpert(counted(CONTEXT + 2))


def softmax_lm() -> TransformerLM:
    """A language model that is nothing but its output layer."""
    torch.manual_seed(0)
    model = nn.Module()
    model.decoder = nn.Module()
    model.decoder.adaptive_softmax = None
    model.decoder.output_layer = nn.Linear(WIDTH, VOCABULARY)
    return TransformerLM(model)


def test_the_shape_expert_has_features_alone() -> None:
    found = ask(ShapeExpert(softmax_lm()), asked())
    with torch.no_grad():
        layer = softmax_lm().decoder.output_layer
        probs = layer(asked().contexts.features).double().softmax(dim=1)
    assert ShapeExpert.settings == ()
    assert found.log_probs.shape == (TOKENS, 0)
    assert_close(found.features["lm_entropy"], (-(probs * probs.log()).sum(dim=1)).tolist())
    assert_close(found.features["lm_top"], probs.amax(dim=1).log().tolist())


def test_a_second_model_goes_by_features_of_its_own() -> None:
    question = asked()
    theirs = torch.randn(TOKENS, WIDTH, generator=torch.manual_seed(8))
    contexts = replace(question.contexts, others={"lm2": theirs})
    found = ask(LMExpert(softmax_lm(), name="lm2"), replace(question, contexts=contexts))
    with torch.no_grad():
        expected = softmax_lm().decoder.output_layer(theirs).double().log_softmax(dim=1)
    assert found.log_probs.shape == (TOKENS, 1)
    assert_close(
        found.log_probs, expected.gather(1, question.targets[:, None]).tolist(), tolerance=1e-5
    )
    assert found.features == {}
    assert list(LMExpert.settings) == [{}]


@pytest.mark.parametrize("kind", ["knn", "ngram", "lm_shape"])
def test_features_do_not_know_the_target(store: Datastore, kind: str) -> None:
    """Whatever the targets are, a mixer sees the same."""
    one = {
        "knn": lambda: expert(store, 20, features=True),
        "ngram": lambda: NGramExpert(counted(), features=True),
        "lm_shape": lambda: ShapeExpert(softmax_lm()),
    }[kind]()
    question = asked()
    expected = ask(one, question)
    assert expected.features
    for shift in range(1, VOCABULARY):
        targets = (question.targets + shift) % VOCABULARY
        other = replace(question, targets=targets)
        found = ask(one, other)
        if kind != "lm_shape":
            assert not torch.equal(found.log_probs, expected.log_probs)
        for name, feature in expected.features.items():
            assert torch.equal(found.features[name].nan_to_num(-1), feature.nan_to_num(-1))
