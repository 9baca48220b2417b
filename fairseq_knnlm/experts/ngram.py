"""N-grams of the datastore's text as an expert: what usually follows the last few tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq_knnlm.experts.contract import Timeless
from fairseq_knnlm.experts.dense import DensePrediction
from fairseq_knnlm.experts.kneser_ney import NGramModel
from fairseq_knnlm.lm.contexts import CONTEXT, Contexts


class NGramExpert(Timeless):
    """An n-gram model of a datastore's text.

    Args:
        model: counts, of order at most ``CONTEXT`` + 1.
        features: name features too.
    """

    name = "ngram"

    def __init__(self, model: NGramModel, *, features: bool = False) -> None:
        assert model.order <= CONTEXT + 1
        self.model = model
        self.settings: Sequence[Mapping[str, Any]] = [{"order": model.order}]
        self.features = features

    def predict(self, contexts: Contexts) -> DensePrediction:
        """What follows the tokens before."""
        device = contexts.before.device
        after = self.model.after(contexts.before.flip(1).cpu().numpy())

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).float().to(device)

        features = {}
        if self.features:
            features = {
                "ngram_length": tensor(after.lengths),
                "ngram_count": tensor(after.counts),
                "ngram_types": tensor(after.types),
            }
        return DensePrediction(
            lambda tokens: tensor(after.log_prob(tokens.cpu().numpy())),
            lambda: tensor(after.log_probs()),
            features,
        )
