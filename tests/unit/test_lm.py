"""What is read from a language model, against fairseq's own full distributions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig
from fairseq.modules import AdaptiveSoftmax
from torch import Tensor, nn

from fairseq_knnlm.errors import ModelError
from fairseq_knnlm.experts.lm import ShapeExpert
from fairseq_knnlm.lm import softmax, transformer
from fairseq_knnlm.lm.contexts import CONTEXT, Contexts, Encoded
from fairseq_knnlm.lm.fingerprints import dictionary_fingerprint, model_fingerprint
from fairseq_knnlm.lm.keys import KEY_TYPES
from fairseq_knnlm.lm.registry import check_model, is_supported
from fairseq_knnlm.lm.transformer import TransformerLM

WIDTH, VOCABULARY = 16, 64
CUTOFFS = [[20], [20, 40], [5, 6, 63], [64]]


def head_only(output: nn.Module) -> TransformerLM:
    """A language model that is nothing but its output layer."""
    model = nn.Module()
    adaptive = output if isinstance(output, AdaptiveSoftmax) else None
    model.decoder = nn.Module()
    model.decoder.adaptive_softmax = adaptive
    model.decoder.output_layer = output
    return TransformerLM(model)


def features(rows: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, WIDTH, generator=torch.manual_seed(seed))


@pytest.fixture(params=[1, 64 * 7, 2**25])
def _chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row at a time, a few rows at a time, or all at once."""
    monkeypatch.setattr(softmax, "LOGITS_AT_A_TIME", request.param)


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("rows", [0, 1, 255, 256, 257, 600])
def test_plain_softmax(rows: int) -> None:
    """Equal to torch's log_softmax over the vocabulary, at the target."""
    layer = nn.Linear(WIDTH, VOCABULARY)
    x, y = features(rows), torch.randint(VOCABULARY, (rows,))
    with torch.no_grad():
        expected = torch.log_softmax(layer(x), dim=1).gather(1, y[:, None]).squeeze(1)
    found = head_only(layer).log_prob(x, y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("rows", [1, 257, 600])
@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_adaptive_softmax(cutoff: list[int], rows: int) -> None:
    """Equal to fairseq's full distribution at the target, and each of them sums to one."""
    adaptive = AdaptiveSoftmax(VOCABULARY, WIDTH, list(cutoff), dropout=0.3, factor=2.0).eval()
    x, y = features(rows), torch.randint(VOCABULARY, (rows,))
    with torch.no_grad():
        full = adaptive.get_log_prob(x[None], None)[0]
    torch.testing.assert_close(full.exp().sum(dim=1), torch.ones(rows))
    found = head_only(adaptive).log_prob(x, y)
    torch.testing.assert_close(found, full.gather(1, y[:, None]).squeeze(1))


@pytest.mark.parametrize("cutoff", CUTOFFS)
@pytest.mark.parametrize("token", [0, 4, 5, 6, 19, 20, 39, 40, 62, 63])
def test_clusters_without_any_target(cutoff: list[int], token: int) -> None:
    """All targets are one token, also at the edges of clusters."""
    adaptive = AdaptiveSoftmax(VOCABULARY, WIDTH, list(cutoff), dropout=0.0, factor=2.0).eval()
    x, y = features(9), torch.full((9,), token)
    with torch.no_grad():
        expected = adaptive.get_log_prob(x[None], None)[0, :, token]
    torch.testing.assert_close(head_only(adaptive).log_prob(x, y), expected)


def shape(lm: TransformerLM, x: Tensor) -> tuple[Tensor, Tensor]:
    before = torch.full((len(x), CONTEXT), -1)
    found = ShapeExpert(lm).predict(Contexts(x, None, before, torch.arange(len(x)))).features
    return found["lm_entropy"], found["lm_top"]


def test_a_batch_of_nothing() -> None:
    adaptive = AdaptiveSoftmax(VOCABULARY, WIDTH, [20, 40], dropout=0.0, factor=2.0)
    nothing = torch.zeros(0, dtype=torch.long)
    assert head_only(adaptive).log_prob(features(0), nothing).shape == (0,)


def test_large_logits_do_not_overflow() -> None:
    layer = nn.Linear(WIDTH, VOCABULARY)
    x, y = 1e4 * features(20), torch.arange(20)
    with torch.no_grad():
        expected = torch.log_softmax(layer(x).double(), dim=1)[y, y]
    found = head_only(layer).log_prob(x, y)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("rows", [1, 256, 600])
@pytest.mark.parametrize("kind", ["plain", "adaptive"])
def test_the_shape_is_that_of_the_full_softmax(kind: str, rows: int) -> None:
    """Entropy and the largest log-probability, in float64."""
    adaptive = AdaptiveSoftmax(VOCABULARY, WIDTH, [20, 40], dropout=0.3, factor=2.0).eval()
    layer = nn.Linear(WIDTH, VOCABULARY) if kind == "plain" else adaptive
    x = features(rows)
    with torch.no_grad():
        if kind == "plain":
            full = layer(x).double().log_softmax(dim=1)
        else:
            full = adaptive.get_log_prob(x[None], None)[0].double()
    entropy, top = shape(head_only(layer), x)
    assert entropy.dtype == top.dtype == torch.float32
    assert entropy.shape == top.shape == (rows,)
    expected = -(full.exp() * full).sum(dim=1)
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(top.double(), full.max(dim=1).values, rtol=1e-5, atol=1e-5)


def test_a_certain_model_has_no_entropy() -> None:
    """p log p of p = 0 is 0."""
    layer = nn.Linear(WIDTH, VOCABULARY)
    x = 1e4 * features(20)
    entropy, top = shape(head_only(layer), x)
    torch.testing.assert_close(entropy, torch.zeros(20))
    torch.testing.assert_close(top, torch.zeros(20))


# A whole decoder


def dictionary() -> Dictionary:
    words = Dictionary()
    for number in range(VOCABULARY - len(words)):
        words.add_symbol(f"w{number}")
    return words


#: Small enough to be made in no time, whatever the architecture's own sizes.
SMALL = {
    "decoder_embed_dim": WIDTH,
    "decoder_input_dim": WIDTH,
    "decoder_output_dim": WIDTH,
    "decoder_ffn_embed_dim": 24,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "max_target_positions": 32,
    "tokens_per_sample": 32,
}


def decoder(**how: Any) -> TransformerLanguageModel:
    """A tiny Transformer LM with random weights."""
    torch.manual_seed(6)
    config = TransformerLanguageModelConfig(**{**SMALL, **how})
    words = dictionary()
    task = SimpleNamespace(source_dictionary=words, target_dictionary=words)
    model = TransformerLanguageModel.build_model(config, task)
    for name, weight in model.named_parameters():
        if "norm" in name:  # all ones and zeros would hide a norm too many
            nn.init.normal_(weight, 1.0, 0.3)
    return model.eval()


ADAPTIVE = {"adaptive_softmax_cutoff": "20,40"}
DECODERS = {
    "post": {},
    "pre": {"decoder_normalize_before": True},
    "adaptive": ADAPTIVE,
    "adaptive-pre": {**ADAPTIVE, "decoder_normalize_before": True},
}
PAD = dictionary().pad()


def batch() -> dict[str, Any]:
    """Three sentences; targets that are not scored are pad: a context, and what follows."""
    tokens = torch.randint(4, VOCABULARY, (3, 11), generator=torch.manual_seed(2))
    source, target = tokens[:, :-1], tokens[:, 1:].clone()
    target[0, :4] = PAD
    target[1, 7:] = PAD
    return {
        "id": torch.arange(3),
        "net_input": {"src_tokens": source, "src_lengths": torch.full((3,), 10)},
        "target": target,
    }


@pytest.mark.parametrize("kind", list(DECODERS))
def test_a_batch_is_scored_as_fairseq_scores_it(kind: str) -> None:
    model, sample = decoder(**DECODERS[kind]), batch()
    target = sample["target"]
    reader = TransformerLM(model, "last_ffn_input")
    found = reader.encode(sample["net_input"], sample["target"].ne(PAD))
    with torch.no_grad():
        out = model(**sample["net_input"])
        full = model.get_normalized_probs(out, log_probs=True, sample=None)
    mask = target.ne(PAD)
    assert torch.equal(found.mask, mask)
    expected = full.gather(2, target[..., None]).squeeze(2)[mask]
    torch.testing.assert_close(
        reader.log_prob(found.features, target[mask]), expected, rtol=1e-5, atol=1e-5
    )


def encode(model: nn.Module, sample: dict[str, Any], key_type: str | None = None) -> Encoded:
    return TransformerLM(model, key_type).encode(sample["net_input"], sample["target"].ne(PAD))


def keys(model: TransformerLanguageModel, key_type: str) -> Tensor:
    found = encode(model, batch(), key_type)
    assert found.keys is not None
    assert found.keys.shape == (len(found.features), WIDTH)
    return found.keys


@torch.no_grad()
def feed_forward(model: TransformerLanguageModel, x: Tensor) -> Tensor:
    last = model.decoder.layers[-1]
    return last.fc2(torch.relu(last.fc1(x)))


@torch.no_grad()
def test_keys_of_a_post_norm_decoder() -> None:
    """The last layer's arithmetic, done by hand, leads from one key to the next."""
    model = decoder()
    last = model.decoder.layers[-1]
    ffn = keys(model, "last_ffn_input")
    torch.testing.assert_close(
        last.self_attn_layer_norm(keys(model, "last_ffn_input_before_norm")), ffn
    )
    before = ffn + feed_forward(model, ffn)
    torch.testing.assert_close(keys(model, "decoder_output_before_norm"), before)
    output = keys(model, "decoder_output")
    torch.testing.assert_close(last.final_layer_norm(before), output)
    torch.testing.assert_close(encode(model, batch()).features, output)
    below = model.decoder.layers[-2].final_layer_norm
    torch.testing.assert_close(
        below(keys(model, "last_attn_input_before_norm")), keys(model, "last_attn_input")
    )


@torch.no_grad()
def test_keys_of_a_pre_norm_decoder() -> None:
    model = decoder(decoder_normalize_before=True)
    last = model.decoder.layers[-1]
    stream, ffn = keys(model, "last_ffn_input_before_norm"), keys(model, "last_ffn_input")
    torch.testing.assert_close(last.final_layer_norm(stream), ffn)
    before = stream + feed_forward(model, ffn)
    torch.testing.assert_close(keys(model, "decoder_output_before_norm"), before)
    output = keys(model, "decoder_output")
    torch.testing.assert_close(model.decoder.layer_norm(before), output)
    torch.testing.assert_close(encode(model, batch()).features, output)
    torch.testing.assert_close(
        last.self_attn_layer_norm(keys(model, "last_attn_input_before_norm")),
        keys(model, "last_attn_input"),
    )


def test_a_key_belongs_to_its_position() -> None:
    """Changing what follows a position leaves its key alone; changing the position does not."""
    model, sample = decoder(), batch()
    reader = TransformerLM(model, "last_ffn_input")
    before = reader.encode(sample["net_input"], sample["target"].ne(PAD)).keys
    sample["net_input"]["src_tokens"] = sample["net_input"]["src_tokens"].clone()
    sample["net_input"]["src_tokens"][2, 6] = 4
    after = reader.encode(sample["net_input"], sample["target"].ne(PAD)).keys
    assert before is not None
    assert after is not None
    rows = len(before) - 10 + 6  # the third sentence is scored whole
    torch.testing.assert_close(after[:rows], before[:rows])
    assert (after[rows:] - before[rows:]).abs().amax(dim=1).min() > 1e-4


def batch_with_context() -> dict[str, Any]:
    """Four positions of context and more, and a sentence that ends early."""
    sample = batch()
    sample["target"][:, :4] = PAD
    sample["net_input"]["src_tokens"][1, 7:] = PAD
    return sample


@pytest.mark.parametrize("key_type", list(KEY_TYPES))
@pytest.mark.parametrize("kind", list(DECODERS))
def test_the_last_layer_without_the_context_gives_the_same(
    kind: str, key_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sample = decoder(**DECODERS[kind]), batch_with_context()
    worked_on = []
    model.decoder.layers[-1].fc1.register_forward_pre_hook(
        lambda _, args: worked_on.append(len(args[0]))
    )
    reader = TransformerLM(model, key_type)
    found = reader.encode(sample["net_input"], sample["target"].ne(PAD))
    monkeypatch.setattr(transformer, "PLAIN_LAYERS", set())
    expected = reader.encode(sample["net_input"], sample["target"].ne(PAD))
    assert worked_on == [6, 10]
    assert found.mask.shape == (3, 6)
    assert torch.equal(found.mask, expected.mask[:, 4:])
    torch.testing.assert_close(found.features, expected.features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.keys, expected.keys, rtol=1e-5, atol=1e-5)


def plain_context(sample: dict[str, Any]) -> list[list[int]]:
    """For every scored position the inputs up to it, going back."""
    inputs, found = sample["net_input"]["src_tokens"].tolist(), []
    for row, column in sample["target"].ne(PAD).nonzero().tolist():
        before = inputs[row][: column + 1][::-1][:CONTEXT]
        found.append(before + [-1] * (CONTEXT - len(before)))
    return found


@pytest.mark.parametrize("make", [batch, batch_with_context], ids=["none", "window"])
@pytest.mark.parametrize("kind", ["post", "adaptive-pre"])
def test_the_context_is_what_the_model_saw_before(
    kind: str, make: Callable[[], dict[str, Any]]
) -> None:
    """Of blocks that begin with the first scored token, and of those with a window before it."""
    sample = make()
    found = encode(decoder(**DECODERS[kind]), sample)
    assert found.before.shape == (len(found.features), CONTEXT)
    assert found.before.dtype == torch.int64
    assert found.before.tolist() == plain_context(sample)
    unknown = bool((found.before < 0).any())
    assert unknown is (make is batch)


def test_reading_leaves_no_hook_behind() -> None:
    model = decoder()
    for key_type in KEY_TYPES:
        keys(model, key_type)
    sample = batch_with_context()
    sample["net_input"]["src_tokens"] = torch.full((3, 10), 10**6)  # not in the embedding
    with pytest.raises(IndexError):
        encode(model, sample, "last_ffn_input")
    for part in model.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks


def test_models_and_key_types_that_do_not_fit() -> None:
    assert check_model(decoder(), "last_ffn_input") == WIDTH
    assert is_supported(decoder())
    assert not is_supported(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="keys cannot be read"):
        check_model(nn.Linear(2, 2), "last_ffn_input")
    with pytest.raises(ModelError, match="no layer"):
        check_model(decoder(decoder_layers=1), "last_attn_input_before_norm")
    no_final = decoder(decoder_normalize_before=True, no_decoder_final_norm=True)
    with pytest.raises(ModelError, match="no final norm"):
        check_model(no_final, "decoder_output")


# Fingerprints


def test_the_fingerprint_is_that_of_the_weights() -> None:
    assert model_fingerprint(decoder()) == model_fingerprint(decoder())
    assert len(model_fingerprint(decoder())) == 64


def test_half_precision_and_evaluation_change_no_fingerprint() -> None:
    model = decoder(**ADAPTIVE)
    before = model_fingerprint(model)
    assert model_fingerprint(copy.deepcopy(model).train()) == before
    assert model_fingerprint(copy.deepcopy(model).half()) == before
    encode(model, batch(), "last_ffn_input")
    assert model_fingerprint(model) == before


def test_any_weight_changes_the_fingerprint() -> None:
    model = decoder(**ADAPTIVE)
    seen = {model_fingerprint(model)}
    for weight in model.parameters():
        with torch.no_grad():
            weight.view(-1)[-1] += 0.1
        seen.add(model_fingerprint(model))
    assert len(seen) == 1 + len(list(model.parameters()))


def test_names_and_shapes_count_in_the_fingerprint() -> None:
    """The same numbers in other places are another model."""
    values = torch.arange(6.0)

    def model(**shapes: tuple[int, ...]) -> nn.Module:
        found, start = nn.Module(), 0
        for name, shape in shapes.items():
            size = torch.Size(shape).numel()
            found.register_parameter(name, nn.Parameter(values[start : start + size].view(shape)))
            start += size
        return found

    models = [model(a=(2, 3)), model(a=(3, 2)), model(a=(6,)), model(b=(6,)), model(a=(3,), b=(3,))]
    assert len({model_fingerprint(one) for one in models}) == len(models)


def test_the_dictionarys_fingerprint() -> None:
    assert dictionary_fingerprint(["a", "b"]) == dictionary_fingerprint(["a", "b"])
    others = (["a", "b"], ["b", "a"], ["a"], ["ab"], ["a", "b", "c"])
    assert len({dictionary_fingerprint(words) for words in others}) == len(others)
