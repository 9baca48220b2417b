"""Skipping searches: planted answers, plain rules, and a mixture whose queries are counted."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BLOCKS, Lab, must, run
from stores import Question, asking, assert_helps
from torch import Tensor

from fairseq_knnlm.calibration.losses import tensors
from fairseq_knnlm.calibration.search import expert_sets, fit
from fairseq_knnlm.calibration.skipping import COSTS, SHARES, skipped, skipping_costs
from fairseq_knnlm.calibration.stored import Calibration, read_calibration, write_calibration
from fairseq_knnlm.calibration.table import ScoreTable
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.experts.contract import Timeless
from fairseq_knnlm.experts.dense import DensePrediction
from fairseq_knnlm.experts.knn import KnnSetting
from fairseq_knnlm.experts.lm import KeyExpert
from fairseq_knnlm.lm.contexts import Contexts
from fairseq_knnlm.mixture.components import LM, Component
from fairseq_knnlm.mixture.mixers import ALONE, Fixed, Gate, Skip
from fairseq_knnlm.mixture.model import MixtureLM
from fairseq_knnlm.mixture.skipping import SkippingMixtureLM
from fairseq_knnlm.runs.opening import find_skipping
from fairseq_knnlm.tasks.checks import check
from fairseq_knnlm.tasks.flags import KnnlmConfig

ROWS, WIDTH, TYPES = 16000, 6, 7
KNN = Component("knn", vars(KnnSetting()))
CACHE = Component("cache", {"window": 9})
SHAPES = {"knn": KNN, "cache": CACHE}


def planted(seed: int, rows: int = ROWS) -> ScoreTable:
    """Neighbours that know half of the tokens, by the sign of the key's first number, and
    nothing of the others.
    """
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(rows, WIDTH)).astype(np.float16)
    known = keys[:, 0] > 0
    knn = np.where(known, -0.2, -8.0) + 0.1 * rng.normal(size=rows)
    columns = {
        "lm": (-2 + 0.3 * rng.normal(size=rows)).astype(np.float32),
        "knn": knn.astype(np.float32)[:, None],
        "knn_top": (known + 0.01 * rng.normal(size=rows)).astype(np.float32),
        "lm_key": keys,
    }
    card = {
        "experts": {"knn": [KNN.setting]},
        "features": ["knn_top", "lm_key"],
        "described": {"knn": {}},
        "datastores": ["d" * 64],
        "model": "m" * 64,
        "split": "valid",
    }
    return ScoreTable(columns, card)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return fit(planted(1))


def test_half_the_searches_go_at_no_loss(calibration: Calibration) -> None:
    """On new text, where the other half is all that matters."""
    table = planted(2)
    skip = calibration.skip(["knn"])
    assert skip is not None
    shares, perplexities = zip(*skipped(calibration, skip, table), strict=True)
    np.testing.assert_allclose(shares, SHARES, atol=0.03)
    none, quarter, half, most, every = perplexities
    assert quarter == pytest.approx(none, rel=0.005)
    assert half == pytest.approx(none, rel=0.03)
    assert half < 0.5 * every
    assert half < most < every
    assert every == pytest.approx(math.exp(-table["lm"].mean()), rel=1e-5)


def test_every_share_is_reached(calibration: Calibration) -> None:
    table, (skip,) = planted(3), calibration.skips
    scores = skip.scores(tensors(table.features(skip.gate.features))).numpy()
    for share in np.linspace(0, 1, 21):
        assert np.mean(scores < skip.threshold(share)) == pytest.approx(share, abs=0.03)


def test_the_gate_that_skips_sees_nothing_of_the_neighbours(calibration: Calibration) -> None:
    (skip,) = calibration.skips
    assert list(skip.gate.features) == ["lm_key"]
    assert skip.experts == ["knn"]
    stack = calibration.find(["knn"], "gate")
    assert stack is not None
    assert list(stack.mixer.features) == ["knn_top"]


def test_a_table_without_keys_gives_no_gate() -> None:
    table = planted(1, rows=400)
    bare = replace(table, card=table.card | {"features": ["knn_top"]})
    assert fit(bare).skips == ()


def test_the_rest_is_fitted_too() -> None:
    assert expert_sets(["knn", "cache", "ngram"]) == [
        *(("knn",), ("cache",), ("ngram",)),
        *(("knn", "cache"), ("knn", "cache", "ngram"), ("cache", "ngram")),
    ]
    assert expert_sets(["knn", "knn2"]) == [("knn",), ("knn2",), ("knn", "knn2")]


def test_costs_leave_out_what_a_table_cannot_tell(calibration: Calibration) -> None:
    table = planted(2, rows=500)
    assert COSTS == ("experts", "0%", "25%", "50%", "75%", "100%")
    ((experts, *costs),) = skipping_costs(calibration, table)
    assert experts == "knn"
    assert costs == [
        f"{perplexity:.2f} ({share:.1%})"
        for share, perplexity in skipped(calibration, calibration.skips[0], table)
    ]
    del table.columns["lm_key"]
    assert skipping_costs(calibration, table) == []


def test_quantiles_are_interpolated() -> None:
    skip = Skip(gate_on_the_first_number(), np.linspace(-5, 5, 101).tolist())
    assert skip.threshold(0.25) == pytest.approx(-2.5)
    assert skip.threshold(0.333) == pytest.approx(-5 + 3.33)
    assert skip.threshold(0) == -math.inf
    assert skip.threshold(1) == math.inf


def test_what_is_written_is_read(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    write_calibration(path, calibration)
    found = read_calibration(path, calibration.datastores)
    assert found is not None
    (ours,), (theirs,) = calibration.skips, found.skips
    assert theirs.quantiles == ours.quantiles
    assert theirs.experts == ours.experts
    features = tensors(planted(2, rows=50).features(["lm_key"]))
    assert torch.equal(theirs.scores(features), ours.scores(features))
    assert found.skip(["knn"]) is theirs
    assert found.skip(["knn", "cache"]) is None


def gate_on_the_first_number(experts: Sequence[str] = ("knn", "cache")) -> Gate:
    """Neighbours weigh the more, the greater the key's first number is."""
    gate = Gate([LM, *(SHAPES[name] for name in experts)], ["lm_key"], WIDTH, hidden=())
    last = gate.layers[-1]
    with torch.no_grad():
        last.weight[1 + list(experts).index("knn"), 0] = 1.0
    return gate.eval()


class Softmax(Timeless):
    """An expert whose distribution is a softmax of the key; remembers what it was asked."""

    def __init__(self, name: str, seed: int) -> None:
        self.name = name
        self.settings = [SHAPES[name].setting]
        self.asked: list[Tensor] = []
        self.weights = torch.randn(WIDTH, TYPES, generator=torch.manual_seed(seed))

    def predict(self, contexts: Contexts) -> DensePrediction:
        assert contexts.keys is not None
        assert len(contexts) == len(contexts.keys) == len(contexts.before)
        self.asked.append(contexts.rows)
        found = (contexts.keys @ self.weights).log_softmax(dim=1)
        return DensePrediction(
            lambda tokens: found.gather(1, tokens[:, None])[:, 0],
            lambda: found,
            {f"{self.name}_first": contexts.keys[:, 0]},
        )


class Uniform(Timeless):
    """A language model that knows nothing."""

    name, settings = "lm", [{}]

    def predict(self, contexts: Contexts) -> DensePrediction:
        found = torch.full((len(contexts), TYPES), -math.log(TYPES))
        return DensePrediction(lambda tokens: found[:, 0], lambda: found)


def text() -> Question:
    """80 tokens."""
    rng = torch.manual_seed(3)
    keys = torch.randn(80, WIDTH, generator=rng).half().float()
    targets = torch.randint(TYPES, (80,), generator=rng)
    return asking(keys, targets, rows=torch.arange(80) + 1000)


def mixtures(share: float) -> tuple[MixtureLM, MixtureLM, SkippingMixtureLM, Softmax]:
    """Of all experts, of all but the neighbours, and one that skips; and the neighbours."""
    knn, cache, lm = Softmax("knn", 1), Softmax("cache", 2), Uniform()
    experts = [knn, cache, KeyExpert()]
    gate = Gate([LM, KNN, CACHE], ["cache_first", "knn_first"], 2, hidden=(3,))
    torch.nn.init.normal_(gate.layers[-1].weight, generator=torch.manual_seed(5))
    rest = Fixed((LM, CACHE), (0.4, 0.6))
    skip = Skip(gate_on_the_first_number(), ())
    features = {"lm_key": text().contexts.keys}
    quantiles = np.quantile(skip.scores(features).numpy(), np.linspace(0, 1, 101)).tolist()
    skip = replace(skip, quantiles=quantiles)
    skipping = SkippingMixtureLM(lm, experts, gate.eval(), rest, skip, share)
    return MixtureLM(lm, experts, gate), MixtureLM(lm, [cache], rest), skipping, knn


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_only_what_promises_to_help_is_searched(share: float) -> None:
    everything, rest, skipping, knn = mixtures(share)
    asked = text()
    assert asked.contexts.keys is not None
    found = skipping.score(asked.contexts, asked.targets)
    # What promises most is what has the greatest first number, whatever the others.
    chosen = asked.contexts.keys[:, 0].argsort()[round(share * 80) :].sort().values
    assert [rows.tolist() for rows in knn.asked] == (
        [(chosen + 1000).tolist()] if share < 1 else []
    )
    assert (skipping.tokens, skipping.searched) == (80, len(chosen))
    expected = rest.score(asked.contexts, asked.targets).log_probs.clone()
    expected[chosen] = everything.score(asked.contexts, asked.targets).log_probs[chosen]
    torch.testing.assert_close(found.log_probs, expected)


def test_it_stays_a_distribution() -> None:
    """Whatever token comes, the same searches are made, and probabilities sum to 1."""
    skipping, contexts = mixtures(0.5)[2], text().contexts
    total = torch.zeros(80)
    for token in range(TYPES):
        total += skipping.score(contexts, torch.full((80,), token)).log_probs.exp()
    torch.testing.assert_close(total, torch.ones(80))
    assert skipping.searched == 40 * TYPES
    every = skipping.predict(contexts).log_probs()
    torch.testing.assert_close(every.exp().sum(dim=1), torch.ones(80))
    one = skipping.predict(contexts).score(torch.full((80,), 2)).log_probs
    torch.testing.assert_close(every[:, 2], one)


def test_neighbours_alone_leave_the_language_model() -> None:
    knn, asked = Softmax("knn", 1), text()
    skip = Skip(gate_on_the_first_number(["knn"]), [0.0] * 101)
    mixture = SkippingMixtureLM(
        Uniform(), [knn, KeyExpert()], Fixed((LM, KNN), (0.5, 0.5)), ALONE, skip, 1.0
    )
    found = mixture.score(asked.contexts, asked.targets)
    assert torch.equal(found.log_probs, torch.full((80,), -math.log(TYPES)))
    assert not knn.asked


def flags(**given: Any) -> SimpleNamespace:
    """Flags that pass, but for those given."""
    defaults = KnnlmConfig()
    return SimpleNamespace(
        **{**vars(defaults), "tokens_per_sample": 8, "knnlm": True, "dstore_filename": "x", **given}
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"skip_searches": -0.1}, ["share", "0 to 1"]),
        ({"skip_searches": 1.5}, ["share", "1.5"]),
        ({"skip_searches": 0.5, "score_table": "t.npz"}, ["score table", "--skip-searches"]),
        ({"skip_searches": 0.5, "knnlm": False, "dstore_filename": None}, ["--experts with knn"]),
    ],
)
def test_flags_that_contradict_are_refused(given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check(flags(**given))
    assert all(word in str(caught.value) for word in words), caught.value


def test_flags_that_agree_pass() -> None:
    for share in (None, 0.0, 0.5, 1.0):
        check(flags(skip_searches=share))


def test_nothing_fitted_is_refused(calibration: Calibration) -> None:
    skip, rest = vars(find_skipping("auto", calibration, ["knn"])).values()
    assert skip is calibration.skips[0]
    assert list(rest.components) == [LM]
    for bad in (None, replace(calibration, skips=())):
        with pytest.raises(ConfigError) as caught:
            find_skipping("auto", bad, ["knn"])
        assert_helps(caught, "with knn", "fairseq-knnlm tune")
    with pytest.raises(ConfigError) as caught:
        find_skipping("auto", calibration, ["knn", "cache"])
    assert_helps(caught, "with knn+cache")
    with pytest.raises(ConfigError) as caught:
        find_skipping("auto", calibration, ["cache"])
    assert_helps(caught, "no searches to skip")


def test_the_commands_people_type(lab: Lab, datastore: Path, tmp_path: Path) -> None:
    """Tune; then none, some and all searches skipped."""
    store, results = tmp_path / "store", tmp_path / "results.json"
    shutil.copytree(datastore, store)
    memory = ["--dstore-filename", store, "--k", 32, "--experts", "knn,cache,ngram"]
    refused = run("fairseq-eval-lm", *lab.command("test", *memory, "--skip-searches", 0.5))
    assert refused.code != 0
    assert "fit it with `fairseq-knnlm tune`" in refused.out

    said = must(
        *("fairseq-knnlm", "tune", "--dstore", store, "--data", lab.data),
        *("--path", lab.checkpoint(), *BLOCKS, "--sample-break-mode", "none", "--cpu"),
        *("--k", 32),
    )
    assert "where --skip-searches leaves out a share" in said
    costs = r"^\| knn\+cache\+ngram +\| +[\d.]+ \(0\.0%\) \|.* [\d.]+ \(100\.0%\) \|$"
    assert re.search(costs, said, re.M)

    def perplexity(*more: object) -> float:
        lab.evaluate("test", *memory, *more, "--results-json", results)
        return json.loads(results.read_text())["perplexity"]

    everything, rest = perplexity(), perplexity("--experts", "cache,ngram")
    assert "searches_skipped" not in json.loads(results.read_text())
    assert perplexity("--skip-searches", 0) == pytest.approx(everything, rel=1e-5)
    assert perplexity("--skip-searches", 1) == pytest.approx(rest, rel=1e-5)
    assert json.loads(results.read_text())["searches_skipped"] == 1
    perplexity("--skip-searches", 0.5)
    assert 0.2 < json.loads(results.read_text())["searches_skipped"] < 0.8
