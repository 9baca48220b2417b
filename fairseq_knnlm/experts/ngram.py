"""N-grams of a datastore's text as an expert: their flags, and how they are counted."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.errors import OutputError
from fairseq_knnlm.experts.kind import Kind, Models, Opened, check_unmerged, flag
from fairseq_knnlm.experts.kneser_ney import NGramModel
from fairseq_knnlm.experts.knn import NGramExpert
from fairseq_knnlm.lm.transformer import CONTEXT

logger = logging.getLogger(__name__)


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
    """Counts of a datastore's text, kept beside it once made.

    Raises:
        ConfigError: where entries of the datastore were merged.
        NGramError: where there are counts that are damaged, or of another datastore.
    """
    remedy = "leave ngram out of --experts, or put the original datastore first"
    check_unmerged(store, "n-grams", remedy)
    path = store.ngram_path
    vocabulary = store.manifest.origin.vocabulary
    if path.is_file():
        tokens = len(store)
        return NGramModel.load(path, store.fingerprint, vocabulary=vocabulary, tokens=tokens)
    model = NGramModel.count(store.values, vocabulary, CONTEXT + 1)
    try:
        model.save(path, store.fingerprint)
    except (OSError, OutputError) as error:  # the datastore may be somebody else's
        reason = str(error).splitlines()[0]
        logger.warning("the n-gram counts are not kept: %s", reason)
    return model


KIND = NGramKind()
