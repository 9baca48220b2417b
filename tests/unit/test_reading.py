"""Reading at one's own pace: what is made of a text does not depend on how it was read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_lm import DECODERS, PAD, VOCABULARY, decoder
from torch import Tensor

from fairseq_knnlm.lm.reading import Reading
from fairseq_knnlm.lm.transformer import TransformerLM

KINDS: dict[str, dict[str, Any]] = {
    **DECODERS,
    "learned": {"decoder_learned_pos": True},
    "placeless": {"no_token_positional_embeddings": True},
}


class Whole:
    """The same texts, read from their beginnings by fairseq's plain forward pass."""

    def __init__(self, lm: TransformerLM, texts: list[list[int]]) -> None:
        self.lm = lm
        self.texts = texts

    def last(self, text: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Features, keys and tokens before, of the last tokens of a text."""
        tokens = torch.tensor([self.texts[text]])
        found = self.lm.encode({"src_tokens": tokens}, torch.ones_like(tokens).bool())
        assert found.keys is not None
        return found.features[-count:], found.keys[-count:], found.before[-count:]


def padded(texts: list[list[int]]) -> Tensor:
    longest = max(map(len, texts))
    return torch.tensor([text + [-1] * (longest - len(text)) for text in texts])


def read(reading: Reading, whole: Whole, more: list[list[int]]) -> None:
    """Reads on, and compares with reading everything."""
    found = reading.read(padded(more))
    start = 0
    for text, tokens in enumerate(more):
        whole.texts[text] += tokens
        features, keys, before = whole.last(text, len(tokens))
        part = slice(start, start + len(tokens))
        torch.testing.assert_close(found.features[part], features, rtol=1e-5, atol=1e-5)
        assert found.keys is not None
        torch.testing.assert_close(found.keys[part], keys, rtol=1e-5, atol=1e-5)
        assert torch.equal(found.before[part], before)
        start += len(tokens)
    assert start == len(found.features)


@pytest.mark.parametrize("kind", list(KINDS))
def test_texts_that_go_on_as_they_please(kind: str) -> None:
    """Prompts of unequal lengths, drafts taken back, some texts ended and others told twice."""
    lm = TransformerLM(decoder(**KINDS[kind]), "last_ffn_input")
    reading, whole = Reading(lm, 3, PAD), Whole(lm, [[], [], []])
    random = torch.manual_seed(5)

    def some(count: int) -> list[int]:
        return torch.randint(4, VOCABULARY, (count,), generator=random).tolist()

    read(reading, whole, [some(5), some(1), some(3)])
    read(reading, whole, [some(1), some(1), some(1)])
    for _ in range(4):
        read(reading, whole, [some(2), some(4), some(1)])
        back = [1, 3, 0]
        reading.forget(torch.tensor(back))
        whole.texts = [text[: len(text) - n] for text, n in zip(whole.texts, back, strict=True)]
    assert reading.lengths.tolist() == list(map(len, whole.texts))
    reading.keep(torch.tensor([2, 0, 2]))
    whole.texts = [list(whole.texts[text]) for text in (2, 0, 2)]
    read(reading, whole, [some(2), some(1), some(3)])
    reading.keep(torch.tensor([1]))
    whole.texts = [whole.texts[1]]
    read(reading, whole, [some(6)])
    reading.forget(torch.tensor([6]))
    whole.texts[0] = whole.texts[0][:-6]
    read(reading, whole, [some(1)])


def test_what_was_taken_back_takes_no_room() -> None:
    """The state of a layer is no wider than a text is long, but for some slack."""
    lm = TransformerLM(decoder())
    reading = Reading(lm, 2, PAD)
    for _ in range(20):
        reading.read(torch.randint(4, VOCABULARY, (2, 9)))
        reading.forget(torch.tensor([9, 8]))
    assert reading.lengths.tolist() == [0, 20]
    (buffer, *_) = (buffer for _, buffer in reading._buffers())
    assert buffer["prev_key"] is not None
    assert buffer["prev_key"].shape[2] <= 1.25 * 20 + 16


def test_a_decoder_with_layers_of_its_own_does_not_read_ahead() -> None:
    model = decoder()
    assert TransformerLM(model).reads_ahead

    class Other(type(model.decoder.layers[0])):  # type: ignore[misc]
        """A layer that may remember anything."""

    model.decoder.layers[0].__class__ = Other
    assert not TransformerLM(model).reads_ahead
