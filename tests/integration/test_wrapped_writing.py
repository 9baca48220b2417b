"""Wrapped models as they write: texts at their own pace, greedy and by beams, as transformers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import CONFIGS, as_symbols, opened, save_model
from torch import Tensor

from fairseq_knnlm.generation.choosing import Decoding
from fairseq_knnlm.generation.drafts import Drafts
from fairseq_knnlm.generation.loop import Length, go_on
from fairseq_knnlm.generation.writer import Writer
from fairseq_knnlm.lm.registry import language_model
from fairseq_knnlm.mixture.model import MixtureLM
from fairseq_knnlm.runs.wrapping import wrap
from fairseq_knnlm.tasks.generation import MixtureEnsemble, MixtureGenerator

#: Ids of the models: what begins a text, what ends a line, words, and one that never comes.
BEGIN, END, WORDS, NEVER = 1, 2, range(3, 23), 95
#: New tokens that each text may have.
NEW = 24
PROMPTS = [[5, 6, 7, 8, 5], [9], [11, 12, 11, 12, 11, 3, 4, 5]]


def lines(count: int) -> list[int]:
    """Lines of 2 to 6 words, in which the next word follows from the last one, mostly."""
    rng, text = random.Random(3), [END]
    for _ in range(count):
        line = [rng.choice(WORDS)]
        while len(line) < rng.randint(2, 6):
            line.append(WORDS[(3 * line[-1] + 1) % 20] if rng.random() < 0.8 else rng.choice(WORDS))
        text += [*line, END]
    return text


def train(model: Any, steps: int = 60, wide: int = 32) -> None:
    """So that it has learned where lines end."""
    text = torch.tensor(lines(2000))
    blocks = text[: len(text) // wide * wide].view(-1, wide)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(steps):
        batch = blocks[step * 8 % len(blocks) :][:8]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def trained(request: Any, tmp_path_factory: Any) -> tuple[Any, Any, Any]:
    """transformers' model, ours, and its dictionary."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    theirs = save_model(folder / "hf", request.param, trained=True)
    train(theirs.train())
    theirs.eval().save_pretrained(folder / "hf")
    wrap(folder / "hf", folder / "out", None, None)
    return theirs, *opened(folder / "out")


def generated(theirs: Any, prompt: list[int], end: int, **how: Any) -> list[int]:
    """What transformers writes behind a prompt, up to an id."""
    text = torch.tensor([prompt])
    how |= {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
    found = theirs.generate(input_ids=text, attention_mask=torch.ones_like(text), **how)[0]
    return [int(one) for one in found[text.shape[1] :]]


def writer(model: Any, dictionary: Any, key_type: str | None = None) -> Writer:
    return Writer(language_model(model, key_type), MixtureLM, {}, len(dictionary), dictionary.pad())


def ids_of(dictionary: Any, tokens: list[int]) -> list[int]:
    symbols = ("2" if token == dictionary.eos() else dictionary[token] for token in tokens)
    return [int(symbol) for symbol in symbols]


@pytest.mark.parametrize("begin", [END, BEGIN])
@pytest.mark.parametrize("drafts", [False, True])
def test_greedy_text_is_that_of_transformers(trained: Any, drafts: bool, begin: int) -> None:
    """Prompts of unequal lengths at once; drafts change nothing."""
    theirs, model, dictionary = trained
    prompts = [as_symbols(dictionary, torch.tensor([one]))[0].tolist() for one in PROMPTS]
    texts = go_on(
        writer(model, dictionary),
        prompts,
        dictionary.eos() if begin == END else dictionary.bos(),
        [Length(NEW)] * len(prompts),
        Decoding(never=(dictionary.pad(),)),
        speculation=Drafts() if drafts else None,
    )
    for text, prompt in zip(texts, PROMPTS, strict=True):
        new = ids_of(dictionary, text.tokens[len(prompt) :])
        assert END in new
        assert new == generated(theirs, [begin, *prompt], NEVER)


def test_beams_are_those_of_transformers(trained: Any) -> None:
    """The best one, where all end: texts that do not, each library goes about in its own way."""
    theirs, model, dictionary = trained
    generator = MixtureGenerator(
        MixtureEnsemble(writer(model, dictionary)),
        dictionary,
        beam_size=3,
        max_len_a=0,
        max_len_b=NEW + 8,
        normalize_scores=False,
    )
    how = {"num_beams": 3, "length_penalty": 0.0, "early_stopping": True}
    for prompt in PROMPTS:
        given = as_symbols(dictionary, torch.tensor([prompt]))
        source = torch.nn.functional.pad(given, (1, 0), value=dictionary.eos())
        inputs = {"src_tokens": source, "src_lengths": torch.tensor([source.shape[1]])}
        ((best, *others),) = generator.generate(
            [], {"net_input": inputs}, prefix_tokens=given, bos_token=dictionary.eos()
        )
        assert all(len(one["tokens"]) < len(prompt) + NEW for one in (best, *others))
        new = ids_of(dictionary, best["tokens"].tolist()[len(prompt) :])
        assert new == generated(theirs, [END, *prompt], END, **how)


class Whole:
    """The same texts, read from their beginnings by transformers itself."""

    def __init__(self, theirs: Any, dictionary: Any, texts: int) -> None:
        self.theirs = theirs
        self.dictionary = dictionary
        self.texts: list[list[int]] = [[] for _ in range(texts)]

    @torch.no_grad()
    def last(self, text: int, count: int) -> Tensor:
        """(count, ids) log p of what follows each of the last tokens of a text."""
        logits = self.theirs(input_ids=torch.tensor([self.texts[text]])).logits[0, -count:]
        return logits.log_softmax(dim=1)


def test_texts_that_go_on_as_they_please(trained: Any) -> None:
    """Prompts of unequal lengths, drafts taken back, some texts ended and others told twice."""
    theirs, model, dictionary = trained
    lm, whole = language_model(model, "last_ffn_input"), Whole(theirs, dictionary, 3)
    reading, rng = lm.reading(3, dictionary.pad()), random.Random(5)
    columns = as_symbols(dictionary, torch.tensor([list(WORDS)]))[0]

    def read(*counts: int) -> None:
        more = [rng.choices(WORDS, k=count) for count in counts]
        tokens = torch.full((len(more), max(counts)), -1)
        for row, ids in enumerate(more):
            whole.texts[row] += ids
            tokens[row, : len(ids)] = as_symbols(dictionary, torch.tensor([ids]))[0]
        found = reading.read(tokens)
        told = lm.log_probs(found.features)[:, columns]
        expected = torch.cat([whole.last(row, count) for row, count in enumerate(counts)])
        torch.testing.assert_close(told, expected[:, list(WORDS)], rtol=1e-4, atol=1e-4)
        assert found.keys is not None
        assert len(found.keys) == len(told)

    read(5, 1, 3)
    read(1, 1, 1)
    for _ in range(4):
        read(2, 4, 1)
        back = [1, 3, 0]
        reading.forget(torch.tensor(back))
        whole.texts = [text[: len(text) - n] for text, n in zip(whole.texts, back, strict=True)]
    assert reading.lengths.tolist() == list(map(len, whole.texts))
    reading.keep(torch.tensor([2, 0, 2]))
    whole.texts = [list(whole.texts[text]) for text in (2, 0, 2)]
    read(2, 1, 3)
    reading.keep(torch.tensor([1]))
    whole.texts = [whole.texts[1]]
    read(6)
    reading.forget(torch.tensor([6]))
    whole.texts[0] = whole.texts[0][:-6]
    read(1)
