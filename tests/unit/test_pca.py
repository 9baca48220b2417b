"""Principal components against the singular value decomposition of NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest

from fairseq_knnlm.index.pca import principal_components


def spread(rows: int, width: int, mean: float = 0.0, scale: float = 1.0) -> np.ndarray:
    """(rows, width) float32 keys that vary less and less from column to column, then turned."""
    rng = np.random.default_rng(rows + width)
    turn, _ = np.linalg.qr(rng.normal(size=(width, width)))
    keys = rng.normal(size=(rows, width)) * np.geomspace(1, 0.05, width) @ turn
    return ((keys + mean) * scale).astype(np.float32)


def by_svd(keys: np.ndarray) -> np.ndarray:
    """(min(n, D), D) directions of the centred keys, the greatest variance first, in float64."""
    exact = keys.astype(np.float64)
    return np.linalg.svd(exact - exact.mean(axis=0), full_matrices=False)[2]


@pytest.mark.parametrize(
    ("keys", "components"),
    [
        (spread(600, 8), 3),
        (spread(600, 8), 8),
        (spread(5000, 64, mean=100), 20),  # far from the origin
        (spread(500, 16, scale=1e25), 5),  # whose squares float32 does not hold
        (spread(500, 16, scale=1e-25), 5),
        (spread(50, 64), 20),  # fewer keys than dimensions
        (spread(50, 64), 49),  # all that they span
        (spread(64, 64), 30),
        (spread(2, 64), 1),
    ],
)
def test_the_subspace_is_that_of_the_svd(keys: np.ndarray, components: int) -> None:
    found = principal_components(keys.copy(), components)
    assert (found.shape, found.dtype) == ((keys.shape[1], components), np.float32)
    np.testing.assert_allclose(found.T @ found, np.eye(components), atol=2e-6)
    cosines = np.linalg.svd(by_svd(keys)[:components] @ found, compute_uv=False)
    assert cosines.min() > 1 - 1e-6  # of the angles between both subspaces


def test_the_greatest_variance_comes_first() -> None:
    keys = spread(600, 8, mean=3)
    variances = np.var(keys @ principal_components(keys.copy(), 8), axis=0)
    assert (np.diff(variances) < 0).all()


@pytest.mark.parametrize("rows", [1, 2, 5, 9])
def test_few_keys_keep_their_distances(rows: int) -> None:
    """They span fewer dimensions than are asked for; the others are any."""
    keys = spread(rows, 32)
    found = principal_components(keys.copy(), rows)
    np.testing.assert_allclose(found.T @ found, np.eye(rows), atol=2e-6)
    before, after = keys[:, None] - keys, (keys @ found)[:, None] - keys @ found
    np.testing.assert_allclose((after**2).sum(2), (before**2).sum(2), rtol=1e-4, atol=1e-6)


def test_keys_that_are_all_the_same() -> None:
    found = principal_components(np.full((10, 4), 7, np.float32), 2)
    np.testing.assert_allclose(found.T @ found, np.eye(2), atol=1e-6)
