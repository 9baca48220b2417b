"""An expert of somebody else's: how often a token stands in the datastore, whatever came before.

A package like this one is fairseq's ``--user-dir`` in the place of ``fairseq_knnlm``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fairseq_knnlm.experts.contract import Timeless
from fairseq_knnlm.experts.kind import Kind, Models, Opened, flag
from fairseq_knnlm.experts.registry import register
from fairseq_knnlm.lm.contexts import Contexts


@dataclass(frozen=True)
class UnigramOptions:
    """Flags of the unigrams."""

    unigram_lmbda: float | None = flag(None, "weight of the unigrams", weight=True)
    unigram_smoothing: float | None = flag(None, "added to each count", setting="smoothing")


@dataclass(frozen=True)
class UnigramSetting:
    """How counts become probabilities."""

    smoothing: float = 1.0


@dataclass(frozen=True)
class UnigramPrediction:
    """The same for each of N contexts.

    Attributes:
        table: (V, S) float32, log p of every token in each setting.
        size: N.
        features: by name, (N,).
    """

    table: torch.Tensor
    size: int
    features: Mapping[str, torch.Tensor]

    def log_prob(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table[tokens]

    def log_probs(self, setting: int) -> torch.Tensor:
        return self.table[:, setting].expand(self.size, -1)


class UnigramExpert(Timeless):
    """Predicts from counts (V,) alone."""

    name = "unigram"

    def __init__(
        self, counts: torch.Tensor, settings: Sequence[UnigramSetting], features: bool
    ) -> None:
        self.counts, self.features, self.asked = counts, features, 0
        self.settings = [asdict(setting) for setting in settings]
        added = torch.tensor([setting.smoothing for setting in settings], dtype=torch.float64)
        smoothed = counts[:, None] + added
        self.table = (smoothed / smoothed.sum(dim=0)).log().float()

    def predict(self, contexts: Contexts) -> UnigramPrediction:
        self.asked += len(contexts)
        known = self.counts[contexts.before[:, 0].clamp_min(0)].float().log1p()
        features = {"unigram_before": known} if self.features else {}
        return UnigramPrediction(self.table, len(contexts), features)


class UnigramKind(Kind):
    name = "unigram"
    options = UnigramOptions
    setting = UnigramSetting
    needs_datastore = True

    def open(self, options: UnigramOptions, stores: Sequence[Any], number: int) -> torch.Tensor:
        values = torch.from_numpy(stores[0].values.astype("int64"))
        return torch.bincount(values, minlength=stores[0].manifest.origin.vocabulary)

    def grid(self, opened: Opened, models: Models) -> list[UnigramSetting]:
        return [UnigramSetting(smoothing) for smoothing in (0.01, 1.0, 100.0)]

    def make(
        self, opened: Opened, models: Models, settings: Sequence[UnigramSetting], features: bool
    ) -> UnigramExpert:
        return UnigramExpert(opened.parts, settings, features)

    def described(self, opened: Opened, models: Models) -> dict[str, Any]:
        return {"tokens": int(opened.parts.sum())}

    def counts(self, experts: Sequence[UnigramExpert]) -> dict[str, float]:
        return {"unigrams_asked": sum(expert.asked for expert in experts)}

    def lines(self, found: Mapping[str, Any]) -> Iterator[str]:
        yield f"unigrams were asked of {found['unigrams_asked']} tokens"


register(UnigramKind())

from fairseq_knnlm import tasks  # noqa: E402, F401  with the flags above
