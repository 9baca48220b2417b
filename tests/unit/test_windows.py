"""A block's window is that of fairseq's own pass over the whole text, wherever reading begins.

The oracle is ``LMContextWindowDataset``, asked for every block in the order of the text.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary, LMContextWindowDataset, MonolingualDataset, TokenBlockDataset

from fairseq_knnlm.tasks.windows import WindowsInText

TOKENS = 6


def dictionary() -> Dictionary:
    found = Dictionary()
    for number in range(40):
        found.add_symbol(f"w{number}")
    return found


def blocks_of_text(mode: str, bos: bool) -> MonolingualDataset:
    """Blocks of 25 sentences, most of them shorter than ``TOKENS``."""
    types, rng = dictionary(), np.random.default_rng(0)
    lengths = rng.integers(2, 7, size=25)
    lines = [
        torch.tensor([*rng.integers(4, len(types), length - 1), types.eos()]) for length in lengths
    ]
    cut = TokenBlockDataset(
        lines, lengths, TOKENS, types.pad(), types.eos(), mode, include_targets=True
    )
    return MonolingualDataset(
        cut, cut.sizes, types, types, True, False, targets=["future"], add_bos_token=bos
    )


def collated(dataset: Any, batches: list[range]) -> dict[int, tuple[list[int], list[int], int]]:
    """By block: its tokens with what stands before, its targets, and where it starts."""
    found = {}
    for batch in batches:
        sample = dataset.collater([dataset[number] for number in batch])
        for place, block in enumerate(sample["id"].tolist()):
            tokens = sample["net_input"]["src_tokens"][place]
            found[block] = (
                tokens[tokens.ne(1)].tolist(),
                sample["target"][place][sample["target"][place].ne(1)].tolist(),
                sample["start_indices"][place],
            )
    return found


@pytest.mark.parametrize("window", [1, 5, 6, 13, 200])
@pytest.mark.parametrize("mode", ["none", "complete"])
@pytest.mark.parametrize("bos", [False, True])
def test_wherever_one_begins_the_window_is_that_of_the_whole_text(
    mode: str, bos: bool, window: int
) -> None:
    dataset = blocks_of_text(mode, bos)
    count = len(dataset)
    stock = LMContextWindowDataset(dataset, TOKENS, window, 1)
    expected = collated(
        stock, [range(start, min(start + 3, count)) for start in range(0, count, 3)]
    )
    ours = WindowsInText(dataset, TOKENS, window, 1)
    jumps = [range(9, 12), range(12, 13), range(3), range(count - 2, count), range(3, 5)]
    found = collated(ours, jumps)
    assert found == {block: expected[block] for batch in jumps for block in batch}


def test_what_is_read_once_more_is_the_same() -> None:
    dataset = WindowsInText(blocks_of_text("none", False), TOKENS, 7, 1)
    assert collated(dataset, [range(4, 6)]) == collated(dataset, [range(4, 6)])


def test_blocks_that_fairseq_leaves_out_are_in_no_window() -> None:
    dataset = blocks_of_text("eos", False)
    read = [block for block in range(len(dataset)) if dataset.size(block) <= 4]
    assert len(read) < len(dataset)
    stock = LMContextWindowDataset(dataset, TOKENS, 9, 1)
    expected = {}
    for block in read:
        expected |= collated(stock, [range(block, block + 1)])
    ours = WindowsInText(dataset, TOKENS, 9, 1, longest=4)
    for block in reversed(read):
        assert collated(ours, [range(block, block + 1)]) == {block: expected[block]}


def test_nothing_is_collated_as_nothing() -> None:
    assert WindowsInText(blocks_of_text("none", False), TOKENS, 3, 1).collater([]) == {}
