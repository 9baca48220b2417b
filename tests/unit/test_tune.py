"""Fitting mixtures from a score table, against planted answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stores import assert_helps

from fairseq_knnlm.calibration.checks import itself
from fairseq_knnlm.calibration.fitter import Fitter
from fairseq_knnlm.calibration.fitting import fit_fixed
from fairseq_knnlm.calibration.losses import log_probs, mixture_losses, tensors
from fairseq_knnlm.calibration.parts import STRETCH, Parts
from fairseq_knnlm.calibration.report import GAINS, gains, measured
from fairseq_knnlm.calibration.search import expert_sets, fit
from fairseq_knnlm.calibration.stored import (
    Calibration,
    FittedMixture,
    read_calibration,
    write_calibration,
)
from fairseq_knnlm.calibration.table import ScoreTable
from fairseq_knnlm.errors import TableError
from fairseq_knnlm.mixture.components import CONVENTIONS, LM, Component
from fairseq_knnlm.mixture.mixers import Fixed, Gate, Mixer

ROWS = 4000
#: Of the planted neighbours.
TEMPERATURES = [0.2, 1.0, 5.0, 40.0, 1000.0]


def table(
    columns: dict[str, np.ndarray],
    experts: dict[str, list[dict[str, Any]]],
    features: Sequence[str] = (),
    **card: Any,
) -> ScoreTable:
    """A score table with a card as evaluation writes it."""
    card = {
        "split": "valid",
        "model": "m" * 64,
        "datastores": ["d" * 64],
        "described": {name: {"k": 8} for name in experts},
        "experts": experts,
        "features": sorted(features),
        "k": 8,
    } | card
    return ScoreTable({name: np.float32(column) for name, column in columns.items()}, card)


def settings(*temperatures: float, suffix: int = 0) -> list[dict[str, Any]]:
    return [{"suffix": suffix, "k": 0, "temperature": each} for each in temperatures]


def planted(true: float, lmbda: float) -> ScoreTable:
    """Tokens drawn from the mixture at one temperature and one lambda; nothing else fits."""
    rng = np.random.default_rng(8)
    vocabulary, k = 12, 10
    distances = 40 * rng.random((ROWS, k))
    values = rng.integers(vocabulary, size=(ROWS, k))
    lm = rng.dirichlet(np.full(vocabulary, 0.5), size=ROWS)

    def knn(temperature: float) -> np.ndarray:
        weights = np.exp(-distances / temperature)
        spread = np.zeros((ROWS, vocabulary))
        np.add.at(spread, (np.arange(ROWS)[:, None], values), weights)
        return spread / spread.sum(axis=1, keepdims=True)

    mixed = lmbda * knn(true) + (1 - lmbda) * lm
    tokens = np.array([rng.choice(vocabulary, p=row / row.sum()) for row in mixed])
    at = (np.arange(ROWS), tokens)
    with np.errstate(divide="ignore"):
        columns = np.log(np.stack([knn(t)[at] for t in TEMPERATURES], axis=1))
    distances.sort(axis=1)
    return table(
        {"lm": np.log(lm[at]), "knn": columns, "knn_distances": distances[:, :4]},
        {"knn": settings(*TEMPERATURES)},
        ["knn_distances"],
    )


def told(rows: int = ROWS) -> ScoreTable:
    """Where the feature is positive the neighbours are right, elsewhere the language model."""
    rng = np.random.default_rng(3)
    hint = rng.normal(size=rows)
    right, wrong = math.log(0.8), math.log(0.01)
    return table(
        {
            "lm": np.where(hint > 0, wrong, right),
            "knn": np.where(hint > 0, right, wrong)[:, None],
            "cache": np.full((rows, 1), math.log(0.02)),
            "knn_distances": rng.random((rows, 2)),
            "knn_entropy": hint,
        },
        {"knn": settings(1.0), "cache": [{"suffix": 0, "theta": 1.0, "window": 500}]},
        ["knn_distances", "knn_entropy"],
    )


def useless(rows: int = ROWS) -> ScoreTable:
    """Each expert gives every token less than the language model does."""
    rng = np.random.default_rng(5)
    lm = np.log(rng.beta(2, 2, rows))
    return table(
        {
            "lm": lm,
            "knn": np.stack([lm - 1, lm - rng.random(rows)], axis=1),
            "cache": np.where(rng.random(rows) < 0.2, math.nan, lm - 2)[:, None],
            "knn_distances": rng.random((rows, 2)),
        },
        {"knn": settings(1.0, 2.0), "cache": [{"suffix": 0, "theta": 1.0, "window": 500}]},
        ["knn_distances"],
    )


def plain_losses(scores: ScoreTable, mixer: Mixer) -> np.ndarray:
    """-log of the weighted mean of probabilities, in float64 and one token at a time."""
    features = tensors(scores.features(mixer.features))
    weights = mixer.log_weights(features).expand(len(scores), -1).double().exp().numpy()
    columns = [scores.column(component) for component in mixer.components]
    losses = []
    for row, weight in enumerate(weights):
        ps = [math.exp(column[row]) for column in columns]
        if mixer.abstain == "lm":
            ps = [ps[0] if math.isnan(p) else p for p in ps]
        known = [(w, p) for w, p in zip(weight, ps, strict=True) if not math.isnan(p)]
        total = sum(w for w, _ in known)
        losses.append(-math.log(sum(w * p for w, p in known) / total))
    return np.array(losses)


def named(calibration: Calibration, name: str) -> FittedMixture:
    (found,) = (each for each in calibration.mixtures if each.name == name)
    return found


def weights_of(mixer: Mixer) -> list[Any]:
    """All that was fitted, to compare."""
    if isinstance(mixer, Gate):
        return [weight.tolist() for weight in mixer.state_dict().values()]
    return [vars(mixer)]


@pytest.mark.parametrize("rows", [40, 399, 4000, 20_000, 100_003])
def test_parts_share_every_row_out(rows: int) -> None:
    parts = Parts.of(rows)
    others = parts.stop, parts.choose, parts.report
    assert np.array_equal(np.sort(np.concatenate([parts.fit, *others])), np.arange(rows))
    for part, share in ((parts.fit, 0.7), *((each, 0.1) for each in others)):
        assert len(part) / rows == pytest.approx(share, abs=0.03)


def test_parts_are_stretches_of_text() -> None:
    """Neighbouring tokens are alike: a token apart from its neighbours would be known by them."""
    held_out = Parts.of(100_000).report
    breaks = np.flatnonzero(np.diff(held_out) > 1)
    assert len(breaks) + 1 == len(held_out) / STRETCH


@pytest.mark.parametrize(("true", "lmbda"), [(1.0, 0.6), (5.0, 0.4), (40.0, 0.8)])
def test_fixed_finds_what_was_planted(true: float, lmbda: float) -> None:
    mixer = Fitter(planted(true, lmbda)).fixed(["knn"])
    assert mixer.components == [LM, Component("knn", settings(true)[0])]
    assert mixer.weights[1] == pytest.approx(lmbda, abs=0.06)
    assert sum(mixer.weights) == pytest.approx(1)


def test_a_part_of_the_neighbours_is_no_setting_of_its_own() -> None:
    """Those with a suffix, or fewer of them, often abstain: they are for blends and gates."""
    scores = planted(5.0, 0.5)
    good = scores["knn"][:, 2:3]
    columns = scores.columns | {"knn": np.concatenate([scores["knn"], good + 0.5], axis=1)}
    grid = settings(*TEMPERATURES) + settings(5.0, suffix=2)
    fitter = Fitter(table(columns, {"knn": grid}))
    assert fitter.single["knn"].setting == grid[2]
    assert Component("knn", grid[5]) in fitter.components(["knn"])


def test_components_are_few_and_the_best_is_among_them() -> None:
    fitter = Fitter(planted(5.0, 0.5))
    found = fitter.components(["knn"])
    assert found[0] == LM
    assert fitter.single["knn"] in found
    assert len(found) == len({str(component) for component in found}) <= 1 + len(TEMPERATURES)


@pytest.mark.parametrize("kind", ["fixed", "blend", "bins", "gate"])
def test_losses_are_those_of_the_mixed_probabilities(kind: str) -> None:
    for scores in (told(400), useless(400)):
        mixer = getattr(Fitter(scores), kind)(["knn", "cache"])
        np.testing.assert_allclose(
            mixture_losses(scores, mixer), plain_losses(scores, mixer), rtol=1e-4
        )


def test_figures_are_of_the_tokens_held_out() -> None:
    found = fit(told(1000))
    parts = Parts.of(1000)
    assert found.fitted_on["held_out"] == len(parts.report)
    assert found.fitted_on["chosen_on"] == len(parts.compared)
    for each in found.mixtures:
        losses = plain_losses(told(1000), each.mixer)
        loss, choice = losses[parts.report].mean(), losses[parts.compared].mean()
        # Weights but a gate's were fitted once more, after the choice.
        near = 1e-3 if each.mixer.kind == "gate" else 3e-2
        assert each.choice_perplexity == pytest.approx(math.exp(choice), rel=near)
        assert each.perplexity == pytest.approx(math.exp(loss), rel=1e-3)
        assert each.bits == pytest.approx(loss / math.log(2), rel=1e-3)
    assert found.base_perplexity == found.mixtures[0].perplexity


def test_what_is_reported_on_decides_nothing_and_what_is_chosen_on_does() -> None:
    parts, plain = Parts.of(1000), fit(told(1000))

    def fixed_weights(calibration: Any) -> list[list[float]]:
        return [
            list(one.mixer.weights) for one in calibration.mixtures if one.mixer.kind == "fixed"
        ]

    def without_neighbours(rows: np.ndarray) -> Any:
        changed = told(1000)
        changed["knn"][rows] = math.log(0.001)
        return fit(changed)

    unreported = without_neighbours(parts.report)
    assert fixed_weights(unreported) == fixed_weights(plain)
    assert unreported.default == plain.default
    assert unreported.best.choice_perplexity == plain.best.choice_perplexity
    assert unreported.best.perplexity > plain.best.perplexity
    assert fixed_weights(without_neighbours(parts.choose)) != fixed_weights(plain)


def test_a_gate_that_is_told_who_is_right_beats_fixed_weights() -> None:
    """All that is to be won is -log 0.8, but for what the hint leaves unclear near 0."""
    fitter = Fitter(told(12_000))
    experts = ("knn",)
    fixed, bins, gate = (
        fitter.measured(experts, fitted(experts)).perplexity
        for fitted in (fitter.fixed, fitter.bins, fitter.gate)
    )
    assert fixed == pytest.approx(2 / 0.81, rel=0.02)
    assert bins == pytest.approx(fixed, rel=0.02)  # the distances know nothing
    assert 1 / 0.8 < gate < 1.4


def test_experts_are_fitted_one_by_one_and_each_with_those_before() -> None:
    assert expert_sets(["a", "b", "c"]) == [("a",), ("b",), ("c",), ("a", "b"), ("a", "b", "c")]
    assert expert_sets(["a"]) == [("a",)]
    seen: list[tuple[int, int, tuple[str, ...]]] = []
    found = fit(told(400), told=lambda *progress: seen.append(progress), workers=1)
    # The longest first.
    sets = [(), ("knn", "cache"), ("knn",), ("cache",)]
    assert seen == [(done, 3, experts) for done, experts in enumerate(sets)]
    names = [each.name for each in found.mixtures]
    assert len(set(names)) == len(names)
    assert {"language model alone", "knn, bins", "knn, gate", "knn+cache, gate"} <= set(names)
    # It has no features, so there is nothing to go by.
    assert [name for name in names if name.startswith("cache")] == ["cache, fixed"]


def test_where_nothing_helps_the_language_model_stays_alone() -> None:
    found = fit(useless())
    assert found.best is found.mixtures[0]
    assert found.best.experts == ()
    assert list(found.best.mixer.components) == [LM]
    assert named(found, "knn, fixed").mixer.weights == [1.0, 0.0]  # type: ignore[attr-defined]
    (used,) = (row for row in gains(found) if "<- used" in row)
    assert used[0] == "language model alone"


def test_gains_say_what_each_mixture_gains() -> None:
    mixer = Fixed((LM,), (1.0,))
    mixtures = [
        FittedMixture((), mixer, 100.0, 6.6, 99),
        FittedMixture(("knn", "cache"), mixer, 87.65, 6.5, 99),
    ]
    mixtures.append(FittedMixture(("lm2",), mixer, 102.0, 6.7, 99))
    found = replace(fit(told(400)), mixtures=tuple(mixtures), base_perplexity=100.0, default=1)
    assert GAINS == ("mixture", "perplexity", "change", "")
    assert gains(found) == [
        ("language model alone", "100.00", "", ""),
        ("knn+cache, fixed", "87.65", "-12.3%", "<- used"),
        ("lm2, fixed", "102.00", "+2.0%", ""),
    ]


def test_one_seed_gives_one_calibration() -> None:
    """And leaves the process's own generator as it was."""
    before = torch.random.get_rng_state()
    one, same, other = (fit(told(1000), seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)

    def fitted(found: Calibration) -> list[Any]:
        return [(each.name, each.perplexity, weights_of(each.mixer)) for each in found.mixtures]

    assert fitted(one) == fitted(same)
    assert fitted(one) != fitted(other)


def test_what_is_fitted_does_not_depend_on_how_many_are_at_a_time() -> None:
    """To the last digit: mixers, figures, and what tells which searches to skip."""
    before = torch.random.get_rng_state()
    one, two, three = (fit(keyed(told(1000)), workers=workers) for workers in (1, 2, 3))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [one.default, len(one.skips)] == [two.default, len(two.skips)] and one.skips
    for other in (two, three):
        for ours, theirs in zip(one.mixtures, other.mixtures, strict=True):
            assert replace(ours, mixer=theirs.mixer) == theirs
            assert weights_of(ours.mixer) == weights_of(theirs.mixer)
        for skip, again in zip(one.skips, other.skips, strict=True):
            assert skip.quantiles == again.quantiles
            assert weights_of(skip.gate) == weights_of(again.gate)


def test_nothing_is_fitted_or_chosen_on_the_tokens_held_out() -> None:
    """Whatever stands there, mixers, choices and thresholds are the same; only figures change."""
    scores = keyed(told(1000))
    held_out = Parts.of(len(scores)).report
    rng = np.random.default_rng(1)
    others = {name: column.copy() for name, column in scores.columns.items()}
    for column in others.values():
        column[held_out] = -rng.random(column[held_out].shape)
    one, other = fit(scores), fit(replace(scores, columns=others))
    assert len(one.mixtures) == len(other.mixtures)
    for before, after in zip(one.mixtures, other.mixtures, strict=True):
        assert weights_of(before.mixer) == weights_of(after.mixer)
        assert before.perplexity != after.perplexity
        assert before.choice_perplexity == after.choice_perplexity
    assert one.default == other.default
    assert one.skips
    for ours, theirs in zip(one.skips, other.skips, strict=True):
        assert ours.quantiles == theirs.quantiles
        assert weights_of(ours.gate) == weights_of(theirs.gate)


def test_the_default_is_chosen_by_tokens_on_which_it_is_not_reported() -> None:
    """The neighbours help where it is chosen and hurt where it is reported."""
    scores, parts = useless(1000), Parts.of(1000)
    knn = scores["knn"].copy()
    knn[np.concatenate([parts.fit, parts.compared])] = -0.01
    found = fit(replace(scores, columns=scores.columns | {"knn": knn}))
    assert "knn" in found.best.experts
    assert found.best.perplexity > found.base_perplexity
    best = found.find(found.best.experts)
    assert best is not None
    assert best.choice_perplexity == found.best.choice_perplexity
    assert best.choice_perplexity < found.mixtures[0].choice_perplexity


def test_gates_go_by_the_features_of_their_experts_and_of_the_language_model() -> None:
    scores = told(400)
    extra = dict.fromkeys(("lm_top", "cache_size", "knn2_entropy"), scores["knn_entropy"])
    features = [*scores.card["features"], *extra]
    fitter = Fitter(table(scores.columns | extra, scores.experts, features))
    assert fitter.gate(["knn"]).features == ["knn_distances", "knn_entropy", "lm_top"]
    assert "cache_size" in fitter.gate(["knn", "cache"]).features


def test_an_expert_from_elsewhere_is_fitted_and_kept(tmp_path: Path) -> None:
    """With settings of its own, each of which is about a part, and features by its name."""
    scores = told(1000)
    wider = np.concatenate([scores["knn"] - 1, scores["knn"]], axis=1)
    columns = {"lm": scores["lm"], "my_oracle": wider, "my_oracle_top": scores["knn_entropy"]}
    grid = [{"k": 4, "style": style, "heat": 0.5, "deep": True} for style in ("plain", "bold")]
    found = fit(table(columns, {"my_oracle": grid}, ["my_oracle_top"]))
    assert named(found, "my_oracle, gate").mixer.features == ["my_oracle_top"]
    assert found.best.name == "my_oracle, gate"
    fixed = named(found, "my_oracle, fixed").mixer
    assert fixed.components == [LM, Component("my_oracle", grid[1])]
    write_calibration(tmp_path / "calibration.json", found)
    kept = read_calibration(tmp_path / "calibration.json", found.datastores)
    assert kept is not None
    assert named(kept, "my_oracle, fixed").mixer.components == fixed.components


def test_the_card_says_what_was_fitted_on_what() -> None:
    found = fit(told(400), seed=3)
    assert (found.datastores, found.model) == (("d" * 64,), "m" * 64)
    assert found.fitted_on == {
        "split": "valid",
        "tokens": 400,
        "chosen_on": 80,
        "held_out": 40,
        "seed": 3,
        "context": {},
    }
    assert found.experts == {"knn": {"k": 8}, "cache": {"k": 8}}


def test_on_another_table() -> None:
    """The same weights, all tokens, the figures of plain lines."""
    found, other = fit(told(1000)), told(500)
    there = measured(found, other)
    assert there.best.name == found.best.name
    for before, after in zip(found.mixtures, there.mixtures, strict=True):
        assert after.mixer is before.mixer
        loss = plain_losses(other, before.mixer).mean()
        assert after.perplexity == pytest.approx(math.exp(loss), rel=1e-3)
        assert after.bits == pytest.approx(loss / math.log(2), rel=1e-3)
    assert there.base_perplexity == there.mixtures[0].perplexity


def keyed(scores: ScoreTable) -> ScoreTable:
    """With the queries, by which searches may be skipped."""
    keys = np.random.default_rng(2).normal(size=(len(scores), 4)).astype(np.float32)
    features = sorted([*scores.card["features"], "lm_key"])
    return ScoreTable(scores.columns | {"lm_key": keys}, scores.card | {"features": features})


def without(scores: ScoreTable, name: str) -> ScoreTable:
    experts = {each: grid for each, grid in scores.experts.items() if each != name}
    columns = {each: column for each, column in scores.columns.items() if each != name}
    return table(columns, experts, scores.card["features"])


def test_what_is_not_used_may_be_missing() -> None:
    found = fit(told(400))
    found = replace(found, default=found.mixtures.index(named(found, "knn, gate")))
    there = measured(found, without(told(400), "cache"))
    assert there.best.name == "knn, gate"
    assert not [each for each in there.mixtures if "cache" in each.experts]


def test_tables_that_do_not_fit_are_refused() -> None:
    found = fit(told(400))
    other = told(100)
    coarse = table(other.columns, {**other.experts, "knn": settings(2.0)}, other.card["features"])
    cases = {
        "knn, which the calibration mixes": without(other, "knn"),
        "another language model": replace(other, card=other.card | {"model": "x" * 64}),
        "another number of neighbours": replace(
            other, card=other.card | {"described": {"knn": {"k": 4}, "cache": {"k": 8}}}
        ),
        "no column of knn with suffix 0, k 0, temperature 1": coarse,
    }
    for says, spoilt in cases.items():
        with pytest.raises(TableError) as caught:
            measured(found, spoilt)
        assert_helps(caught, says)


def abstaining(seed: int = 6) -> ScoreTable:
    """Drawn from a mixture of three in which who abstains leaves its weight to the model alone."""
    rng = np.random.default_rng(seed)
    columns = np.log(rng.beta(0.5, 1.5, (ROWS, 3)) + 1e-4)
    columns[rng.random(ROWS) < 0.5, 1] = np.nan
    columns[rng.random(ROWS) < 0.5, 2] = np.nan
    lm, knn, cache = columns.T
    grid = {"knn": settings(1.0), "cache": [{"suffix": 0, "theta": 1.0, "window": 500}]}
    return table({"lm": lm, "knn": knn[:, None], "cache": cache[:, None]}, grid)


def test_what_is_fitted_can_be_kept(tmp_path: Path) -> None:
    """All kinds of mixers, in plain numbers."""
    for scores in (keyed(told(400)), abstaining(), planted(5.0, 0.5)):
        found = fit(scores)
        write_calibration(tmp_path / "calibration.json", found)
        kept = read_calibration(tmp_path / "calibration.json", found.datastores)
        assert kept is not None
        assert [each.name for each in kept.mixtures] == [each.name for each in found.mixtures]


def test_valid_chooses_between_the_conventions() -> None:
    """Each of them is fitted; the better one on the tokens to choose on is taken."""
    scores = abstaining()
    fitter = Fitter(scores)
    chosen = fitter.fixed(["knn", "cache"])
    columns = log_probs(scores, chosen.components, fitter.parts.fit)
    losses = {}
    for way in CONVENTIONS:
        mixer = fit_fixed(chosen.components, columns, abstain=way)
        losses[way] = plain_losses(scores, mixer)[fitter.parts.compared].mean()
    assert chosen.abstain == min(losses, key=losses.__getitem__)
    assert losses["share"] != pytest.approx(losses["lm"], rel=1e-4)


@pytest.mark.parametrize("rows", [0, 1, 5, 9, 39])
def test_too_few_tokens_are_refused(rows: int) -> None:
    some = told(400)
    few = replace(some, columns={name: column[:rows] for name, column in some.columns.items()})
    with pytest.raises(TableError) as caught:
        fit(few)
    assert_helps(caught, "too few tokens", "40 at least", f"found:    {rows}")


def test_a_table_of_no_tokens_is_not_measured() -> None:
    some = told(400)
    none = replace(some, columns={name: column[:0] for name, column in some.columns.items()})
    with pytest.raises(TableError, match="too few tokens"):
        measured(fit(some), none)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("knn", math.nan, "knn abstains from every token"),
        ("cache", math.nan, "cache abstains from every token"),
        ("lm", math.nan, "the language model gives tokens"),
        ("lm", -math.inf, "the language model gives tokens"),
        ("lm", -1e5, "no perplexity"),
        ("knn", math.inf, "knn gives tokens"),
    ],
)
def test_columns_of_which_nothing_can_be_made(name: str, value: float, says: str) -> None:
    some = told(400)
    column = np.full_like(some[name], value)
    with pytest.raises(TableError) as caught:
        fit(replace(some, columns=some.columns | {name: column}))
    assert_helps(caught, says)


def test_one_token_that_the_language_model_holds_for_impossible() -> None:
    some = told(400)
    lm = some["lm"].copy()
    lm[77] = -math.inf
    with pytest.raises(TableError) as caught:
        fit(replace(some, columns=some.columns | {"lm": lm}))
    assert_helps(caught, "no probability", "1 rows of 400")


def test_text_that_the_datastore_holds_is_seen() -> None:
    """Its own entry is at distance 0, but for rounding; of other text, and of inner products,
    nobody is."""
    some = told(400)

    def share(distances: np.ndarray) -> float:
        return itself(replace(some, columns=some.columns | {"knn_distances": distances}))

    far = 100 + np.arange(400 * 3, dtype=np.float32).reshape(400, 3)
    own = far.copy()
    own[:300, 0] = np.float32(0.01) * np.random.default_rng(0).normal(size=300)
    assert share(far) == 0
    assert share(own) == 0.75
    assert share(-far) == 0
    assert share(np.full((400, 3), np.nan, np.float32)) == 0
    assert itself(without(some, "knn_distances")) == 0


def test_fit_needs_experts() -> None:
    with pytest.raises(TableError) as caught:
        fit(table({"lm": np.zeros(100)}, {}))
    assert_helps(caught, "no neighbours", "--score-table")
