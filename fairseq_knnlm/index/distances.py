"""Distances of queries to a few keys each, difference by difference, in bounded memory."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fairseq_knnlm.datastore import Rows, Stacked

#: Bytes of float32 keys held at a time: few enough for a cache.
GATHER_BYTES = 8 * 2**20


class StackedKeys:
    """Keys in several tensors, one after another, that are looked up as if they were one.

    Args:
        parts: one or more, each (n, D), of one type and on one device.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._parts = parts
        self._ends = torch.tensor([len(part) for part in parts]).cumsum(dim=0)
        self.dtype, self.device = parts[0].dtype, parts[0].device

    def select(self, rows: Tensor, out: Tensor) -> None:
        """The keys (n, D) at ``rows`` (n,) int64, into ``out``."""
        homes = torch.bucketize(rows, self._ends, right=True)
        for home in homes.unique().tolist():
            places = (homes == home).nonzero()[:, 0]
            part = self._parts[home]
            own = rows[places] - (int(self._ends[home]) - len(part))
            out[places] = part.index_select(0, own)


def distances_to_rows(
    keys: Tensor | StackedKeys, queries: Tensor, rows: Tensor, similarity: str
) -> Tensor:
    """Distances of each query to its own rows of the keys.

    Memory beside the result is ``GATHER_BYTES`` twice at most, whatever the number of rows: every
    buffer is made once, since small results kept between large freed buffers would let the heap
    grow with each of them.

    Args:
        keys: (N, D) float16 or float32, on any device, in memory or mapped.
        queries: (Q, D) float32.
        rows: (Q, K) int64, from 0 to N - 1.
        similarity: ``"l2"`` for squared L2, ``"dot"`` for the negative inner product.

    Returns:
        (Q, K) float32, on the queries' device; NaN or infinite where a key is.
    """
    (count, k), width = rows.shape, queries.shape[1]
    found = queries.new_empty((count, k))
    if not found.numel():
        return found
    # index_select reads a map in parallel. One query's neighbours lie in few lists but all over
    # the file; sorting them by row first costs more than it gains.
    most = max(1, GATHER_BYTES // (4 * width))
    columns = min(k, most)
    at_a_time = min(count, max(1, most // columns))
    picked = torch.empty((at_a_time * columns, width), dtype=keys.dtype, device=keys.device)
    near = picked
    if (keys.dtype, keys.device) != (queries.dtype, queries.device):
        near = queries.new_empty(picked.shape)
    rows = rows.to(keys.device)
    for first in range(0, count, at_a_time):
        asked = queries[first : first + at_a_time, None]
        for left in range(0, k, columns):
            part = slice(first, first + at_a_time), slice(left, left + columns)
            wanted = rows[part]
            size = wanted.numel()
            _select(keys, wanted.reshape(-1), picked[:size])
            if near is not picked:
                near[:size].copy_(picked[:size])
            block = near[:size].view(*wanted.shape, width)
            if similarity == "dot":
                torch.sum(block.mul_(asked), dim=2, out=found[part]).neg_()
            else:
                torch.sum(block.sub_(asked).square_(), dim=2, out=found[part])
    return found


def _select(keys: Tensor | StackedKeys, rows: Tensor, out: Tensor) -> None:
    if isinstance(keys, StackedKeys):
        keys.select(rows, out)
    else:
        torch.index_select(keys, 0, rows, out=out)


def as_keys(keys: Rows) -> Tensor | StackedKeys:
    """Keys as torch reads them, in their place."""
    if isinstance(keys, Stacked):
        return StackedKeys([as_tensor(part) for part in keys.parts])
    return as_tensor(keys)


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor over an array's memory, mapped or not; uint16 as int16."""
    if array.dtype == np.uint16:
        array = array.view(np.int16)
    with warnings.catch_warnings():  # torch would rather have memory that can be written to
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)
