"""Principal components of keys, by FAISS."""

from __future__ import annotations

import numpy as np

from fairseq_knnlm.index.library import faiss


def principal_components(sample: np.ndarray, components: int) -> np.ndarray:
    """The orthogonal directions in which keys vary most, the greatest variance first.

    What FAISS would do beside that is not asked of it: its projection takes the mean off, which
    distances do not see; and it makes up directions badly where there are fewer keys than
    dimensions. So the sample is centred here, and rows of zeros are added to one that is small:
    they vary in no direction, and change none.

    Args:
        sample: (n, D) float32, finite; overwritten.
        components: P, at most D.

    Returns:
        (D, P) float32 with orthonormal columns. Columns beyond what the sample varies in, n - 1 at
        most, are any that complete them.
    """
    width = sample.shape[1]
    sample -= sample.mean(axis=0, dtype=np.float64)
    # Directions do not depend on the scale, but squares in float32 end at 1e38.
    sample /= max(sample.max(), -sample.min()) or 1.0
    if len(sample) < width:
        sample = np.pad(sample, [(0, width - len(sample)), (0, 0)])
    pca = faiss.PCAMatrix(width, components)
    pca.max_points_per_d = len(sample)  # all of it: who calls has drawn the sample
    pca.train(sample)
    return faiss.vector_to_array(pca.A).reshape(components, width).T
