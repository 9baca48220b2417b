"""fairseq's beam search over families that read a token at a time; texts change places."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from fairseq.sequence_generator import SequenceGenerator
from test_families import made, of
from test_lm import VOCABULARY, WIDTH, dictionary

from fairseq_knnlm.generation.writer import Writer
from fairseq_knnlm.lm.registry import language_model
from fairseq_knnlm.mixture.model import MixtureLM
from fairseq_knnlm.tasks.generation import MixtureEnsemble, MixtureGenerator

WORDS = dictionary()
HOW = {"beam_size": 3, "max_len_a": 0, "max_len_b": 9, "min_len": 4}


def sample() -> tuple[dict[str, Any], torch.Tensor]:
    """Two prompts of three tokens, behind the end of a line."""
    tokens = torch.randint(4, VOCABULARY, (2, 3), generator=torch.manual_seed(8))
    source = torch.nn.functional.pad(tokens, (1, 0), value=WORDS.eos())
    inputs = {"src_tokens": source, "src_lengths": torch.full((2,), 4)}
    return {"net_input": inputs}, tokens


def found(model: Any) -> list[list[dict[str, Any]]]:
    writer = Writer(language_model(model), MixtureLM, {}, len(WORDS), WORDS.pad())
    assert not writer.reads_ahead
    batch, prompts = sample()
    generator = MixtureGenerator(MixtureEnsemble(writer), WORDS, **HOW)
    return generator.generate([], batch, prefix_tokens=prompts, bos_token=WORDS.eos())


@pytest.mark.parametrize(
    "kind", ["lightconv", "lightconv-light", "fconv", "fconv-adaptive", "lstm", "lstm-deep"]
)
def test_the_search_finds_what_the_stock_one_finds(kind: str) -> None:
    model = of(kind)
    batch, prompts = sample()
    stock = SequenceGenerator([model], WORDS, **HOW)
    expected = stock.generate([model], batch, prefix_tokens=prompts, bos_token=WORDS.eos())
    for theirs, ours in zip(expected, found(model), strict=True):
        assert [one["tokens"].tolist() for one in ours] == [
            one["tokens"].tolist() for one in theirs
        ]
        for one, other in zip(ours, theirs, strict=True):
            scores = one["positional_scores"], other["positional_scores"]
            torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs transformers")
def test_a_wrapped_gpt2_follows_its_beams() -> None:
    """Each token has the probability that transformers gives it in one pass over its text."""
    settings = {"embed_dim": WIDTH, "num_attention_heads": 2, "num_layers": 2}
    model = made("hf_gpt2", {**settings, "dropout": 0.1, "max_target_positions": 32})
    with torch.no_grad():
        model.decoder.model.transformer.wte.weight.mul_(20)  # else all tokens are as likely
    for hypotheses in found(model):
        assert len({tuple(one["tokens"].tolist()) for one in hypotheses}) == HOW["beam_size"]
        for one in hypotheses:
            tokens = one["tokens"]
            text = torch.cat([torch.tensor([WORDS.eos()]), tokens[:-1]])[None]
            places = torch.arange(1, text.shape[1] + 1)[None]
            with torch.no_grad():
                logits = model.decoder.model(input_ids=text, position_ids=places).logits[0]
            expected = logits.log_softmax(dim=1).gather(1, tokens[:, None]).squeeze(1)
            torch.testing.assert_close(one["positional_scores"], expected, rtol=1e-4, atol=1e-4)
