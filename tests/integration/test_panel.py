"""Who is asked, and which of the columns are mixed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Lab
from stores import passage
from torch import Tensor

from fairseq_knnlm.experts.knn import Opinion, Passage
from fairseq_knnlm.mixture.components import LM, Component
from fairseq_knnlm.mixture.mixers import Bins, Fixed
from fairseq_knnlm.mixture.model import ALONE, Panel

TOKENS = 5


class Says:
    """An expert with an answer ready."""

    def __init__(
        self, name: str, columns: Sequence[Sequence[float]], features: dict[str, Tensor]
    ) -> None:
        self.name = name
        self.columns = torch.tensor(columns).T
        self.settings: list[dict[str, Any]] = [{"number": n} for n in range(len(columns))]
        self.features = features
        self.asked: list[Passage] = []

    def opinion(self, passage: Passage) -> Opinion:
        self.asked.append(passage)
        return Opinion(self.columns, self.features)


def question() -> Passage:
    return passage(torch.zeros(TOKENS, 2), torch.arange(TOKENS))


def base() -> Tensor:
    return torch.linspace(-3, -1, TOKENS)


def knn() -> Says:
    """Two settings; nothing to say of the last token."""
    likely = [math.log(0.5)] * (TOKENS - 1) + [math.nan]
    unlikely = [math.log(0.01)] * (TOKENS - 1) + [math.nan]
    return Says("knn", [likely, unlikely], {"knn_distances": torch.arange(TOKENS) * 1.0})


def cache() -> Says:
    return Says("cache", [[math.log(0.25)] * TOKENS], {"cache_size": torch.ones(TOKENS, 2)})


def test_without_experts_the_language_model_is_all() -> None:
    verdict = Panel().judge(base(), question())
    assert torch.equal(verdict.log_probs, base())
    assert verdict.opinions == {}


def test_experts_are_asked_though_nothing_is_mixed() -> None:
    """For a score table; the language model's word is handed on to the bit."""
    expert = knn()
    verdict = Panel([expert], ALONE).judge(base(), question())
    assert torch.equal(verdict.log_probs, base())
    assert verdict.opinions["knn"].log_probs is expert.columns


def test_each_expert_is_asked_once_about_the_same() -> None:
    experts, asked = [knn(), cache()], question()
    verdict = Panel(experts, Fixed([LM, Component("cache", {"number": 0})], (0.5, 0.5))).judge(
        base(), asked
    )
    assert [expert.asked for expert in experts] == [[asked], [asked]]
    assert list(verdict.opinions) == ["knn", "cache"]


@pytest.mark.parametrize("number", [0, 1])
def test_the_columns_of_the_components_are_mixed(number: int) -> None:
    """In whatever order they stand; who is silent leaves its weight to the others."""
    components = [Component("cache", {"number": 0}), LM, Component("knn", {"number": number})]
    found = Panel([knn(), cache()], Fixed(components, (0.2, 0.5, 0.3))).judge(base(), question())
    theirs = (0.5, 0.01)[number]
    lm = base().double().exp()
    expected = 0.2 * 0.25 + 0.5 * lm + 0.3 * theirs
    expected[-1] = (0.2 * 0.25 + 0.5 * lm[-1]) / 0.7
    torch.testing.assert_close(found.log_probs.double(), expected.log())


def test_two_settings_of_one_expert() -> None:
    components = [LM, *(Component("knn", {"number": number}) for number in (1, 0))]
    found = Panel([knn()], Fixed(components, (0.5, 0.3, 0.2))).judge(base(), question())
    expected = 0.5 * base().exp() + 0.3 * 0.01 + 0.2 * 0.5
    expected[-1] = base()[-1].exp()
    torch.testing.assert_close(found.log_probs, expected.log())


def test_weights_go_by_features_of_any_expert() -> None:
    """Those of the neighbours weigh the cache."""
    mixer = Bins([LM, Component("cache", {"number": 0})], [1.5], [(0.0, 1.0), (1.0, 0.0)])
    found = Panel([cache(), knn()], mixer).judge(base(), question()).log_probs
    expected = torch.cat([torch.full((2,), math.log(0.25)), base()[2:]])
    torch.testing.assert_close(found, expected)


def test_a_setting_that_nobody_has_is_a_mistake() -> None:
    with pytest.raises(AssertionError):
        Panel([knn()], Fixed([LM, Component("knn", {"number": 2})], (0.5, 0.5)))


@pytest.mark.parametrize("experts", ["knn", "cache"])
def test_nobody_is_asked_where_nothing_is_mixed(lab: Lab, datastore: Path, experts: str) -> None:
    """The whole of it: there is no setting to ask an expert for."""
    memory = ["--knnlm", "--dstore-filename", datastore, "--k", 8, "--experts", experts]
    found = lab.evaluate("test", *memory, "--mixer", "none")
    assert found == lab.evaluate("test")


def test_a_batch_of_nothing() -> None:
    silent = Says("knn", [[]], {})
    nothing = passage(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))
    mixer = Fixed([LM, Component("knn", {"number": 0})], (0.5, 0.5))
    assert Panel([silent], mixer).judge(torch.zeros(0), nothing).log_probs.shape == (0,)
