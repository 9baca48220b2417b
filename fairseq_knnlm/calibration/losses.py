"""What mixtures cost on a score table, in natural log: as evaluation mixes, by ``mix``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fairseq_knnlm.calibration.table import ScoreTable
from fairseq_knnlm.errors import TableError
from fairseq_knnlm.mixture.components import Component
from fairseq_knnlm.mixture.mix import mix
from fairseq_knnlm.mixture.mixers import Mixer

#: Nats a token beyond which a perplexity is no number.
MOST_NATS = 700.0


def tensors(features: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """The features of a table as mixers want them, which share its memory."""
    return {name: torch.from_numpy(feature) for name, feature in features.items()}


def log_probs(
    table: ScoreTable, components: Sequence[Component], rows: np.ndarray | slice = slice(None)
) -> np.ndarray:
    """(N, E) float32, the components' columns of a table, natural log; NaN where one abstains."""
    return np.stack([table.column(component)[rows] for component in components], axis=1)


def mixture_losses(
    table: ScoreTable, mixer: Mixer, rows: np.ndarray | slice = slice(None)
) -> np.ndarray:
    """(N,) float64, -log p of each token of a table's rows by a mixture, natural log."""
    columns = torch.from_numpy(log_probs(table, mixer.components, rows))
    weights = mixer.log_weights(tensors(table.features(mixer.features, rows)))
    return -mix(columns, weights, mixer.abstain).double().numpy()


def mean_loss(table: ScoreTable, mixer: Mixer, rows: np.ndarray | slice = slice(None)) -> float:
    """Mean of ``mixture_losses``, natural log.

    Raises:
        TableError: where it is no number, or its perplexity none.
    """
    loss = float(mixture_losses(table, mixer, rows).mean())
    if not loss < MOST_NATS:
        raise TableError(
            "the score table gives a mixture no perplexity",
            expected=f"a loss below {MOST_NATS:g} nats a token",
            found=f"{loss:g}, of {'+'.join({one.expert: 0 for one in mixer.components})}",
            do="look for infinite or wrong numbers in the table, and write it again",
        )
    return loss
