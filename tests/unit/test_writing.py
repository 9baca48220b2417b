"""Choosing tokens, drafting and checking, against what anybody would work out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stores import write_store
from test_lm import PAD, VOCABULARY, decoder
from torch import Tensor

from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.generation.choosing import Decoding
from fairseq_knnlm.generation.drafts import LONGEST, Draft, Drafts, behind, past
from fairseq_knnlm.generation.loop import Counts, Length, Text, go_on
from fairseq_knnlm.generation.writer import Writer
from fairseq_knnlm.lm.transformer import TransformerLM
from fairseq_knnlm.mixture.model import MixtureLM
from fairseq_knnlm.retrieval.neighbours import Neighbours
from fairseq_knnlm.runs import generate as module

EOS = 2
PROMPTS = [[5, 6, 7, 8, 5, 6], [9], [], [11, 12, 11, 12, 11]]
PROBS = torch.tensor([0.5, 0.05, 0.2, 0.25])


def drawn(how: Decoding, count: int = 20_000) -> Tensor:
    """How often each token of PROBS was drawn."""
    chosen = how.choose(PROBS.log().repeat(count, 1), how.draws(0, count))
    return torch.bincount(chosen, minlength=4) / count


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (Decoding(sampling=True), [0.5, 0.05, 0.2, 0.25]),
        (Decoding(sampling=True, top_k=2), [2 / 3, 0, 0, 1 / 3]),
        (Decoding(sampling=True, top_p=0.7), [2 / 3, 0, 0, 1 / 3]),
        (Decoding(sampling=True, top_p=0.8), [0.5 / 0.95, 0, 0.2 / 0.95, 0.25 / 0.95]),
        (Decoding(sampling=True, top_p=0.1), [1, 0, 0, 0]),
        (Decoding(sampling=True, never=(0,)), [0, 0.1, 0.4, 0.5]),
        # The square of each, which is what half the temperature makes of them.
        (
            Decoding(sampling=True, temperature=0.5),
            [0.25 / 0.355, 0.0025 / 0.355, 0.04 / 0.355, 0.0625 / 0.355],
        ),
        (Decoding(), [1, 0, 0, 0]),
        (Decoding(never=(0,)), [0, 0, 0, 1]),
        (Decoding(unknown=0, unknown_penalty=1.0), [0, 0, 0, 1]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_should_be(
    how: Decoding, expected: Sequence[float]
) -> None:
    """Chi-squared with at most 3 degrees of freedom: above 16.3 once in 1,000."""
    found, wanted = drawn(how), torch.tensor(expected)
    assert not found[wanted == 0].any()
    some = wanted > 0
    chi2 = (20_000 * (found[some] - wanted[some]) ** 2 / wanted[some]).sum()
    assert chi2 < 16.3


def test_half_of_many_tokens_that_are_as_likely() -> None:
    """More than are looked at first; those with lower ids."""
    how, count = Decoding(sampling=True, top_p=0.5), 4096
    chosen = how.choose(torch.zeros(count, 2048), how.draws(0, count))
    assert int(chosen.max()) < 1024
    assert len(chosen.unique()) > 900


def test_what_decides_is_of_the_place_alone() -> None:
    how = Decoding(sampling=True, seed=3)
    assert how.draws(7, 10) == how.draws(7, 30)[:10]
    assert how.draws(7, 10) != how.draws(8, 10)
    assert how.draws(7, 10) != Decoding(seed=4).draws(7, 10)


def writer() -> Writer:
    return Writer(TransformerLM(decoder()), MixtureLM, {}, VOCABULARY, PAD)


def written(
    how: Decoding, drafts: Drafts | None = None, length: Length | None = None, batch: int = 4
) -> tuple[list[Text], Counts]:
    counts, texts = Counts(), []
    length = length or Length(20, 0, EOS)
    for start in range(0, len(PROMPTS), batch):
        texts += go_on(
            writer(),
            PROMPTS[start : start + batch],
            EOS,
            [length] * len(PROMPTS[start : start + batch]),
            how,
            speculation=drafts,
            first=start,
            counts=counts,
        )
    return texts, counts


def by_hand(prompt: Sequence[int], length: int) -> tuple[list[int], list[float]]:
    """The likeliest token after the other, by whole forward passes of fairseq's own."""
    model, tokens, scores = decoder(), list(prompt), []
    for _ in range(length):
        with torch.no_grad():
            logits, _ = model(torch.tensor([[EOS, *tokens]]))
        log_probs = logits[0, -1].log_softmax(dim=0)
        log_probs[PAD] = -torch.inf
        tokens.append(int(log_probs.argmax()))
        scores.append(float(log_probs.max()))
        if tokens[-1] == EOS:
            break
    return tokens, scores


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("drafts", [False, True])
def test_greedy_text_is_that_of_whole_passes(batch: int, drafts: bool) -> None:
    texts, counts = written(Decoding(never=(PAD,)), Drafts() if drafts else None, batch=batch)
    for text, prompt in zip(texts, PROMPTS, strict=True):
        tokens, scores = by_hand(prompt, 20)
        assert text.tokens == tokens
        assert text.given == len(prompt)
        torch.testing.assert_close(
            torch.tensor(text.log_probs), torch.tensor(scores), rtol=1e-4, atol=1e-4
        )
    assert counts.tokens == sum(text.new for text in texts) == counts.steps + counts.kept
    assert (counts.kept > 0) == drafts  # a greedy text of random weights runs in circles


@pytest.mark.parametrize("seed", range(3))
def test_a_drawn_text_does_not_depend_on_batches_and_drafts(seed: int) -> None:
    how = Decoding(sampling=True, top_k=3, seed=seed, never=(PAD,))
    alone, _ = written(how, batch=1)
    together, _ = written(how)
    drafted, counts = written(how, Drafts())
    assert [one.tokens for one in alone] == [one.tokens for one in together]
    assert [one.tokens for one in alone] == [one.tokens for one in drafted]
    assert counts.drafted


def test_a_text_is_as_long_as_is_said() -> None:
    """It ends with its end, but not before the least; where nothing ends it, it is full."""
    how = Decoding(sampling=True, temperature=3.0, never=(PAD,))
    for length in (Length(200, 0, EOS), Length(200, 60, EOS)):
        for text in written(how, length=length)[0]:
            new = text.tokens[text.given :]
            assert length.least <= len(new) - 1 or len(new) == 200
            assert EOS not in new[:-1]
    assert {text.new for text in written(how, length=Length(30))[0]} == {30}
    assert [text.tokens for text in written(how, length=Length(0))[0]] == PROMPTS


def test_the_past_of_a_text() -> None:
    """Where 1 2 stood before, the latest first."""
    text = [1, 2, 3, 9, 1, 2, 4, 1, 2]
    assert [tokens for _, tokens, _ in past(text)] == [
        [4, 1, 2],
        [3, 9, 1, 2, 4, 1, 2][:LONGEST],
    ]
    assert list(past([1, 2])) == list(past([1])) == list(past([])) == []


def test_what_stands_behind_neighbours(tmp_path: Path) -> None:
    """Of those with the chosen token, the one that shares most of what was before comes first."""
    values = np.array([7, 5, 1, 2, 3, 7, 6, 5, 8, 9])
    store = write_store(tmp_path / "store", np.ones((10, 6), np.float32), values)
    ids = torch.tensor([[1, 7, 4, -1]])
    near = Neighbours(
        ids, torch.tensor([[1.0, 2.0, 3.0, torch.inf]]), torch.tensor([[5, 5, 3, 5]]), ids >= 0
    )
    ways = behind([4, 7, 6, 5], store, near, 0)
    assert [tokens for _, tokens, _ in ways] == [[8, 9], [1, 2, 3, 7, 6, 5, 8, 9][:LONGEST]]
    assert ways[0][2] > ways[1][2]
    assert behind([4, 2], store, near, 0) == []


def test_trust_follows_what_was_right() -> None:
    drafts = Drafts()
    before = drafts.trust["past"].rate
    draft = Draft([1, 2, 3], [{"past": 1.0}, {"past": 1.0}, {"near": 1.0}])
    for _ in range(50):
        drafts.learn(draft, 0)
    assert drafts.trust["past"].rate < before / 2
    assert drafts.trust["near"].tried == Drafts().trust["near"].tried  # nobody knows of the third
    for _ in range(200):
        drafts.learn(draft, 3)
    assert drafts.trust["past"].rate > before


def test_a_decoder_that_cannot_take_tokens_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder()

    class Other(type(model.decoder.layers[0])):  # type: ignore[misc]
        """A layer that may remember anything."""

    model.decoder.layers[0].__class__ = Other
    writer = Writer(TransformerLM(model), MixtureLM, {}, VOCABULARY, PAD)
    monkeypatch.setattr(module, "make_writer", lambda _: writer)
    inputs: Any = type("Inputs", (), {"models": [model]})
    how = module.Generation(3, 0, None, Decoding(), speculate=True)
    with pytest.raises(ConfigError, match="cannot take tokens back"):
        next(module.continued(inputs, [[5]], how, Counts()))
