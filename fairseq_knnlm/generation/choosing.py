"""Which token comes next: the likeliest, or one drawn.

What is drawn for a place in a text depends on the probabilities and on one number of that place
alone, so the same seed writes the same text, in whatever batch and however far ahead was read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: Tokens among which those of ``top_p`` are looked for before all are.
LIKELIEST = 512


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Attributes:
        sampling: draw tokens; else the likeliest is taken.
        top_k: draw from so many of the likeliest; 0 for all.
        top_p: draw from the fewest that have this probability together (Holtzman et al., 2020); 0
            for all.
        temperature: divides log p before tokens are drawn.
        seed: of what is drawn.
        never: ids that are never chosen.
        unknown: the id of what the dictionary does not have.
        unknown_penalty: taken from its log p, natural log.
    """

    sampling: bool = False
    top_k: int = 0
    top_p: float = 0.0
    temperature: float = 1.0
    seed: int = 1
    never: tuple[int, ...] = ()
    unknown: int = 3
    unknown_penalty: float = 0.0

    def draws(self, text: int, count: int) -> list[float]:
        """What decides at each of ``count`` new places of a text, by its number: 0 to 1."""
        return np.random.default_rng([self.seed, text]).random(count).tolist()

    def choose(self, log_probs: Tensor, draws: Sequence[float]) -> Tensor:
        """A token for each of N contexts, (N,) int64.

        Args:
            log_probs: (N, V) float32, natural log; written to.
            draws: N numbers, 0 to 1, one a context.
        """
        if self.never:
            log_probs[:, list(self.never)] = -torch.inf
        if self.unknown_penalty:
            log_probs[:, self.unknown] -= self.unknown_penalty
        if not self.sampling:
            return log_probs.argmax(dim=1)
        decided = torch.tensor(draws, dtype=torch.float64, device=log_probs.device)
        return _drawn(self._allowed(log_probs / self.temperature), decided)

    def _allowed(self, log_probs: Tensor) -> Tensor:
        """Probabilities (N, V) float64 of the tokens that may be drawn; they need not sum to 1."""
        probs = log_probs.double().softmax(dim=1)
        if self.top_k:
            least = probs.topk(min(self.top_k, probs.shape[1]), dim=1).values[:, -1:]
            probs = probs.masked_fill(probs < least, 0.0)
        if self.top_p:
            probs = probs.masked_fill(~_fewest(probs, self.top_p), 0.0)
        return probs


def _fewest(probs: Tensor, share: float) -> Tensor:
    """(N, V) bool: the fewest tokens that have so much probability together, the likeliest first.

    Of tokens that are as likely those with lower ids come first.
    """
    for most in (LIKELIEST, probs.shape[1]):
        ordered = probs.topk(min(most, probs.shape[1]), dim=1).values
        if bool((ordered.sum(dim=1) > share).all()):
            break  # the others, nearly all of a large vocabulary, need no order
    count = (ordered.cumsum(dim=1) - ordered < share).sum(dim=1, keepdim=True)
    least = ordered.gather(1, count - 1)
    more, same = probs > least, probs == least
    wanted = count - more.sum(dim=1, keepdim=True)
    if bool((same.sum(dim=1, keepdim=True) > wanted).any()):
        same &= same.cumsum(dim=1) <= wanted
    return more | same


def _drawn(probs: Tensor, draws: Tensor) -> Tensor:
    """(N,) int64: where the running sum of probabilities (N, V) passes the draws (N,)."""
    sums = probs.cumsum(dim=1)
    wanted = (draws * sums[:, -1])[:, None]
    found = torch.searchsorted(sums, wanted, right=True).squeeze(1)
    last = probs.shape[1] - 1 - (probs > 0).flip(1).int().argmax(dim=1)  # of any probability
    return found.minimum(last)
