"""A context window that is found in the text, whichever blocks are asked for.

fairseq's own (``LMContextWindowDataset``) puts before a block what it collated last, so it must be
asked for all blocks, in their order, in one process. Here a block that does not follow the last one
comes after what stands before it in the text all the same: a part of a text, or one of several
processes, sees the contexts of a run over the whole of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from fairseq.data import BaseWrapperDataset, LMContextWindowDataset


class InTextOrder(BaseWrapperDataset):
    """Blocks as they stand in the text; the stock loader may go by their length."""

    def ordered_indices(self) -> np.ndarray:
        """(number of blocks,) int64."""
        return np.arange(len(self))


class InStretches(BaseWrapperDataset):
    """Some stretches of a split's blocks, in their order; no batch reaches from one into another.

    Args:
        dataset: all blocks.
        stretches: ranges of their numbers, ascending.
    """

    def __init__(self, dataset: Any, stretches: Sequence[range]) -> None:
        super().__init__(dataset)
        self._stretches = stretches

    def ordered_indices(self) -> np.ndarray:
        """(n,) int64, the blocks of all stretches."""
        blocks = [np.arange(stretch.start, stretch.stop) for stretch in self._stretches]
        return np.concatenate([np.zeros(0, np.int64), *blocks])

    def batch_by_size(self, indices: np.ndarray, **options: Any) -> list[Any]:
        """As fairseq's, of each stretch by itself."""
        batches: list[Any] = []
        for stretch in self._stretches:
            here = indices[(indices >= stretch.start) & (indices < stretch.stop)]
            batches += super().batch_by_size(here, **options)
        return batches


class WindowsInText(LMContextWindowDataset):
    """Blocks of a split, each after the context window that stands before it.

    A batch is to hold blocks as they follow each other in the text.

    Args:
        dataset: the blocks without their windows.
        tokens: of a block at most.
        window: tokens before it at most.
        pad: the padding token's id.
        longest: tokens of a block that the model takes; fairseq leaves longer ones out, of windows
            too. None where there is no end to them.
    """

    def __init__(
        self, dataset: Any, tokens: int, window: int, pad: int, longest: int | None = None
    ) -> None:
        super().__init__(dataset, tokens, window, pad)
        sizes = np.asarray(dataset.sizes)
        self._read = np.flatnonzero(sizes <= (longest or sizes.max(initial=0)))
        self._next = 0

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """As fairseq's, after the tokens that stand before the first of the samples."""
        if not samples:  # of a process that fairseq finds no more batches for
            return {}
        place = int(np.searchsorted(self._read, int(samples[0]["id"])))
        if place != self._next:
            self._read_before(place)
        self._next = place + len(samples)
        batch: dict[str, Any] = super().collater(samples)
        return batch

    def _read_before(self, place: int) -> None:
        """Shows fairseq's collater the blocks that the window reaches into, one by one."""
        first, tokens = place, 0
        while first > 0 and tokens < self.context_window:
            first -= 1
            tokens += int(self.dataset.size(self._read[first]))
        self.prev_tokens = np.empty([0])
        for block in self._read[first:place]:
            super().collater([self.dataset[int(block)]])
