"""Attention on a CPU, some queries at a time and only to what their mask lets them see.

PyTorch's own kernel for CPUs goes through all keys, those too that a mask hides, and gains nothing
from bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

#: Of each type: what is made of them stays in cache.
QUERIES_AT_A_TIME = {torch.float32: 32, torch.bfloat16: 128}


#: PyTorch's kernel: queries, keys and values in; what is attended to and log sums of weights out.
KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def attended(operands: Sequence[Any], named: Mapping[str, Any]) -> Tensor | None:
    """What PyTorch's kernel would give, up to rounding; None for what only that can do.

    Args:
        operands, named: as the kernel takes them, without gradients.
    """
    queries, keys, values, *more = operands
    mask, scale = named.get("attn_mask"), named.get("scale")
    dropout_or_causal = any(more)
    if mask is None or dropout_or_causal or queries.dtype not in QUERIES_AT_A_TIME:
        return None
    sizes, steps = mask.shape[:-2], mask.stride()[:-2]
    if any(size > 1 and step for size, step in zip(sizes, steps, strict=True)):
        return None  # texts with masks of their own, as where one is padded
    mask = mask[(0,) * len(sizes)]
    ends = _ends(mask)
    if not ends or min(ends) == 0:
        return None
    return _attended(queries, keys, values, mask.to(queries.dtype), ends, scale)


def _attended(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    ends: Sequence[int],
    scale: float | None,
) -> Tensor:
    """softmax(scale Q K^T + mask) V.

    Args:
        queries: (B, H, T, D).
        keys, values: (B, H, S, D).
        mask: (T, S), is added.
        ends: the number of keys up to the last one that each query sees, T of them.
        scale: 1 / sqrt(D) where left out.

    Returns:
        (B, H, T, D), which lies as (T, B, H, D).
    """
    texts, heads, length, width = queries.shape
    scale = 1 / math.sqrt(width) if scale is None else scale
    found = queries.new_empty((length, texts, heads, values.shape[-1])).permute(1, 2, 0, 3)
    q, k, v = (x.flatten(0, 1) for x in (queries, keys, values))
    for start, stop in pairwise([*range(0, length, QUERIES_AT_A_TIME[q.dtype]), length]):
        seen = max(ends[start:stop])
        part = mask[start:stop, :seen]
        scores = torch.baddbmm(part, q[:, start:stop], k[:, :seen].mT, alpha=scale)
        part = scores.softmax(dim=-1) @ v[:, :seen]
        found[:, :, start:stop] = part.unflatten(0, (texts, heads))
    return found


def _ends(mask: Tensor) -> list[int]:
    """How many keys there are up to the last that each row of a mask (T, S) lets see."""
    numbers = torch.arange(1, mask.shape[1] + 1)
    return (numbers * ~mask.isneginf()).amax(dim=1).tolist() if mask.numel() else []
