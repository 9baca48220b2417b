"""Mixers: positive weights that sum to one, and mixtures that stay distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fairseq_knnlm.mixture import mixers
from fairseq_knnlm.mixture.components import LM, Component
from fairseq_knnlm.mixture.mixers import FAR, Bins, Fixed, Gate, Mixer, first_column, gathered

COMPONENTS = [LM, Component("knn", {"temperature": 2.0}), Component("cache", {"theta": 0.5})]
EDGES = (1.0, 4.0, 9.0)
WEIGHTS = ((0.1, 0.9, 0.0), (0.3, 0.3, 0.4), (0.5, 0.25, 0.25), (1.0, 0.0, 0.0))


def random_gate(components: list[Component], features: list[str], inputs: int) -> Gate:
    """As if trained: its last layer is no longer zero."""
    torch.manual_seed(3)
    gate = Gate(components, features, inputs, hidden=(8, 8))
    torch.nn.init.normal_(gate.layers[-1].weight)
    torch.nn.init.normal_(gate.layers[-1].bias)
    return gate.eval()


def distances(rows: int = 50) -> Tensor:
    """(rows, 3), the nearest first; some tokens have no neighbours."""
    found = (12 * torch.rand(rows, 3, generator=torch.manual_seed(1))).sort(dim=1).values
    found[::7] = math.nan
    return found


MIXERS: dict[str, Mixer] = {
    "fixed": Fixed(COMPONENTS, (0.5, 0.3, 0.2)),
    "blend": Fixed(COMPONENTS, (1.0, 0.0, 0.0), kind="blend"),
    "bins": Bins(COMPONENTS, EDGES, WEIGHTS),
    "gate": random_gate(COMPONENTS, ["knn_distances"], 3),
}


@pytest.mark.parametrize("kind", list(MIXERS))
def test_weights_sum_to_one(kind: str) -> None:
    mixer = MIXERS[kind]
    found = mixer.log_weights({"knn_distances": distances()})
    assert mixer.kind == kind
    assert found.dtype == torch.float32
    assert found.shape == ((3,) if isinstance(mixer, Fixed) else (50, 3))
    assert not found.isnan().any()
    torch.testing.assert_close(found.exp().sum(dim=-1), torch.ones(found.shape[:-1]))
    assert not found.requires_grad


def test_fixed_weights_are_those_given() -> None:
    found = Fixed([LM, COMPONENTS[1]], (0.75, 0.25)).log_weights({})
    assert found.tolist() == pytest.approx([math.log(0.75), math.log(0.25)])
    assert Fixed([LM, COMPONENTS[1]], (1.0, 0.0)).log_weights({}).tolist() == [0.0, -math.inf]


@pytest.mark.parametrize("shape", [(-1,), (-1, 1), (-1, 3)])
def test_bins_go_by_the_nearest(shape: tuple[int, ...]) -> None:
    """A distance at an edge belongs below it; the farthest and the missing to the last bin."""
    asked = torch.tensor([-5.0, 0.0, 1.0, 1.0001, 4.0, 8.9, 9.0, 9.1, 1e30, math.inf, math.nan])
    column = asked if shape == (-1,) else asked[:, None].expand(shape)
    if shape == (-1, 3):
        column = column.clone()
        column[:, 1:] = 7.0  # only the first column counts
    found = Bins(COMPONENTS, EDGES, WEIGHTS).log_weights({"knn_distances": column})
    bins = [0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3]
    torch.testing.assert_close(found.exp(), torch.tensor(WEIGHTS)[bins])
    torch.testing.assert_close(first_column(column), asked, equal_nan=True)


def test_one_bin_is_a_fixed_mixture() -> None:
    found = Bins(COMPONENTS, [], [WEIGHTS[1]]).log_weights({"knn_distances": distances()})
    torch.testing.assert_close(found.exp(), torch.tensor(WEIGHTS[1]).expand(50, 3))


def test_features_stand_side_by_side() -> None:
    """In the order of the names."""
    features = {"a": torch.arange(4.0), "b": torch.ones(4, 2), "c": torch.arange(4)}
    found = gathered(features, ["c", "b", "a"])
    assert found.dtype == torch.float32
    assert found.tolist() == [[i, 1, 1, i] for i in range(4)]


def test_a_new_gate_weighs_all_the_same() -> None:
    gate = Gate(COMPONENTS, ["knn_distances"], 3).eval()
    found = gate.log_weights({"knn_distances": distances()})
    torch.testing.assert_close(found.exp(), torch.full((50, 3), 1 / 3))


def seen_by(gate: Gate, inputs: Tensor) -> Tensor:
    """What reaches the gate's first layer."""
    seen: list[Tensor] = []
    handle = gate.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    gate(inputs)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("at_a_time", [7, 500, 1000])
def test_a_gate_standardises_what_is_known(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against NumPy's mean and deviation without what is missing."""
    monkeypatch.setattr(mixers, "ROWS_AT_A_TIME", at_a_time)
    inputs = 30 + 4 * torch.randn(500, 3, generator=torch.manual_seed(2)) * torch.tensor([1, 9, 0])
    inputs[::5, 0], inputs[1::5, 1], inputs[2, 1] = math.nan, math.inf, -math.inf
    gate = random_gate(COMPONENTS, ["x"], 3)
    gate.standardize(inputs)
    known = inputs.double().numpy()
    known[~np.isfinite(known)] = np.nan
    mean, deviation = np.nanmean(known, axis=0), np.nanstd(known, axis=0)
    expected = (known - mean)[:, :2] / deviation[:2]
    expected[2::5, 1][0] = -FAR
    expected[1::5, 1] = FAR
    found = seen_by(gate, inputs)
    assert found.isfinite().all()
    np.testing.assert_allclose(found[:, :2], np.nan_to_num(expected), rtol=1e-4, atol=1e-4)
    assert found[:, 2].unique().numel() == 1  # a feature that is always the same


def test_what_is_not_known_counts_as_average_and_nothing_as_more_than_far() -> None:
    gate = random_gate(COMPONENTS, ["x"], 3)
    gate.standardize(10 + torch.randn(99, 3, generator=torch.manual_seed(2)))
    average = gate.mean[None]
    odd = average.clone()
    odd[0, 1] = math.nan
    torch.testing.assert_close(gate(odd), gate(average))
    for far in (1e9, math.inf):
        a, b = average.clone(), average.clone()
        a[0, 0], b[0, 0] = far, average[0, 0] + (FAR + 1) / gate.scale[0]
        torch.testing.assert_close(gate(a), gate(b))
        assert not torch.allclose(gate(a), gate(average))


def test_features_that_nobody_knows_do_not_matter() -> None:
    gate = random_gate(COMPONENTS, ["x"], 2)
    gate.standardize(torch.tensor([[1.0, math.nan], [3.0, math.nan]]))
    assert gate(torch.tensor([[2.0, math.nan]])).isfinite().all()
    assert gate.scale.isfinite().all()
