"""Where scored tokens stand in their text: by hand."""

from __future__ import annotations

import numpy as np
import torch

from fairseq_knnlm.runs.scorer import Blocks, Sentences

PAD, BOS = 1, 0
#: Two blocks after two positions of context; the second ends early.
TARGETS = torch.tensor([[PAD, PAD, 7, 8, 9], [PAD, PAD, 5, 0, PAD]])
WITH_BOS = torch.tensor([[PAD, PAD, BOS, 7, 8], [PAD, PAD, BOS, 0, PAD]])
IDS = torch.tensor([2, 0])
STARTS = np.array([10, 20, 30])


def test_rows_of_blocks_count_on_in_the_text() -> None:
    mask = TARGETS.ne(PAD)
    for bos in (None, BOS):
        found = Blocks(STARTS, bos).rows(IDS, mask, TARGETS)
        assert found.tolist() == [30, 31, 32, 10, 11]


def test_an_added_beginning_has_no_row() -> None:
    """And only there is that token none of the text."""
    mask = WITH_BOS.ne(PAD)
    assert Blocks(STARTS, BOS).rows(IDS, mask, WITH_BOS).tolist() == [-1, 30, 31, -1, 10]
    assert Sentences(BOS).rows(IDS, mask, WITH_BOS).tolist() == [-1, 0, 1, -1, 0]


def test_rows_of_sentences_count_from_0() -> None:
    """Also where the model saw an added beginning that is not scored, as with the hub interface."""
    mask = TARGETS.ne(PAD)
    for bos in (None, BOS):
        assert Sentences(bos).rows(IDS, mask, TARGETS).tolist() == [0, 1, 2, 0, 1]
    assert Sentences().texts(mask) is not None
    assert Sentences().texts(mask).tolist() == [0, 0, 0, 1, 1]
