"""Who is asked, what is mixed, and that nobody could have known the answer."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stores import asking, build_index, contexts, write_store
from torch import Tensor

from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.experts.cache import CacheExpert, CacheSetting
from fairseq_knnlm.experts.contract import Distribution, Expert, Timeless
from fairseq_knnlm.experts.kneser_ney import NGramModel
from fairseq_knnlm.experts.knn import KnnExpert, KnnSetting
from fairseq_knnlm.experts.lm import KeyExpert, LMExpert, ShapeExpert
from fairseq_knnlm.experts.ngram import NGramExpert
from fairseq_knnlm.experts.pointers import PointerExpert
from fairseq_knnlm.index.search import SearchIndex
from fairseq_knnlm.lm.contexts import Contexts
from fairseq_knnlm.lm.transformer import TransformerLM
from fairseq_knnlm.mixture.components import LM, Component
from fairseq_knnlm.mixture.mixers import ALONE, Bins, Fixed, Gate, Mixer, Skip
from fairseq_knnlm.mixture.model import MixtureLM
from fairseq_knnlm.mixture.skipping import SkippingMixtureLM
from fairseq_knnlm.retrieval.local import LocalRetriever

TOKENS = 5


class Says(Timeless):
    """An expert with an answer ready."""

    def __init__(
        self, name: str, columns: Sequence[Sequence[float]], features: dict[str, Tensor]
    ) -> None:
        self.name = name
        self.columns = torch.tensor(columns).T
        self.settings: list[dict[str, Any]] = [{"number": n} for n in range(len(columns))]
        if name == "lm":
            self.settings = [{}]
        self.features = features
        self.asked: list[Contexts] = []

    def predict(self, contexts: Contexts) -> Says:
        self.asked.append(contexts)
        return self

    def log_prob(self, tokens: Tensor) -> Tensor:
        return self.columns

    def log_probs(self, setting: int) -> Tensor:
        raise NotImplementedError


def base() -> Tensor:
    return torch.linspace(-3, -1, TOKENS)


def lm() -> Says:
    return Says("lm", [base().tolist()], {})


def knn() -> Says:
    """Two settings; nothing to say of the last token."""
    likely = [math.log(0.5)] * (TOKENS - 1) + [math.nan]
    unlikely = [math.log(0.01)] * (TOKENS - 1) + [math.nan]
    return Says("knn", [likely, unlikely], {"knn_distances": torch.arange(TOKENS) * 1.0})


def cache() -> Says:
    return Says("cache", [[math.log(0.25)] * TOKENS], {"cache_size": torch.ones(TOKENS, 2)})


def mixed(experts: Sequence[Expert], mixer: Mixer) -> Tensor:
    asked = asking(torch.zeros(TOKENS, 2), torch.arange(TOKENS))
    return MixtureLM(lm(), experts, mixer).score(asked.contexts, asked.targets).log_probs


def test_without_experts_the_language_model_is_all() -> None:
    assert torch.equal(mixed([], ALONE), base())


def test_experts_are_asked_though_nothing_is_mixed() -> None:
    """For a score table; the language model's word is handed on to the bit."""
    one, asked = knn(), asking(torch.zeros(TOKENS, 2), torch.arange(TOKENS))
    found = MixtureLM(lm(), [one], ALONE).score(asked.contexts, asked.targets)
    assert torch.equal(found.log_probs, base())
    assert torch.equal(found.columns["knn"].nan_to_num(9), one.columns.nan_to_num(9))
    assert list(found.features) == ["knn_distances"]


@pytest.mark.parametrize("number", [0, 1])
def test_the_columns_of_the_components_are_mixed(number: int) -> None:
    """In whatever order they stand; who abstains leaves its weight to the others."""
    components = [Component("cache", {"number": 0}), LM, Component("knn", {"number": number})]
    found = mixed([knn(), cache()], Fixed(components, (0.2, 0.5, 0.3)))
    theirs = (0.5, 0.01)[number]
    ours = base().double().exp()
    expected = 0.2 * 0.25 + 0.5 * ours + 0.3 * theirs
    expected[-1] = (0.2 * 0.25 + 0.5 * ours[-1]) / 0.7
    torch.testing.assert_close(found.double(), expected.log())


def test_two_settings_of_one_expert() -> None:
    components = [LM, *(Component("knn", {"number": number}) for number in (1, 0))]
    expected = 0.5 * base().exp() + 0.3 * 0.01 + 0.2 * 0.5
    expected[-1] = base()[-1].exp()
    found = mixed([knn()], Fixed(components, (0.5, 0.3, 0.2)))
    torch.testing.assert_close(found, expected.log())


def test_weights_go_by_features_of_any_expert() -> None:
    """Those of the neighbours weigh the cache."""
    mixer = Bins([LM, Component("cache", {"number": 0})], [1.5], [(0.0, 1.0), (1.0, 0.0)])
    expected = torch.cat([torch.full((2,), math.log(0.25)), base()[2:]])
    torch.testing.assert_close(mixed([cache(), knn()], mixer), expected)


def test_a_setting_that_nobody_has_is_a_mistake() -> None:
    with pytest.raises(AssertionError):
        MixtureLM(lm(), [knn()], Fixed([LM, Component("knn", {"number": 2})], (0.5, 0.5)))


def test_a_batch_of_nothing() -> None:
    nothing = asking(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))
    mixture = MixtureLM(
        Says("lm", [[]], {}),
        [Says("knn", [[]], {})],
        Fixed([LM, Component("knn", {"number": 0})], (0.5, 0.5)),
    )
    assert mixture.score(nothing.contexts, nothing.targets).log_probs.shape == (0,)


def test_shares_of_one_token_add_up_without_underflow() -> None:
    """Against float64, with shares that float32 holds only as logs."""
    tokens = torch.tensor([[0, 2, 2, 1], [3, 3, 3, 3]])
    shares = torch.tensor([[-0.1, -300.0, -301.0, -math.inf], [math.nan] * 4])
    found = Distribution(tokens, shares).over(4)
    assert found[0, 2].item() == pytest.approx(-300 + math.log1p(math.exp(-1)))
    assert found[0, 0].item() == pytest.approx(-0.1)
    assert found[0, [1, 3]].isneginf().all()
    assert found[1].isnan().all()


# Everything together: a language model, neighbours, pointers, a cache and n-grams

WIDTH, VOCABULARY, EOS, LENGTH = 8, 12, 2, 70


def text(seed: int, length: int = LENGTH) -> list[int]:
    """With empty lines, and stretches that come again."""
    rng = random.Random(seed)
    tokens = rng.choices(range(VOCABULARY), k=length)
    tokens[30:45] = tokens[3:18]
    tokens[20:22] = tokens[50:52] = [EOS] * 2
    return tokens


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    values = np.array(text(1, 200))
    keys = np.random.default_rng(2).normal(size=(200, WIDTH)).astype(np.float32)
    return write_store(tmp_path / "store", keys, values, vocabulary=VOCABULARY)


def softmax_lm(seed: int) -> TransformerLM:
    """A language model that is nothing but its output layer."""
    torch.manual_seed(seed)
    model = torch.nn.Module()
    model.decoder = torch.nn.Module()
    model.decoder.adaptive_softmax = None
    model.decoder.output_layer = torch.nn.Linear(WIDTH, VOCABULARY)
    return TransformerLM(model)


def experts(store: Datastore) -> list[Expert]:
    """All that there are, as new: the cache has read nothing."""
    index, card = build_index(store.full_keys(), "Flat")
    retriever = LocalRetriever(SearchIndex(index, card), store, "l2")
    near = [KnnSetting(suffix, k, 2.0) for suffix, k in ((0, 0), (0, 4), (1, 0), (2, 8))]
    recent = [CacheSetting(suffix, 0.5, window) for suffix, window in ((0, 40), (0, 3), (1, 40))]
    counts = NGramModel.count(store.values, VOCABULARY, progress=False)
    return [
        KnnExpert(retriever, 16, near, features=True),
        PointerExpert(retriever, 16, near, least=4, features=True, name="knn2"),
        CacheExpert(recent, EOS, reset=True, features=True),
        NGramExpert(counts, features=True),
        LMExpert(softmax_lm(4), name="lm2"),
        ShapeExpert(softmax_lm(3)),
        KeyExpert(),
    ]


def read(tokens: Sequence[int], keys: Tensor) -> Contexts:
    """The contexts of a text: each representation knows what stands before it."""
    sums = torch.zeros(len(tokens), WIDTH)
    one_hot = torch.nn.functional.one_hot(torch.tensor(tokens), WIDTH + 8)[:, :WIDTH].float()
    sums[1:] = one_hot.cumsum(dim=0)[:-1]
    features = keys[: len(tokens)] + 0.1 * sums
    asked = asking(features, torch.tensor(tokens), contexts(list(tokens)))
    return replace(asked.contexts, others={"lm2": features.flip(1)})


FEATURES = ["cache_shared", "knn_distances", "knn2_shared", "ngram_length", "lm_entropy"]
INPUTS = 3 + 5 + 4 + 1 + 1
KINDS = ["fixed", "bins", "gate", "skip"]


def mixture(store: Datastore, kind: str, abstain: str = "share") -> MixtureLM:
    """Everyone in every setting, with weights as if fitted."""
    everyone = experts(store)
    components = [LM, *(Component(one.name, dict(s)) for one in everyone for s in one.settings)]
    weights = torch.rand(4, len(components), generator=torch.manual_seed(6)) + 0.1
    rows = (weights / weights.sum(dim=1, keepdim=True)).tolist()
    first = LMExpert(softmax_lm(3))
    if kind in ("fixed", "bins"):
        mixers: dict[str, Mixer] = {
            "fixed": Fixed(components, rows[0], abstain=abstain),  # type: ignore[arg-type]
            "bins": Bins(components, (6.0, 9.0, 12.0), rows, abstain=abstain),  # type: ignore[arg-type]
        }
        return MixtureLM(first, everyone, mixers[kind])
    gate = random_gate(components, FEATURES, INPUTS, abstain)
    if kind == "gate":
        return MixtureLM(first, everyone, gate)
    others = [one for one in components if not one.expert.startswith("knn")]
    rest = random_gate(others, ["ngram_length", "cache_shared"], 4, abstain)
    chosen = [LM, Component("knn", {}), Component("cache", {})]
    skip = Skip(random_gate(chosen, ["lm_key"], WIDTH, abstain), np.linspace(-9, 9, 101).tolist())
    return SkippingMixtureLM(first, everyone, gate, rest, skip, 0.5)


def random_gate(
    components: list[Component], features: list[str], inputs: int, abstain: str
) -> Gate:
    """As if trained: its last layer is no longer zero."""
    torch.manual_seed(3)
    gate = Gate(components, features, inputs, hidden=(8, 8), abstain=abstain)  # type: ignore[arg-type]
    torch.nn.init.normal_(gate.layers[-1].weight)
    return gate.eval()


def keys() -> Tensor:
    return torch.randn(LENGTH, WIDTH, generator=torch.manual_seed(5))


@pytest.mark.parametrize("abstain", ["share", "lm"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_vocabulary_sums_to_one_and_agrees_with_each_token(
    store: Datastore, kind: str, abstain: str
) -> None:
    """Every expert in every setting, and the mixture; also where some abstain."""
    tokens = text(7)
    predicted = mixture(store, kind, abstain).predict(read(tokens, keys()))
    every = predicted.log_probs()
    assert every.shape == (LENGTH, VOCABULARY)
    torch.testing.assert_close(every.exp().sum(dim=1), torch.ones(LENGTH))
    one = torch.stack(
        [predicted.score(torch.full((LENGTH,), token)).log_probs for token in range(VOCABULARY)],
        dim=1,
    )
    torch.testing.assert_close(every, one, rtol=1e-4, atol=1e-4)


def test_every_expert_sums_to_one_and_agrees_with_each_token(store: Datastore) -> None:
    abstained = 0
    for expert in [*experts(store), LMExpert(softmax_lm(3))]:
        predicted = expert.predict(read(text(7), keys()))
        columns = torch.stack(
            [predicted.log_prob(torch.full((LENGTH,), token)) for token in range(VOCABULARY)], dim=1
        )
        for place in range(len(expert.settings)):
            found = predicted.log_probs(place)
            whole = found if isinstance(found, Tensor) else found.over(VOCABULARY)
            torch.testing.assert_close(
                whole, columns[:, :, place], rtol=1e-4, atol=1e-4, equal_nan=True
            )
            speaks = ~whole.isnan().any(dim=1)
            assert torch.equal(speaks, ~whole.isnan().all(dim=1))
            torch.testing.assert_close(
                whole[speaks].exp().sum(dim=1), torch.ones(int(speaks.sum()))
            )
            abstained += int((~speaks).sum())
    assert abstained > LENGTH


def assert_identical(found: Tensor, expected: Tensor) -> None:
    """Bit for bit, also where there is no number."""
    assert torch.equal(found.nan_to_num(nan=7e7), expected.nan_to_num(nan=7e7))


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_can_know_the_answer(store: Datastore, kind: str) -> None:
    """Another token, and another text after it: all that is said before stays, bit for bit.

    Predictions of every token, features and weights, whatever is told of the batches in between.
    """
    tokens, place = text(7), 40
    others = tokens[:place] + [(token + 5) % VOCABULARY for token in tokens[place:]]
    said = []
    for version in (tokens, others):
        model, whole = mixture(store, kind), read(version, keys())
        answers = []
        for part in (slice(0, 25), slice(25, LENGTH)):
            predicted = model.predict(whole[part])
            answers.append((predicted.log_probs(), dict(predicted.features)))
            model.observe(torch.tensor(version[part]))
        said.append(answers)
    for (ours, features), (theirs, their_features) in zip(*said, strict=True):
        before = place + 1 - (0 if len(ours) == 25 else 25)
        assert_identical(ours[:before], theirs[:before])
        assert set(features) == set(their_features)
        for name, feature in features.items():
            assert_identical(feature[:before].float(), their_features[name][:before].float())
    assert not torch.equal(said[0][1][0], said[1][1][0])


def test_weights_depend_on_contexts_alone(store: Datastore) -> None:
    tokens, place = text(7), 40
    others = tokens[:place] + [(token + 5) % VOCABULARY for token in tokens[place:]]
    weights = []
    for version in (tokens, others):
        model = mixture(store, "gate")
        contexts = read(version, keys())
        predictions = {one.name: one.predict(contexts) for one in model.everyone}
        weights.append(model.weighed(predictions).log_weights)
    assert_identical(weights[0][: place + 1], weights[1][: place + 1])
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_in_pieces_is_the_text(store: Datastore, kind: str) -> None:
    """Whoever remembers goes on where it stood, told what came or not."""
    tokens = text(7)
    whole = read(tokens, keys())
    expected = mixture(store, kind).predict(whole).log_probs()
    for told in (True, False):
        model, found = mixture(store, kind), []
        for start in range(0, LENGTH, 9):
            found.append(model.predict(whole[start : start + 9]).log_probs())
            if told:
                model.observe(torch.tensor(tokens[start : start + 9]))
        torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-4)


def test_texts_go_on_where_they_are_told_to(store: Datastore) -> None:
    """Three hypotheses, step by step, exchanged on the way: each as if it were read alone."""
    ways = [text(seed) for seed in (7, 8, 9)]
    together = mixture(store, "gate")
    standing, found = [0, 1, 2], [[] for _ in ways]
    for step in range(12):
        if step == 5:
            together.reorder(torch.tensor([2, 0, 2]))
            standing = [2, 0, 2]
        contexts_now = [read(ways[way], keys())[step : step + 1] for way in standing]
        asked = Contexts(
            torch.cat([one.features for one in contexts_now]),
            torch.cat([one.keys for one in contexts_now if one.keys is not None]),
            torch.cat([one.before for one in contexts_now]),
            torch.full((3,), step),
            torch.arange(3),
            {"lm2": torch.cat([one.others["lm2"] for one in contexts_now])},
        )
        for way, row in zip(standing, together.predict(asked).log_probs(), strict=True):
            found[way].append(row)
        together.observe(torch.tensor([ways[way][step] for way in standing]))
    for way, tokens in enumerate(ways):
        alone = mixture(store, "gate").predict(read(tokens, keys())[:12]).log_probs()
        rows = torch.stack(found[way])
        if way == 2:  # twice from the fifth step on
            torch.testing.assert_close(rows[5::2], rows[6::2])
            rows = torch.cat([rows[:5], rows[5::2]])
        torch.testing.assert_close(rows, alone[: len(rows)], rtol=1e-4, atol=1e-4)


def test_a_mixture_looks_back_as_far_as_any_of_its_experts() -> None:
    """Where searches are skipped pointers hang on who decides that; None is all text."""

    def reads(name: str, far: int | None) -> Says:
        one = Says(name, [[0.0] * TOKENS], {})
        one.looks_back = far  # type: ignore[assignment]
        return one

    alone = Fixed((LM,), (1.0,))
    assert MixtureLM(lm()).looks_back == 0
    assert MixtureLM(lm(), [reads("cache", 7), reads("other", 5)]).looks_back == 7
    assert MixtureLM(lm(), [reads("cache", None), reads("other", 5)]).looks_back is None
    skip = Skip(Gate((LM,), (), 0, ()), (0.0, 1.0))
    for others, pointers, expected in ((7, 63, 70), (7, 0, 7), (None, 63, None), (7, None, None)):
        experts = [reads("knn", pointers), reads("cache", others)]
        mixture = SkippingMixtureLM(lm(), experts, alone, alone, skip, 0.5)
        assert mixture.looks_back == expected


def test_catching_up_asks_only_those_that_look_back() -> None:
    """Of all contexts, and tells them what came."""
    told: list[Tensor] = []
    reader, other = Says("cache", [[0.0] * TOKENS], {}), Says("other", [[0.0] * TOKENS], {})
    reader.looks_back = 7  # type: ignore[misc]
    reader.observe = told.append  # type: ignore[method-assign]
    tokens = torch.arange(TOKENS)
    first = lm()
    MixtureLM(first, [reader, other]).catch_up(contexts(tokens.tolist()), tokens)
    assert (len(first.asked), len(reader.asked), len(other.asked)) == (0, 1, 0)
    assert torch.equal(torch.cat(told), tokens)
