"""A picture of a query and its neighbours: where they lie, as far as two dimensions can tell."""

from __future__ import annotations

import numpy as np

#: Principal components that are drawn.
DRAWN = 2


def places(query: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Points by their two principal components, those along which they differ most.

    Args:
        query: (D,) as the keys are: after the datastore's projection, where there is one.
        keys: (S, D) of the neighbours.

    Returns:
        (1 + S, 2) float64, the query's first, their mean at 0, in units of the keys, so that a
        distance in the picture is at most the true one. The same points give the same picture.
    """
    points = np.concatenate([query[None], keys]).astype(np.float64)
    left, sizes, _ = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)
    found = (left * sizes)[:, :DRAWN]
    # A component may as well be turned around: the point that is farthest out lies above 0.
    farthest = np.take_along_axis(found, np.abs(found).argmax(axis=0)[None], axis=0)
    found = found * np.where(farthest < 0, -1.0, 1.0)
    return np.pad(found, ((0, 0), (0, DRAWN - found.shape[1])))
