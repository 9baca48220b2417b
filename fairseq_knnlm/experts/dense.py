"""The prediction of an expert that knows every token: language models and n-grams."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class DensePrediction:
    """A distribution over the whole vocabulary, of which one token can be asked alone.

    Attributes:
        of_token: log p of tokens (N,), as (N,) float32, natural log.
        of_all: log p of every token, (N, V).
        features: by name, (N,) or (N, M).
    """

    of_token: Callable[[Tensor], Tensor]
    of_all: Callable[[], Tensor]
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def log_prob(self, tokens: Tensor) -> Tensor:
        """(N, 1), natural log: there is one setting."""
        return self.of_token(tokens)[:, None]

    def log_probs(self, setting: int) -> Tensor:
        """(N, V), natural log."""
        assert setting == 0
        return self.of_all()
