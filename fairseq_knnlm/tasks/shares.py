"""A share of an evaluation: a stretch of the batches that one process would read.

fairseq gives each of N processes every N-th batch. Here each gets the batches that follow each
other, so that who lives on the text finds it in its order, and needs little of what stands before.
Each batch is one of the whole run, so that what is computed of it is the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from fairseq.data import BaseWrapperDataset

from fairseq_knnlm.calibration.sections import borders
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.runs.shares import BatchRange


class ShareOfBatches(BaseWrapperDataset):
    """A split of which fairseq gets the batches of one share, after a few that stand before it.

    Args:
        dataset: the whole split, as one process reads it.
        number: of the share, from 0.
        of: shares.

    Attributes:
        looks_back: tokens before the share that must have been read when it begins.
        before: batches that hold them, once fairseq has asked for batches.
        batch_range: of the batches behind these.
    """

    def __init__(self, dataset: Any, number: int, of: int) -> None:
        super().__init__(dataset)
        self.looks_back = 0
        self.before = 0
        self.batch_range: BatchRange | None = None
        self._number = number
        self._of = of

    def batch_by_size(self, indices: Any, *sizes: Any, **named: Any) -> Sequence[Any]:
        """The batches of the share, and before them those with the tokens it looks back to.

        Raises:
            ConfigError: where there are fewer batches than shares.
        """
        batches = self.dataset.batch_by_size(indices, *sizes, **named)
        tokens = np.array([sum(int(self.dataset.size(one)) for one in batch) for batch in batches])
        _check_enough(len(batches), self._of)
        start, stop = borders(tokens, self._of)[self._number : self._number + 2].tolist()
        whole = len(batches), int(tokens.sum())
        self.batch_range = BatchRange(self._number, self._of, start, stop - start, *whole)
        self.before = batches_before(tokens[:start], self.looks_back)
        return list(batches[start - self.before : stop])


def batches_before(tokens: np.ndarray, looks_back: int) -> int:
    """How many of the last batches hold so many tokens; all of them, where they are fewer.

    Args:
        tokens: (B,) of each batch.
        looks_back: tokens.
    """
    held = np.cumsum(tokens[::-1])
    return min(len(held), int(np.searchsorted(held, looks_back)) + 1) if looks_back else 0


def _check_enough(batches: int, shares: int) -> None:
    if batches < shares:
        raise ConfigError(
            "there are more shares than batches",
            expected=f"--num-shards up to {batches:,}, the batches of the split",
            found=f"{shares:,}",
            do=f"pass --num-shards {batches} or less, or a smaller --max-tokens to every share",
        )
