"""N-grams of the datastore's text as an expert: what usually follows the last few tokens."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.errors import OutputError
from fairseq_knnlm.experts.contract import Timeless
from fairseq_knnlm.experts.dense import DensePrediction
from fairseq_knnlm.experts.kind import Kind, Models, Opened, check_unmerged, flag
from fairseq_knnlm.experts.kneser_ney import NGramModel
from fairseq_knnlm.experts.ngram_file import counted_from, load_counts, save_counts
from fairseq_knnlm.lm.contexts import CONTEXT, Contexts

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class NGramOptions:
    """Flags of the n-grams."""

    ngram_lmbda: float | None = flag(
        None, "weight of the n-grams (default: the calibration, else 0.1)", weight=True
    )


@dataclass(frozen=True)
class NGramSetting:
    """Which n-grams.

    Attributes:
        order: n at most.
    """

    order: int = CONTEXT + 1


class NGramKind(Kind):
    """``ngram``, counted from the first datastore's values."""

    name = "ngram"
    options = NGramOptions
    setting = NGramSetting
    needs_datastore = True

    def open(self, options: NGramOptions, stores: Sequence[Datastore], number: int) -> NGramModel:
        return counted(stores[0])

    def make(
        self, opened: Opened, models: Models, settings: Sequence[NGramSetting], features: bool
    ) -> NGramExpert:
        return NGramExpert(opened.parts, features=features)

    def described(self, opened: Opened, models: Models) -> dict[str, Any]:
        return {"order": opened.parts.order, "tokens": opened.parts.tokens}


def counted(store: Datastore) -> NGramModel:
    """Counts of a datastore's text, kept beside it once made, and made anew once it was changed.

    Raises:
        ConfigError: where entries of the datastore were merged.
        NGramError: where there are counts that are damaged, or of another datastore.
    """
    remedy = "leave ngram out of --experts, or put the original datastore first"
    check_unmerged(store, "n-grams", remedy)
    path = store.ngram_path
    vocabulary = store.manifest.origin.vocabulary
    if path.is_file() and counted_from(path) not in store.manifest.before:
        return load_counts(
            *(path, store.fingerprint),
            vocabulary=vocabulary,
            tokens=len(store),
            breaks=store.breaks,
        )
    model = NGramModel.count(store.values, vocabulary, CONTEXT + 1, breaks=store.breaks)
    try:
        save_counts(model, path, store.fingerprint)
    except (OSError, OutputError) as error:  # the datastore may be somebody else's
        reason = str(error).splitlines()[0]
        logger.warning("the n-gram counts are not kept: %s", reason)
    return model


KIND = NGramKind()
