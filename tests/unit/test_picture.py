"""The picture of a query and its neighbours: against the principal components' definition."""

from __future__ import annotations

import numpy as np
import pytest

from fairseq_knnlm.explanation.picture import places

RNG = np.random.default_rng(5)


def distances(points: np.ndarray) -> np.ndarray:
    return np.linalg.norm(points[:, None] - points[None], axis=2)


def test_the_directions_of_the_largest_variance() -> None:
    """The two first eigenvectors of the covariance, up to their sign."""
    query, keys = RNG.normal(size=12), RNG.normal(size=(7, 12))
    points = np.concatenate([query[None], keys])
    _, vectors = np.linalg.eigh(np.cov(points.T))
    expected = (points - points.mean(axis=0)) @ vectors[:, [-1, -2]]
    found = places(query, keys)
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-9)
    assert found.shape == (8, 2)


def test_a_plane_is_drawn_as_it_is() -> None:
    plane = np.linalg.qr(RNG.normal(size=(9, 2)))[0]
    points = RNG.normal(size=(6, 2)) @ plane.T + 3
    np.testing.assert_allclose(distances(places(points[0], points[1:])), distances(points))


@pytest.mark.parametrize(("width", "keys"), [(5, 1), (1, 3), (4, 0)])
def test_fewer_dimensions_than_two(width: int, keys: int) -> None:
    points = RNG.normal(size=(keys + 1, width))
    found = places(points[0], points[1:])
    assert found.shape == (keys + 1, 2)
    np.testing.assert_allclose(distances(found), distances(points), atol=1e-12)


def test_points_in_one_place() -> None:
    assert not places(np.ones(4), np.ones((3, 4))).any()


def test_the_same_points_give_the_same_picture() -> None:
    query, keys = RNG.normal(size=6), RNG.normal(size=(4, 6))
    found = places(query, keys)
    np.testing.assert_array_equal(places(query, keys), found)
    np.testing.assert_allclose(places(query.astype("f4"), keys.astype("f4")), found, atol=1e-5)
    assert (np.take_along_axis(found, np.abs(found).argmax(axis=0)[None], axis=0) > 0).all()
