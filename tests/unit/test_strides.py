"""Windows at a stride: by hand, by the loop of Hugging Face's page, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary, ListDataset, MonolingualDataset, TokenBlockDataset

from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.runs.conditions import reach, stride
from fairseq_knnlm.tasks.checks import check
from fairseq_knnlm.tasks.flags import KnnlmConfig
from fairseq_knnlm.tasks.strides import WindowsAtStride, check_reads, check_stride, windows


def loop(tokens: int, length: int, stride: int) -> list[tuple[int, list[int]]]:
    """The page's: where each window begins, and the tokens whose loss counts.

    Labels are shifted within a window, so the first token of one has none.
    """
    found, reached = [], 0
    for begin in range(0, tokens, stride):
        end = min(begin + length, tokens)
        labelled = range(max(end - (end - reached), begin), end)
        found.append((begin, [place for place in labelled if place > begin]))
        reached = end
        if end == tokens:
            break
    return [(begin, places) for begin, places in found if places]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ((10, 4, 2), [(0, 1, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]),
        ((9, 4, 2), [(0, 1, 4), (2, 4, 6), (4, 6, 8), (6, 8, 9)]),
        ((6, 4, 1), [(0, 1, 4), (1, 4, 5), (2, 5, 6)]),
        ((9, 4, 4), [(0, 1, 4), (4, 5, 8)]),  # of the last one nothing would be predicted
        ((10, 4, 4), [(0, 1, 4), (4, 5, 8), (8, 9, 10)]),
        ((3, 4, 2), [(0, 1, 3)]),
        ((4, 4, 4), [(0, 1, 4)]),
        ((1, 4, 2), []),
    ],
)
def test_by_hand(given: tuple[int, int, int], found: list[tuple[int, int, int]]) -> None:
    assert windows(*given).tolist() == [list(window) for window in found]


def test_they_are_those_of_the_page() -> None:
    for tokens in range(1, 30):
        for length in range(2, 9):
            for apart in range(1, length + 1):
                ours = windows(tokens, length, apart).tolist()
                found = [(begin, [*range(first, end)]) for begin, first, end in ours]
                assert found == loop(tokens, length, apart), (tokens, length, apart)


def dictionary() -> Dictionary:
    found = Dictionary()
    for number in range(60):
        found.add_symbol(f"w{number}")
    return found


def split(lengths: list[int]) -> tuple[MonolingualDataset, list[int]]:
    """A text in lines of these lengths, in blocks of fairseq's, and its tokens."""
    types, rng = dictionary(), np.random.default_rng(1)
    lines = [torch.from_numpy(rng.integers(4, len(types), length)) for length in lengths]
    sizes = np.array(lengths)
    listed = ListDataset(lines, sizes)
    cut = TokenBlockDataset(listed, sizes, 8, types.pad(), types.eos(), include_targets=True)
    blocks = MonolingualDataset(cut, cut.sizes, types, types, False, True, targets=["future"])
    return blocks, torch.cat(lines).tolist()


@pytest.mark.parametrize(("length", "apart"), [(7, 3), (7, 7), (7, 1), (100, 5), (7, 6), (2, 1)])
def test_items_and_batches(length: int, apart: int) -> None:
    blocks, text = split([5, 0, 3, 9, 1, 4])
    dataset = WindowsAtStride(blocks, length, apart)
    expected = loop(len(text), length, apart)
    assert dataset.ordered_indices().tolist() == [*range(len(expected))]
    batch = dataset.collater([dataset[number] for number in range(len(dataset))])
    for number, (begin, places) in enumerate(expected):
        source = batch["net_input"]["src_tokens"][number]
        target = batch["target"][number]
        assert source[source.ne(1)].tolist() == text[begin : places[-1]]
        there = target.ne(1).nonzero().flatten().tolist()
        predicted = {begin + place + 1: int(target[place]) for place in there}
        assert predicted == {place: text[place] for place in places}
        assert batch["start_indices"][number] == places[0] - begin - 1
        assert dataset.size(number) == dataset.sizes[number] == len(places)
        assert dataset.num_tokens(number) == places[-1] - begin
    assert batch["ntokens"] == sum(len(places) for _, places in expected)
    assert dataset.unpredicted == len(text) - batch["ntokens"]
    assert dataset.longest == dataset.num_tokens_vec(np.arange(len(dataset))).max()


def test_a_batch_holds_as_many_tokens_as_are_read() -> None:
    blocks, _ = split([40])
    dataset = WindowsAtStride(blocks, 9, 1)
    batches = dataset.batch_by_size(dataset.ordered_indices(), max_tokens=24)
    assert {len(batch) for batch in batches[:-1]} == {3}


def test_an_empty_batch() -> None:
    assert WindowsAtStride(split([9])[0], 4, 2).collater([]) == {}


@pytest.mark.parametrize(("length", "apart", "found"), [(8, 3, [5, 7]), (8, 8, [1, 7])])
def test_what_stands_before_a_token(length: int, apart: int, found: list[int]) -> None:
    context = {"tokens_per_sample": length, "context_window": 0, "stride": apart}
    assert reach(context) == found and stride(context) == apart
    counted = [
        place - begin
        for begin, places in loop(400, length, apart)[1:-1]  # the first begins the text
        for place in places
    ]
    assert [min(counted), max(counted)] == found


def flags(**given: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(KnnlmConfig()), "tokens_per_sample": 8, **given})


def run(window: int = 0, path: str | None = "lm.pt") -> SimpleNamespace:
    """As much of fairseq's configuration as is looked at."""
    return SimpleNamespace(
        eval_lm=SimpleNamespace(context_window=window), common_eval=SimpleNamespace(path=path)
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"stride": 9}, ["--stride from 1 to --tokens-per-sample", "--stride 9"]),
        ({"stride": 0}, ["--stride counts tokens", "1 or more"]),
        ({"stride": -3}, ["--stride", "-3"]),
        ({"stride": 10**12}, ["--stride"]),
        ({"stride": 1, "tokens_per_sample": 1}, ["--tokens-per-sample", "2 or more"]),
        ({"stride": 4, "sample_break_mode": "eos"}, ["--sample-break-mode eos exclude each other"]),
        ({"stride": 4, "sample_break_mode": "complete"}, ["--sample-break-mode complete"]),
        ({"stride": 4, "add_bos_token": True}, ["--add-bos-token exclude each other"]),
    ],
)
def test_bad_input(given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check(flags(**given))
    assert all(word in str(caught.value) for word in words), caught.value


def test_good_input() -> None:
    for apart in (1, 4, 8):
        assert check(flags(stride=apart)).reading.stride == apart
        check_stride(flags(stride=apart), run())


def test_not_beside_a_context_window() -> None:
    with pytest.raises(ConfigError, match="--stride and --context-window exclude each other"):
        check_stride(flags(stride=4), run(window=2))


def test_not_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fairseq_knnlm.tasks.strides.command", lambda: None)
    with pytest.raises(ConfigError, match="--stride does nothing in training"):
        check_stride(flags(stride=4), run(path=None))


def test_windows_that_the_model_does_not_take() -> None:
    check_reads(7, 7)
    check_reads(7, None)
    with pytest.raises(ConfigError, match="--tokens-per-sample up to 8"):
        check_reads(8, 7)
