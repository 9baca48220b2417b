"""Fitting mixers, against grids, conditions of an optimum, and planted answers."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from fairseq_knnlm.calibration import fitting as module
from fairseq_knnlm.calibration import gates
from fairseq_knnlm.calibration.fitting import (
    best_lambda,
    best_setting,
    best_weights,
    fit_bins,
    fit_fixed,
    mixture_loss,
    worth_mixing,
)
from fairseq_knnlm.calibration.gates import Examples, fit_gate, gate_loss
from fairseq_knnlm.mixture.components import CONVENTIONS, LM, Abstain, Component
from fairseq_knnlm.mixture.mix import mix
from fairseq_knnlm.mixture.mixers import LEAST_LM, Gate, Mixer, floored

ROWS = 3000
WAYS = CONVENTIONS


def log_probs(seed: int, impossible: float = 0.0, absent: float = 0.0) -> np.ndarray:
    """(ROWS,) float32 like an expert's: mostly unlikely, some certain, shares of -inf and NaN."""
    rng = np.random.default_rng(seed)
    found = np.log(rng.beta(0.5, 2.0, ROWS) + 1e-8).astype(np.float32)
    found[rng.random(ROWS) < impossible] = -math.inf
    found[rng.random(ROWS) < absent] = math.nan
    return found


def table(columns: int, seed: int = 1) -> np.ndarray:
    """(ROWS, columns), the language model first; the others are impossible or absent at times."""
    others = [log_probs(seed + n, 0.1 * n, 0.1) for n in range(1, columns)]
    return np.stack([log_probs(seed), *others], axis=1)


def components(number: int) -> list[Component]:
    return [LM, *(Component("knn", {"number": n}) for n in range(1, number))]


def probabilities(columns: np.ndarray) -> np.ndarray:
    """float64; where an expert abstains, the language model's (the convention ``lm``)."""
    columns = columns.astype(np.float64)
    return np.exp(np.where(np.isnan(columns), columns[:, :1], columns))


def plain_loss(lm: np.ndarray, expert: np.ndarray, lmbda: float) -> float:
    p = probabilities(np.stack([lm, expert], axis=1))
    with np.errstate(divide="ignore"):
        return float(-np.log((1 - lmbda) * p[:, 0] + lmbda * p[:, 1]).mean())


def assert_likeliest(columns: np.ndarray, weights: np.ndarray, slack: float = 2e-3) -> None:
    """Karush, Kuhn and Tucker: no component gains more than the mixture, those in use as much."""
    p = probabilities(columns)
    gains = (p / (p @ weights)[:, None]).mean(axis=0)
    assert gains.max() <= 1 + slack, gains
    assert np.abs(gains[weights > 0.01] - 1).max() <= slack, gains


@pytest.mark.parametrize("absent", [0.0, 0.3])
@pytest.mark.parametrize("lmbda", [0.0, 0.3, 1.0])
def test_loss_is_that_of_the_mixed_probabilities(lmbda: float, absent: float) -> None:
    lm, expert = log_probs(1), log_probs(2, absent=absent)
    assert mixture_loss(lm, expert, lmbda) == pytest.approx(plain_loss(lm, expert, lmbda))


def test_loss_with_impossible_tokens() -> None:
    lm, expert = log_probs(1), log_probs(2, impossible=0.3)
    assert mixture_loss(lm, expert, 0.3) == pytest.approx(plain_loss(lm, expert, 0.3))
    assert mixture_loss(lm, expert, 0.0) == pytest.approx(-lm.mean(dtype=np.float64))
    assert mixture_loss(lm, expert, 1.0) == math.inf


@pytest.mark.parametrize("absent", [0.0, 0.4])
@pytest.mark.parametrize("impossible", [0.0, 0.2, 0.6, 0.95])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_best_lambda_beats_a_fine_grid(seed: int, impossible: float, absent: float) -> None:
    lm, expert = log_probs(seed), log_probs(seed + 10, impossible, absent)
    grid = np.linspace(0, 1, 1001)
    losses = [plain_loss(lm, expert, lmbda) for lmbda in grid]
    found = best_lambda(lm, expert)
    assert abs(found - grid[int(np.argmin(losses))]) <= 1e-3
    assert plain_loss(lm, expert, found) <= min(losses) + 1e-9


def test_useless_neighbours_get_no_weight() -> None:
    lm = log_probs(1)
    assert best_lambda(lm, np.full(ROWS, -math.inf, np.float32)) == 0.0
    assert best_lambda(lm, lm - 1) == 0.0
    assert best_lambda(lm, lm) == 0.0


def test_silence_alone_gets_no_weight() -> None:
    assert best_lambda(log_probs(1), np.full(ROWS, math.nan, np.float32)) == 0.0


def test_neighbours_that_always_know_better_get_all_weight_but_a_floor() -> None:
    lm = log_probs(1)
    assert best_lambda(lm, np.minimum(lm + 1, 0)) == 1 - LEAST_LM


def floored_mixers() -> dict[str, Mixer]:
    """Fitted on a datastore that always knows; of the bins one holds a single token."""
    lm, know = log_probs(1) - 1, np.zeros(ROWS, np.float32)
    two, three = np.stack([lm, know], axis=1), np.stack([lm, know, know - 1], axis=1)
    distances = np.where(np.arange(ROWS) % 16, 5.0, np.arange(ROWS)).astype(np.float32)
    distances[0] = -1.0
    inputs = torch.randn(ROWS, 2, generator=torch.manual_seed(1))
    examples = Examples(torch.from_numpy(three), inputs)
    gate = fit_gate(components(3), ["x"], examples, examples, seed=0)
    with torch.no_grad():
        gate.layers[-1].bias[0] = -50.0
    return {
        "fixed": fit_fixed(components(2), two),
        **{f"blend, {each}": fit_fixed(components(3), three, "blend", each) for each in WAYS},
        "bins": fit_bins(components(2), two, "x", distances),
        "gate": gate,
    }


def test_no_token_that_the_language_model_can_produce_costs_infinity() -> None:
    """A new one, that no other expert gives any probability; it costs at most -log2 of the floor
    more than it costs the model.
    """
    new = torch.tensor([[-3.0, -math.inf, -math.inf]])
    for name, mixer in floored_mixers().items():
        every = mixer.log_weights({"x": torch.linspace(-5, 5000, 200)[:, None].expand(-1, 2)})
        weights = every.double().exp().reshape(-1, len(mixer.components))
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(weights)).double())
        for row in weights.log().float():
            cost = -float(mix(new[:, : len(row)], row, mixer.abstain))
            assert cost <= 3.0 - math.log(LEAST_LM) + 1e-3, name


def test_the_floor_takes_nothing_from_who_has_more() -> None:
    weights = torch.tensor([[0.5, 0.2, 0.3], [LEAST_LM / 9, 0.25, 0.75 - LEAST_LM / 9]])
    found = floored(weights.log()).exp()
    assert torch.equal(found[0], weights.log().exp()[0])
    assert found[1, 0].item() == pytest.approx(LEAST_LM)
    assert (found[1, 1] / found[1, 2]).item() == pytest.approx(0.25 / 0.75, rel=1e-4)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2))


def direct(columns: np.ndarray, abstain: Abstain, start: np.ndarray) -> float:
    """Bits a token at the optimum of ``mix`` itself, by L-BFGS over softmax weights in float64."""
    log_probs = torch.from_numpy(columns).double().clamp_min(-300)  # which has a gradient
    scores = torch.tensor(np.log(start), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [scores],
        max_iter=2000,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = -mix(log_probs, scores.log_softmax(dim=0), abstain).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(closure().detach()) / math.log(2)


@pytest.mark.parametrize("abstain", WAYS)
@pytest.mark.parametrize(("seed", "experts"), [(1, 3), (2, 6), (3, 12)])
def test_what_is_fitted_is_the_optimum_of_what_is_used(
    seed: int, experts: int, abstain: Abstain
) -> None:
    """Where each expert abstains from a share of the tokens of its own, up to 60%."""
    columns, rng = table(experts, 50 * seed), np.random.default_rng(seed)
    share = rng.uniform(0, 0.6, experts)
    columns[:, 1:][rng.random(columns[:, 1:].shape) < share[1:]] = np.nan
    weights = np.array(fit_fixed(components(experts), columns, "blend", abstain).weights)
    log_weights = torch.from_numpy(weights).log()
    reached = -float(mix(torch.from_numpy(columns).double(), log_weights, abstain).mean())
    starts = np.full(experts, 1 / experts), np.maximum(weights, 1e-7)
    best = min(direct(columns, abstain, start) for start in starts)
    assert reached / math.log(2) == pytest.approx(best, abs=1e-4)


def gappy(experts: int = 6, seed: int = 3) -> np.ndarray:
    """As ``table``, with an expert that abstains from half of the tokens."""
    columns = table(experts, seed)
    columns[::2, 1] = np.nan
    return columns


def likelihood(columns: np.ndarray, weights: np.ndarray, abstain: Abstain) -> float:
    """By the function that evaluation uses, in float64."""
    log_weights = torch.from_numpy(weights).log()
    return float(mix(torch.from_numpy(columns).double(), log_weights, abstain).mean())


@pytest.mark.parametrize("abstain", WAYS)
def test_every_round_raises_the_likelihood_of_the_mixture(abstain: Abstain) -> None:
    """A round may be a try that is taken back, and then leaves it as it was."""
    columns = gappy()
    found = [best_weights(columns, rounds, abstain) for rounds in range(1, 25)]
    reached = [likelihood(columns, weights, abstain) for weights in found]
    assert all(later > earlier - 1e-7 for earlier, later in pairwise(reached))
    assert reached[-1] > reached[0] + 0.01


@pytest.mark.parametrize("abstain", WAYS)
def test_no_small_step_from_the_best_weights_is_uphill(abstain: Abstain) -> None:
    """The slope of ``mix`` itself, by automatic differentiation in float64: along the simplex it
    is 0 towards all that weigh something, and falls towards the others.
    """
    columns = gappy()
    weights = torch.from_numpy(best_weights(columns, 1000, abstain)).requires_grad_()
    log_probs = torch.from_numpy(columns).double().clamp_min(-300)  # which has a gradient
    mix(log_probs, (weights / weights.sum()).clamp_min(1e-12).log(), abstain).mean().backward()
    assert weights.grad is not None
    assert weights.grad.max() < 1e-3
    assert weights.grad[weights > 0.01].abs().max() < 1e-3


@pytest.mark.parametrize("lmbda", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("abstain", WAYS)
def test_the_loss_of_two_is_that_of_the_mixture_that_is_used(
    lmbda: float, abstain: Abstain
) -> None:
    """Bit for bit: what is compared in fitting is computed as in evaluation."""
    lm, expert = log_probs(1), log_probs(2, absent=0.3)
    columns = torch.from_numpy(np.stack([lm, expert], axis=1))
    log_weights = torch.tensor([1 - lmbda, lmbda], dtype=torch.float64).log().float()
    mixed = mix(columns, log_weights, abstain)
    if abstain == "share":
        assert mixture_loss(lm, expert, lmbda) == -float(mixed.mean(dtype=torch.float64))
    assert mixture_loss(lm, expert, lmbda) == pytest.approx(-float(mixed.mean()), rel=1e-5)


def test_the_conventions_differ_and_each_is_best_at_its_own() -> None:
    columns = table(6)
    columns[::2, 1] = np.nan
    double = torch.from_numpy(columns).double()
    fitted = {way: fit_fixed(components(6), columns, "blend", way) for way in WAYS}
    for way in WAYS:
        own, other = (
            float(mix(double, torch.tensor(fitted[one].weights).log(), way).mean())
            for one in (way, *(set(WAYS) - {way}))
        )
        assert own > other + 1e-4


@pytest.mark.parametrize("abstain", WAYS)
def test_columns_are_chosen_for_the_mixture_that_is_used(abstain: Abstain) -> None:
    """Those that weigh something at the optimum of that mixture, and no others."""
    columns = np.concatenate([table(6), table(6)[:, 1:] - 1], axis=1)
    columns[::2, 3] = np.nan
    weights = np.array(fit_fixed(components(11), columns, "blend", abstain).weights)
    expected = [place for place, weight in enumerate(weights) if weight > 2 * module.LEAST]
    assert 3 <= len(expected) <= 6
    assert set(expected) <= set(worth_mixing(columns, abstain)) <= set(range(6))


def test_hopeless_language_model_does_not_overflow() -> None:
    """exp(log p_kNN - log p_LM) would be infinite."""
    lm = np.array([-1e4, -1.0], np.float32)
    expert = np.array([0.0, -math.inf], np.float32)
    assert best_lambda(lm, expert) == pytest.approx(0.5)


def test_the_best_setting_is_that_of_a_grid() -> None:
    columns = table(7)
    losses = {
        (place, lmbda): plain_loss(columns[:, 0], columns[:, place], lmbda)
        for place in range(1, 7)
        for lmbda in np.linspace(0, 1, 101)
    }
    place, lmbda = min(losses, key=losses.__getitem__)
    found = best_setting(columns[:, 0], columns[:, 1:])
    assert found[0] == place - 1
    assert found[1] == pytest.approx(lmbda, abs=0.01)


@pytest.mark.parametrize("columns", [2, 3, 6])
@pytest.mark.parametrize("seed", [1, 20])
def test_best_weights_are_likeliest(columns: int, seed: int) -> None:
    some = table(columns, seed)
    weights = best_weights(some, rounds=1000, abstain="lm")
    assert weights.dtype == np.float64
    assert weights.sum() == pytest.approx(1)
    assert weights.min() >= 0
    assert_likeliest(some, weights)


def test_best_weights_of_two_are_the_best_lambda() -> None:
    some = table(2)
    assert best_weights(some, 1000)[1] == pytest.approx(best_lambda(*some.T), abs=1e-4)


def test_best_weights_beat_a_grid_of_three() -> None:
    some = table(3)
    p, steps = probabilities(some), np.linspace(0, 1, 51)
    grid = [-np.log(p @ [1 - a - b, a, b]).mean() for a in steps for b in steps if a + b < 1 - 1e-9]
    assert -np.log(p @ best_weights(some, abstain="lm")).mean() <= min(grid) + 1e-6


def test_every_round_is_likelier() -> None:
    some = table(5)
    found = [best_weights(some, n, abstain="lm") for n in range(0, 40, 4)]
    losses = [-np.log(probabilities(some) @ weights).mean() for weights in found]
    assert all(later < earlier + 1e-7 for earlier, later in pairwise(losses))
    assert losses[-1] < losses[0] - 0.01


def test_a_fixed_mixture_is_the_likeliest() -> None:
    two, five = table(2), table(5)
    fixed = fit_fixed(components(2), two)
    assert fixed.kind == "fixed"
    assert fixed.weights[1] == best_lambda(*two.T)
    blend = fit_fixed(components(5), five, "blend", "lm")
    assert blend.kind == "blend"
    assert list(blend.components) == components(5)
    assert sum(blend.weights) == pytest.approx(1, abs=1e-12)
    assert_likeliest(five, np.array(blend.weights))


def test_a_component_of_no_use_weighs_nothing() -> None:
    some = np.concatenate([table(3), np.full((ROWS, 1), -math.inf, np.float32)], axis=1)
    assert fit_fixed(components(4), some).weights[3] == 0


@pytest.mark.parametrize("experts", [2, 4])
@pytest.mark.parametrize("ties", [False, True])
def test_each_bin_has_the_best_weights_of_its_tokens(experts: int, ties: bool) -> None:
    """Of those that the mixer puts into it, also where many distances are the same as an edge."""
    some, rng = table(experts), np.random.default_rng(4)
    distances = rng.random(ROWS).astype(np.float32) * 100
    if ties:
        distances = np.floor(distances / 5) * 5
    distances[rng.random(ROWS) < 0.05] = np.nan
    mixer = fit_bins(components(experts), some, "knn_distances", distances, "lm")
    assert len(mixer.weights) == len(mixer.edges) + 1 == module.BINS
    assert list(mixer.edges) == sorted(set(mixer.edges))
    found = mixer.log_weights({"knn_distances": torch.from_numpy(distances)}).exp().numpy()
    sizes = []
    for row in np.unique(found, axis=0):
        here = (found == row).all(axis=1)
        sizes.append(here.sum())
        if experts == 2:
            assert row[1] == pytest.approx(best_lambda(*some[here].T), abs=1e-5)
        else:
            assert_likeliest(some[here], row, slack=0.02)
    assert sum(sizes) == ROWS
    if not ties:
        assert min(sizes) > ROWS / module.BINS * 0.8


def test_a_bin_that_nobody_is_in_has_everybodys_weights() -> None:
    """Nearly all distances are one number: all edges are, and nobody lies beyond the last."""
    some, distances = table(2), np.full(ROWS, 5.0, np.float32)
    mixer = fit_bins(components(2), some, "knn_distances", distances)
    assert mixer.edges == [5.0]
    overall = fit_fixed(components(2), some).weights
    assert [list(row) for row in mixer.weights] == [pytest.approx(list(overall))] * 2


def test_a_planted_column_is_worth_mixing() -> None:
    """Among many that are worse than the language model throughout."""
    lm = log_probs(1)
    useless = [lm - 1 - np.float32(0.01) * n for n in range(30)]
    planted = log_probs(9, impossible=0.2)
    columns = np.stack([lm, *useless[:17], planted, *useless[17:]], axis=1)
    assert worth_mixing(columns) == [0, 18]


def test_no_more_is_worth_mixing_than_can_be() -> None:
    """The heaviest, where each of many is right about some tokens of its own."""
    rng = np.random.default_rng(0)
    owner = rng.choice(40, size=ROWS, p=np.arange(40, 0, -1) / 820)
    right = owner[:, None] == np.arange(40)
    columns = np.where(right, np.log(0.9), np.log(0.001)).astype(np.float32)
    found = worth_mixing(columns)
    assert found == sorted(found)
    assert len(found) == module.MOST
    counts = np.bincount(owner, minlength=40)
    assert counts[found].min() >= np.delete(counts, found).max()


# The gate


def planted(rows: int, seed: int = 0) -> Examples:
    """One feature's sign tells which of two experts knows the token; others tell nothing.

    At times the one that does not know abstains, or holds the token for impossible.
    """
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(rows, 4)) * [1, 5, 0.1, 1] + [0, 100, 0, 0]
    first = inputs[:, 0] > 0
    inputs[:, 0] += np.where(first, 0.2, -0.2)
    inputs[rng.random((rows, 4)) < [0, 0.2, 0, 0]] = np.nan
    knows, not_ = np.log(rng.uniform(0.5, 0.9, rows)), np.log(rng.uniform(0.01, 0.05, rows))
    not_[rng.random(rows) < 0.1] = -np.inf
    columns = np.stack(
        [np.log(rng.uniform(0.05, 0.1, rows)), np.where(first, knows, not_)]
        + [np.where(first, not_, knows)],
        axis=1,
    )
    columns[np.isneginf(columns) & (rng.random(columns.shape) < 0.5)] = np.nan
    return Examples(torch.from_numpy(columns).float(), torch.from_numpy(inputs).float())


def oracle(examples: Examples) -> float:
    """The loss of who is right about the sign every time."""
    first = examples.inputs[:, 0] > 0
    columns = examples.log_probs
    return -float(columns[:, 1].where(first, columns[:, 2]).mean())


def trained(seed: int = 0, rows: int = 6000, **how: object) -> Gate:
    stop = planted(1000, seed=8)
    names = ["sign", "noise"]
    return fit_gate(components(3), names, planted(rows, 7), stop, seed=seed, **how)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def gate() -> Gate:
    return trained()


def test_a_gate_learns_a_planted_rule(gate: Gate) -> None:
    """On tokens that it has not seen it comes close to who knows the rule; nothing fixed does."""
    examples = planted(4000, seed=9)
    with torch.no_grad():
        loss = float(gate_loss(gate, examples))
        weights = gate(examples.inputs).exp()
    fixed = fit_fixed(components(3), examples.log_probs.numpy()).log_weights({})
    best_fixed = -float(mix(examples.log_probs, fixed).mean())
    best = oracle(examples)
    assert best_fixed > best + 0.3
    assert best - 1e-6 <= loss < best + 0.1
    sure = examples.inputs[:, 0].abs() > 0.3
    heaviest = weights.argmax(dim=1)
    assert torch.equal(heaviest[sure] == 1, examples.inputs[sure, 0] > 0)


def test_a_gate_is_ready_for_use(gate: Gate) -> None:
    examples = planted(50, seed=9)
    assert not gate.training
    assert gate.components == components(3)
    assert gate.features == ["sign", "noise"]
    features = {"sign": examples.inputs[:, 0], "noise": examples.inputs[:, 1:]}
    found = gate.log_weights(features)
    assert torch.equal(found, gate.log_weights(features))  # no dropout
    torch.testing.assert_close(found.exp().sum(dim=1), torch.ones(50))
    known = planted(6000, 7).inputs[:, 1].nanmean()
    assert gate.mean[1].item() == pytest.approx(known.item(), rel=1e-4)


def test_the_seed_decides_and_the_process_generator_is_left_alone(gate: Gate) -> None:
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    again, other = trained(), trained(seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, weights in gate.state_dict().items():
        assert torch.equal(again.state_dict()[name], weights)
    assert any(
        not torch.equal(other.state_dict()[name], weights)
        for name, weights in gate.state_dict().items()
    )


def test_training_ends_once_it_gets_worse_and_the_best_is_kept() -> None:
    """What is learnt of a few tokens of noise is wrong about others."""
    rng = torch.manual_seed(1)

    def noise(rows: int) -> Examples:
        return Examples(
            torch.randn(rows, 3, generator=rng) * 3 - 5, torch.randn(rows, 9, generator=rng)
        )

    losses: list[float] = []
    fit, stop = noise(200), noise(500)
    gate = fit_gate(components(3), ["x"], fit, stop, seed=0, after_epoch=losses.append)
    assert gates.PATIENCE < len(losses) < gates.EPOCHS
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + gates.PATIENCE
    with torch.no_grad():
        assert float(gate_loss(gate, stop)) == losses[best] < losses[-1]


def test_the_loss_is_that_of_the_mixture() -> None:
    """Impossible tokens are given the least probability that has a gradient."""
    gate, examples = Gate(components(3), ["x"], 4).eval(), planted(500)
    columns = examples.log_probs
    absent = columns.isnan()
    p = columns.double().exp().masked_fill(absent, 0)
    expected = -(p.sum(dim=1) / (~absent).sum(dim=1)).log().mean()
    assert gate_loss(gate, examples).item() == pytest.approx(expected.item(), rel=1e-5)
    hopeless = Examples(torch.full((1, 3), -math.inf), torch.zeros(1, 4))
    assert gate_loss(gate, hopeless).item() == pytest.approx(-gates.FLOOR)


@pytest.mark.parametrize("abstain", CONVENTIONS)
@pytest.mark.parametrize("knows", [True, False])
def test_the_loss_has_the_gradients_of_mix(abstain: Abstain, knows: bool) -> None:
    """With and without experts that abstain."""
    gate = Gate(components(3), ["x"], 4, abstain=abstain).eval()
    torch.nn.init.normal_(gate.layers[-1].weight, generator=torch.manual_seed(4))  # type: ignore[arg-type]
    examples = planted(500)
    columns, inputs = examples.log_probs, examples.inputs
    assert columns.isnan().any()
    if knows:
        columns = columns.nan_to_num(-2.0)

    def gradients(loss: Tensor) -> list[Tensor]:
        gate.zero_grad()
        loss.backward()
        return [weight.grad.clone() for weight in gate.parameters() if weight.grad is not None]

    plain = -mix(columns.clamp_min(gates.FLOOR), gate(inputs), abstain).mean()
    ours = gate_loss(gate, Examples(columns, inputs))
    assert ours.item() == pytest.approx(plain.item(), rel=1e-5)
    pairs = zip(gradients(ours), gradients(plain), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
