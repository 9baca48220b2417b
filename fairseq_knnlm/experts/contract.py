"""What an expert is, and what it says: a prediction, made before the answer is known.

``predict`` sees no target. Whoever scores a text then asks the prediction for the tokens that came,
whoever writes one asks it for all tokens; so nothing can leak, and both are one code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from fairseq_knnlm.lm.contexts import Contexts

T = TypeVar("T")


class Distribution(NamedTuple):
    """Distributions over a few tokens each, which may come several times; all others have none.

    Attributes:
        tokens: (N, K) ids.
        log_probs: (N, K) float32, natural log; -inf where an entry does not count, NaN throughout
            where the expert abstains. Those of the same token add up.
    """

    tokens: Tensor
    log_probs: Tensor

    def sums(self, vocabulary: int) -> Tensor:
        """(N, K) float32, natural log: of all entries with the token of each; -inf of none.

        Args:
            vocabulary: V, above all ids.
        """
        tokens = self.tokens.long()
        shares = self.log_probs.masked_fill(self.log_probs.isnan(), -torch.inf)
        # Relative to the largest share of each token, so that no small one underflows.
        whole = shares.new_full((len(shares), vocabulary), -torch.inf)
        tops = whole.scatter_reduce_(1, tokens, shares, "amax").gather(1, tokens)
        known = tops.nan_to_num(neginf=0.0)
        sums = whole.zero_().scatter_add_(1, tokens, (shares - known).exp_())
        return sums.gather(1, tokens).log_() + tops

    def over(self, vocabulary: int) -> Tensor:
        """(N, V) float32, natural log, of every token; NaN throughout where the expert abstains."""
        whole = self.log_probs.new_full((len(self.log_probs), vocabulary), -torch.inf)
        whole.scatter_(1, self.tokens.long(), self.sums(vocabulary))
        return whole.masked_fill_(self.log_probs.isnan().all(dim=1, keepdim=True), torch.nan)


class Prediction(Protocol):
    """What an expert says of N contexts."""

    @property
    def features(self) -> Mapping[str, Tensor]:
        """By name, (N,) or (N, M): what a mixer may go by. They depend on contexts alone."""

    def log_prob(self, tokens: Tensor) -> Tensor:
        """log p of one token (N,) each in every setting: (N, S) float32, natural log.

        -inf where it gives the token no probability, NaN where it abstains: of no token then.
        """

    def log_probs(self, setting: int) -> Tensor | Distribution:
        """log p of every token in one setting: (N, V) float32, natural log; or of a few.

        Those are the same in every setting.
        """


class Expert(Protocol):
    """Predicts what follows contexts, in several settings at once, a column each."""

    @property
    def name(self) -> str:
        """Short, one of its kind; its features begin with it."""

    @property
    def settings(self) -> Sequence[Mapping[str, Any]]:
        """What each column of its predictions is."""

    @property
    def at_a_time(self) -> int:
        """Contexts that it is best asked of at a time."""

    @property
    def looks_back(self) -> int | None:
        """Tokens of the text before a context that it must have read; None for all there are."""

    def predict(self, contexts: Contexts) -> Prediction:
        """What follows N contexts."""

    def observe(self, tokens: Tensor) -> None:
        """Tells what came after the contexts of the last prediction, (N,) int64."""

    def reorder(self, order: Tensor) -> None:
        """From now on text i goes on where text ``order[i]`` stood, (B,) int64 (beam search)."""

    def forget(self, counts: Tensor) -> None:
        """Takes back the last ``counts[i]`` contexts of text i, (B,) int64 (a draft's).

        They were all predicted at once, last, and nothing was observed since.
        """

    def follow(self, other: Expert) -> None:
        """Goes on in the texts from where another of its kind stands, which keeps what it has."""


def reordered(texts: Mapping[int, T], order: Tensor) -> dict[int, T]:
    """What is kept of each text, where text i goes on where text ``order[i]`` stood, (B,) int64."""
    return {to: texts[text] for to, text in enumerate(order.tolist()) if text in texts}


class Timeless:
    """An expert, or part of one, that keeps nothing of a text while it is read."""

    #: So many contexts are enough for the work to be shared between them, and few enough for memory
    #: to be used again in the place of new memory, which costs more than the arithmetic on it.
    at_a_time = 1024
    looks_back = 0

    def observe(self, tokens: Tensor) -> None:
        """Keeps nothing."""

    def reorder(self, order: Tensor) -> None:
        """Has nothing to reorder."""

    def forget(self, counts: Tensor) -> None:
        """Has nothing to take back."""

    def follow(self, other: Expert) -> None:
        """Has nothing to take over."""


@dataclass(frozen=True)
class FeaturesOnly:
    """A prediction that says nothing of tokens, but may help to weigh others.

    Attributes:
        features: by name, (N,) or (N, M).
    """

    features: Mapping[str, Tensor]

    def log_prob(self, tokens: Tensor) -> Tensor:
        """(N, 0): there are no settings."""
        return torch.empty((len(tokens), 0), device=tokens.device)

    def log_probs(self, setting: int) -> Tensor:
        """Cannot be asked."""
        raise IndexError(setting)


class Joined:
    """Predictions of consecutive contexts, as one.

    Args:
        parts: one or more, with as many contexts each as ``sizes`` says.
        sizes: of each.
        places: (N,) int64, where each context of all parts stands among M; those that none stands
            at are abstained from. Left out: all of them in order.
        size: M.
    """

    def __init__(
        self,
        parts: Sequence[Prediction],
        sizes: Sequence[int],
        places: Tensor | None = None,
        size: int = 0,
    ) -> None:
        self._parts = parts
        self._sizes = list(sizes)
        self._places = places
        self._size = size
        self.features = {
            name: self._placed([part.features[name] for part in parts])
            for name in parts[0].features
        }

    def _placed(self, columns: Sequence[Tensor]) -> Tensor:
        column = torch.cat(list(columns))
        if self._places is None:
            return column
        whole = column.new_full((self._size, *column.shape[1:]), torch.nan)
        return whole.index_copy_(0, self._places, column)

    def log_prob(self, tokens: Tensor) -> Tensor:
        """Of one token each, (M, S)."""
        if self._places is not None:
            tokens = tokens[self._places]
        pairs = zip(self._parts, tokens.split(self._sizes), strict=True)
        return self._placed([part.log_prob(some) for part, some in pairs])

    def log_probs(self, setting: int) -> Tensor | Distribution:
        """Of every token, (M, V), or of a few."""
        found = [part.log_probs(setting) for part in self._parts]
        if isinstance(found[0], Tensor):
            return self._placed([one for one in found if isinstance(one, Tensor)])
        few = [one for one in found if isinstance(one, Distribution)]
        tokens = torch.cat([one.tokens for one in few])
        if self._places is not None:
            whole = tokens.new_zeros((self._size, tokens.shape[1]))
            tokens = whole.index_copy_(0, self._places, tokens)
        return Distribution(tokens, self._placed([one.log_probs for one in few]))
