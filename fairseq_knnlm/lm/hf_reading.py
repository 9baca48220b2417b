"""Texts that a wrapped model reads at their own pace: what of the cache each token sees.

The cache of transformers holds a column a token, as fairseq's state does. What is hidden, and what
lies too far back for layers that look back so far only, is told by masks of our own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fairseq_knnlm.lm.causal import FAMILIES, cache_of
from fairseq_knnlm.lm.reading import InColumns


class CausalReading(InColumns):
    """Of a wrapped model of a known family.

    Args:
        lm: a ``CausalLM``, and one that ``reads_ahead``.
        texts: B.
        pad: the padding token's id.
    """

    def __init__(self, lm: Any, texts: int, pad: int) -> None:
        super().__init__(lm.model, texts, pad)
        self.lm = lm
        self._cache = cache_of(None)

    def _run(self, tokens: Tensor, places: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        new = tokens.shape[1]
        places = places.masked_fill(hidden[:, -new:], 0)  # behind a text there may be none
        found: tuple[Tensor, Tensor | None] = self.lm.run(
            tokens, places, self._mask(hidden, new), self._cache
        )
        return found

    def _mask(self, hidden: Tensor, new: int) -> Any:
        """What the last ``new`` of the columns see, as the family takes it."""
        config = self.lm.causal.lm.config
        dtype = next(self.lm.model.parameters()).dtype
        full = sees(hidden, new)
        window = getattr(config, "sliding_window", None)
        near = full if window is None else full & within(hidden, new, window)
        if not FAMILIES[config.model_type].masked_by_kind:
            return added(near, dtype)
        return {"full_attention": added(full, dtype), "sliding_attention": added(near, dtype)}

    def _reorder(self, order: Tensor) -> None:
        self._cache.reorder_cache(order)

    def _move(self, order: Tensor) -> None:
        for layer in self._cache.layers:
            for name in ("keys", "values"):
                held = getattr(layer, name)  # (B, heads, C, width)
                places = order[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
                setattr(layer, name, held.gather(2, places))


def sees(hidden: Tensor, new: int) -> Tensor:
    """(B, new, C) bool: which columns each of the last ones sees.

    Those before it that are not hidden; and itself, so that nothing is divided by zero.

    Args:
        hidden: (B, C) bool.
        new: how many are the last ones.
    """
    columns = torch.arange(hidden.shape[1], device=hidden.device)
    behind = columns[-new:, None] - columns
    return ((behind > 0) & ~hidden[:, None]) | (behind == 0)


def within(hidden: Tensor, new: int, window: int) -> Tensor:
    """(B, new, C) bool: which columns lie within a window of tokens that are not hidden.

    Args:
        hidden: (B, C) bool.
        new: how many are the last ones.
        window: tokens, the last one's own among them.
    """
    places = (~hidden).cumsum(dim=1)
    return places[:, -new:, None] - places[:, None] < window


def added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, new, C), what transformers adds before the softmax: 0, or -inf of what is not seen."""
    zeros = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return zeros.masked_fill_(~seen, -torch.inf)[:, None]
