"""The arithmetic of the mixture against plain Python in float64."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import pytest
import torch
from stores import knn_log_probs

from fairseq_knnlm.experts.contract import Distribution
from fairseq_knnlm.mixture.components import Abstain
from fairseq_knnlm.mixture.mix import added, effective, mix

Rows = list[list[float]]


def plain_knn(distances: Rows, matches: list[list[bool]], valid: Rows, temperature: float) -> Rows:
    """Equation 2 of the paper, word for word but for the smallest distance taken off first."""
    found = []
    for row, agrees, there in zip(distances, matches, valid, strict=True):
        near = [(d, m) for d, m, v in zip(row, agrees, there, strict=True) if v]
        if not near:
            found.append([math.nan])
            continue
        nearest = min(d for d, _ in near)
        weights = [(math.exp(-(d - nearest) / temperature), m) for d, m in near]
        agreed = sum(w for w, m in weights if m)
        found.append([math.log(agreed / sum(w for w, _ in weights)) if agreed else -math.inf])
    return found


def fixed(lmbda: float) -> torch.Tensor:
    """Log-weights of the language model and the neighbours."""
    return torch.tensor([1 - lmbda, lmbda], dtype=torch.float64).log().float()


def plain_mix(log_probs: list[float], log_weights: list[float], abstain: str = "share") -> float:
    """log of the weighted mean of the probabilities of those who say something; with ``lm`` who
    says nothing says what the language model says.
    """
    if abstain == "lm":
        log_probs = [log_probs[0] if math.isnan(p) else p for p in log_probs]
    parts = [
        (math.exp(w), math.exp(p))
        for p, w in zip(log_probs, log_weights, strict=True)
        if not math.isnan(p)
    ]
    total = sum(w for w, _ in parts)
    if total == 0:
        return log_probs[0]
    mixed = sum(w * p for w, p in parts) / total
    return math.log(mixed) if mixed else -math.inf


def random_neighbours(
    rows: int = 40, k: int = 12, scale: float = 20.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Distances, values among 6 tokens, and validity, with a few rows without any neighbour."""
    rng = torch.Generator().manual_seed(3)
    distances = 100 + scale * torch.rand(rows, k, generator=rng)
    values = torch.randint(6, (rows, k), generator=rng)
    valid = torch.rand(rows, k, generator=rng) < 0.8
    valid[:3] = False
    return distances, values, valid


@pytest.mark.parametrize("temperature", [0.5, 1.0, 7.0, 1000.0])
def test_knn_is_the_papers_equation(temperature: float) -> None:
    distances, values, valid = random_neighbours()
    matches = values == 2
    found = knn_log_probs(distances, matches, valid, [temperature])
    expected = plain_knn(distances.tolist(), matches.tolist(), valid.tolist(), temperature)
    torch.testing.assert_close(found, torch.tensor(expected), atol=2e-5, rtol=1e-5, equal_nan=True)


def test_each_temperature_has_its_column() -> None:
    distances, values, valid = random_neighbours()
    temperatures = [0.5, 3.0, 64.0]
    together = knn_log_probs(distances, values == 1, valid, temperatures)
    alone = [knn_log_probs(distances, values == 1, valid, [t])[:, 0] for t in temperatures]
    assert together.shape == (len(distances), 3)
    torch.testing.assert_close(together, torch.stack(alone, dim=1), equal_nan=True)


@pytest.mark.parametrize("temperature", [0.5, 7.0, 1000.0])
def test_a_weight_counts_as_so_many_neighbours(temperature: float) -> None:
    """Each of them repeated as often as its weight says."""
    distances, values, valid = random_neighbours()
    matches = values == 2
    counts = torch.randint(1, 9, (distances.shape[1],), generator=torch.manual_seed(2))
    log_weights = counts.log().expand_as(distances)
    found = knn_log_probs(distances, matches, valid, [temperature], log_weights)
    repeated = [part.repeat_interleave(counts, dim=1) for part in (distances, matches, valid)]
    expected = knn_log_probs(*repeated, [temperature])
    torch.testing.assert_close(found, expected, equal_nan=True)
    ones = knn_log_probs(distances, matches, valid, [temperature], torch.zeros_like(distances))
    expected = knn_log_probs(distances, matches, valid, [temperature])
    torch.testing.assert_close(ones, expected, equal_nan=True)


def test_weights_neither_overflow_nor_underflow() -> None:
    """exp(2000) and exp(-2000) are no numbers; the differences of the scores are."""
    distances = torch.tensor([[1e5, 1e5 + 2000, 0.0]])
    matches = torch.tensor([[False, True, True]])
    valid = torch.tensor([[True, True, False]])
    for heavy, expected in (([0.0, 2002.0], -math.log1p(math.exp(-2))), ([0.0, 0.0], -2000.0)):
        log_weights = torch.tensor([[*heavy, math.nan]])
        found = knn_log_probs(distances, matches, valid, [1.0], log_weights)
        assert found.item() == pytest.approx(expected, rel=1e-5)
    light = torch.full((1, 3), -2000.0)
    assert knn_log_probs(distances, matches, valid, [1.0], light).item() == pytest.approx(-2000)
    nobody = torch.zeros(1, 3, dtype=torch.bool)
    assert math.isnan(knn_log_probs(distances, matches, nobody, [1.0], light).item())


def test_missing_neighbours_count_for_nothing() -> None:
    """Whatever stands in their places, the result is that of the others alone."""
    distances = torch.tensor([[1.0, 2.0, 0.0, math.nan, 3.4e38]])
    matches = torch.tensor([[True, False, True, True, True]])
    valid = torch.tensor([[True, True, False, False, False]])
    found = knn_log_probs(distances, matches, valid, [2.0])
    alone = knn_log_probs(distances[:, :2], matches[:, :2], valid[:, :2], [2.0])
    assert found.item() == pytest.approx(alone.item()) == pytest.approx(-math.log1p(math.exp(-0.5)))


def test_no_match_is_impossible_and_no_neighbour_abstains() -> None:
    distances = torch.ones(2, 3)
    valid = torch.tensor([[True, True, True], [False, False, False]])
    matches = torch.tensor([[False, False, False], [True, True, True]])
    found = knn_log_probs(distances, matches, valid, [1.0])
    assert found[0].item() == -math.inf
    assert math.isnan(found[1].item())


@pytest.mark.parametrize("base", [0.0, 1e5, 1e9, 1e30, -1e9])
def test_large_distances_do_not_overflow(base: float) -> None:
    """Only the gaps between distances count, however far away everything is."""
    distances = base + torch.tensor([[0.0, 0.0, 0.0, 0.0]])
    matches = torch.tensor([[True, False, False, False]])
    found = knn_log_probs(distances, matches, torch.ones(1, 4, dtype=torch.bool), [0.01, 1.0])
    assert found.tolist() == [[pytest.approx(math.log(0.25))] * 2]


def test_a_hopeless_neighbour_does_not_disturb() -> None:
    distances = torch.tensor([[1.0, 1e30]])
    valid = torch.ones(1, 2, dtype=torch.bool)
    assert knn_log_probs(distances, torch.tensor([[True, False]]), valid, [1.0]).item() == 0.0


def test_probabilities_of_a_vocabulary_sum_to_one() -> None:
    """Every token asked in turn: neighbours alone, and mixed with a language model."""
    distances, values, valid = random_neighbours()
    anybody = valid.any(dim=1)
    lm = torch.log_softmax(torch.randn(len(values), 6, generator=torch.manual_seed(5)), dim=1)
    knn_total, mixed_total = torch.zeros(len(values)), torch.zeros(len(values))
    for token in range(6):
        knn = knn_log_probs(distances, values == token, valid, [5.0])[:, 0]
        knn_total += knn.exp()
        mixed_total += mix(torch.stack([lm[:, token], knn], dim=1), fixed(0.3)).exp()
    assert torch.equal(knn_total.isnan(), ~anybody)
    torch.testing.assert_close(knn_total[anybody], torch.ones(int(anybody.sum())))
    torch.testing.assert_close(mixed_total, torch.ones(len(values)))


@pytest.mark.parametrize("lmbda", [0.0, 1e-6, 0.25, 0.9, 1.0])
def test_mix_is_a_weighted_mean_of_probabilities(lmbda: float) -> None:
    log_probs = torch.tensor([[-2.0, -1.0], [-3.0, -math.inf], [-0.5, math.nan], [-4.0, -0.1]])
    weights = fixed(lmbda)
    expected = [plain_mix(p, weights.tolist()) for p in log_probs.tolist()]
    torch.testing.assert_close(mix(log_probs, weights), torch.tensor(expected))


@pytest.mark.parametrize("abstain", ["share", "lm"])
def test_mix_takes_more_experts_and_weights_of_each_token(abstain: Literal["share", "lm"]) -> None:
    rng = torch.Generator().manual_seed(1)
    log_probs = -10 * torch.rand(30, 4, generator=rng)
    log_weights = torch.log_softmax(torch.randn(30, 4, generator=rng), dim=1)
    abstains = torch.rand(30, 4, generator=rng) < 0.3
    abstains[:, 0] = False
    log_probs = log_probs.masked_fill(abstains, math.nan)
    rows = zip(log_probs.tolist(), log_weights.tolist(), strict=True)
    expected = torch.tensor([plain_mix(*row, abstain) for row in rows])
    torch.testing.assert_close(mix(log_probs, log_weights, abstain), expected)


def test_lambda_zero_is_the_language_model_and_one_the_neighbours() -> None:
    log_probs = torch.tensor([[-2.0, -0.5], [-3.0, -math.inf]])
    assert mix(log_probs, fixed(0.0)).tolist() == [-2.0, -3.0]
    assert mix(log_probs, fixed(1.0)).tolist() == [-0.5, -math.inf]


@pytest.mark.parametrize("lmbda", [0.0, 0.25, 1.0])
def test_without_neighbours_the_language_model_speaks_alone(lmbda: float) -> None:
    log_probs = torch.tensor([[-2.0, math.nan], [-700.0, math.nan]])
    assert mix(log_probs, fixed(lmbda)).tolist() == pytest.approx([-2.0, -700.0])


def test_who_abstains_leaves_its_weight_to_all_others() -> None:
    """0.5 and 0.3 of 0.8, not all of it to the language model."""
    log_probs = torch.tensor([[math.log(0.1), math.nan, math.log(0.9)]])
    found = mix(log_probs, torch.tensor([0.5, 0.2, 0.3]).log())
    assert found.exp().item() == pytest.approx((0.5 * 0.1 + 0.3 * 0.9) / 0.8)


def test_who_abstains_leaves_its_weight_to_the_language_model() -> None:
    """The other way: 0.7 of 1."""
    log_probs = torch.tensor([[math.log(0.1), math.nan, math.log(0.9)]])
    found = mix(log_probs, torch.tensor([0.5, 0.2, 0.3]).log(), "lm")
    assert found.exp().item() == pytest.approx(0.7 * 0.1 + 0.3 * 0.9)


def test_tiny_probabilities_do_not_underflow() -> None:
    log_probs = torch.tensor([[-1000.0, -1001.0]])
    expected = -1000.0 + math.log(0.5 + 0.5 * math.exp(-1))
    assert mix(log_probs, fixed(0.5)).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("abstain", ["share", "lm"])
def test_silence_leaves_gradients_finite(abstain: Literal["share", "lm"]) -> None:
    """A gate learns through this."""
    weights = torch.zeros(2, 3, requires_grad=True)
    log_probs = torch.tensor([[-1.0, math.nan, -2.0], [-1.0, math.nan, math.nan]])
    mix(log_probs, weights.log_softmax(dim=1), abstain).sum().backward()
    assert weights.grad is not None
    assert weights.grad.isfinite().all()
    assert weights.grad[1].tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-7)


def test_a_far_match_is_unlikely_and_not_impossible() -> None:
    """exp(-400) is no float32, but log p = -400 is."""
    found = knn_log_probs(
        torch.tensor([[0.0, 400.0]]),
        torch.tensor([[False, True]]),
        torch.ones(1, 2, dtype=torch.bool),
        [1.0, 0.25],
    )
    assert found.tolist() == [[-400.0, -1600.0]]


def test_no_neighbours_where_the_processor_flushes_denormals() -> None:
    """Nobody is NaN, and somebody who does not agree is -inf, whatever log(0) - log(0) comes to."""
    torch.set_flush_denormal(True)
    try:
        valid = torch.tensor([[False] * 3, [True] * 3])
        found = knn_log_probs(torch.ones(2, 3), torch.zeros_like(valid), valid, [1.0])
    finally:
        torch.set_flush_denormal(False)
    assert math.isnan(found[0].item())
    assert found[1].item() == -math.inf


def some_log_probs(experts: int, types: int = 9) -> torch.Tensor:
    """(7, experts, types), of which some experts abstain and some are certain of what cannot be."""
    x = torch.randn(7, experts, types, generator=torch.manual_seed(3)).log_softmax(dim=2)
    x[1, 1:] = torch.nan
    x[2, 1] = torch.nan
    x[3, :, 4] = -torch.inf
    return x


@pytest.mark.parametrize("abstain", ["share", "lm"])
@pytest.mark.parametrize("weights", [[0.5, 0.2, 0.3], [0.0, 0.4, 0.6], [1.0, 0.0, 0.0]])
def test_effective_weights_are_those_of_the_mixture(abstain: Abstain, weights: list[float]) -> None:
    """What they and the probabilities of those who speak come to, added up in plain numbers."""
    x, log_weights = some_log_probs(3)[:, :, 0], torch.tensor(weights).log()
    found = effective(x, log_weights, abstain).exp()
    torch.testing.assert_close(found.sum(dim=1), torch.ones(7))
    assert not found[x.isnan()].any()
    sums = (found * x.exp().nan_to_num(nan=0.0)).sum(dim=1)
    torch.testing.assert_close(sums, mix(x, log_weights, abstain).exp())


@pytest.mark.parametrize("sparse", [False, True])
def test_one_expert_more(sparse: bool) -> None:
    """p + w q of every token, where q names tokens several times or not at all."""
    mixed = torch.randn(2, 6, generator=torch.manual_seed(1)).log_softmax(dim=1)
    tokens, shares = (
        torch.tensor([[4, 1, 4], [0, 0, 0]]),
        torch.tensor([[0.2, 0.5, 0.3], [0.1] * 3]),
    )
    shares[1] = torch.nan  # abstains
    q = torch.tensor([[0, 0.5, 0, 0, 0.5, 0], [0.0] * 6])
    said = Distribution(tokens, shares.log()) if sparse else q.log()
    found = added(mixed, [said], [torch.tensor([0.25, 0.0]).log()])
    torch.testing.assert_close(found.exp(), mixed.exp() + torch.tensor([[0.25], [0.0]]) * q)


def test_one_expert_more_in_two_settings() -> None:
    """p + w q + v r, where the second abstains of one and says of another what cannot be."""
    mixed = torch.randn(3, 6, generator=torch.manual_seed(1)).log_softmax(dim=1)
    tokens = torch.tensor([[4, 1, 4], [0, 0, 0], [2, 3, 5]])
    first = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.6, 0.3], [0.0, 0.0, 1.0]])
    second = torch.tensor([[0.0, 0.0, 1.0], [torch.nan] * 3, [0.5, 0.5, 0.0]])
    weights = torch.tensor([[0.25, 0.5, 0.0], [0.125, 0.0, 0.5]])
    expected = mixed.exp()
    for said, weight in zip((first, second.nan_to_num()), weights, strict=True):
        for row, place in itertools.product(range(3), range(3)):
            expected[row, tokens[row, place]] += weight[row] * said[row, place]
    said = [Distribution(tokens, shares.log()) for shares in (first, second)]
    found = added(mixed, said, list(weights.log()))
    torch.testing.assert_close(found.exp(), expected)
