"""fairseq's own language models, each with random weights, against what fairseq makes of them.

Losses are held against the stock scorer, keys against hooks set here, and reading by steps against
the stock forward pass over the whole text.
"""

from __future__ import annotations

import importlib.util
from argparse import SUPPRESS, ArgumentParser, Namespace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.sequence_scorer import SequenceScorer
from test_lm import PAD, VOCABULARY, WIDTH, batch, batch_with_context, dictionary
from test_lm import SMALL as DECODER
from torch import Tensor, nn

from fairseq_knnlm.errors import ModelError
from fairseq_knnlm.lm.registry import check_model, family_of, is_supported, language_model
from fairseq_knnlm.runs.scorer import KnnScorer

#: The same for every family.
SMALL = {**DECODER, "criterion": "cross_entropy", "adaptive_softmax_cutoff": None}
ADAPTIVE = {"criterion": "adaptive_loss", "adaptive_softmax_cutoff": "20,40"}
TIED = {"adaptive_input_cutoff": "20,40", **ADAPTIVE}
LIGHT = {**SMALL, "decoder_kernel_size_list": [3, 4], "decoder_conv_dim": WIDTH}
LIGHT |= {"dropout": 0.0, "attention_dropout": 0.0, "relu_dropout": 0.0, "input_dropout": 0.0}
LIGHT |= {"adaptive_softmax_dropout": 0.0, "decoder_glu": True, "decoder_conv_type": "dynamic"}
LIGHT |= {"weight_softmax": True, "weight_dropout": 0.0, "decoder_learned_pos": False}
CONV = {**SMALL, "decoder_layers": "[(16, 3)] + [(24, 2)]"}
RECURRENT = {**SMALL, "decoder_out_embed_dim": WIDTH}
#: By a name: the architecture and its settings.
OUTPUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lightconv": ("lightconv_lm", LIGHT),
    "lightconv-light": ("lightconv_lm", {**LIGHT, "decoder_conv_type": "lightweight"}),
    "lightconv-tied": ("lightconv_lm", {**LIGHT, "share_decoder_input_output_embed": True}),
    "lightconv-norm": ("lightconv_lm", {**LIGHT, "decoder_normalize_before": True}),
    "lightconv-narrow": ("lightconv_lm", {**LIGHT, "decoder_output_dim": 12}),
    "lightconv-adaptive": ("lightconv_lm", {**LIGHT, **ADAPTIVE}),
    "fconv": ("fconv_lm", CONV),
    "fconv-adaptive": ("fconv_lm", {**CONV, **ADAPTIVE}),
    "lstm": ("lstm_lm", RECURRENT),
    "lstm-deep": ("lstm_lm", {**RECURRENT, "decoder_layers": 3, "decoder_hidden_size": 12}),
    "lstm-tied": ("lstm_lm", {**RECURRENT, "share_decoder_input_output_embed": True}),
    "lstm-adaptive": ("lstm_lm", {**RECURRENT, **ADAPTIVE}),
    "lstm-narrow": ("lstm_lm", {**RECURRENT, **ADAPTIVE, "decoder_hidden_size": 12}),
}
#: But for those of Megatron, which fairseq has no code of without a submodule.
TRANSFORMERS = sorted(
    name
    for name in ARCH_MODEL_REGISTRY
    if name.startswith("transformer_lm") and "megatron" not in name
)


def made(arch: str, settings: dict[str, Any]) -> Any:
    """A model of an architecture, as fairseq makes it of a Namespace, with random weights."""
    torch.manual_seed(3)
    parser = ArgumentParser(argument_default=SUPPRESS)  # as fairseq reads flags
    ARCH_MODEL_REGISTRY[arch].add_args(parser)
    args = parser.parse_args([], Namespace(arch=arch, **settings))
    ARCH_CONFIG_REGISTRY[arch](args)
    words = dictionary()
    names = ("dictionary", "source_dictionary", "target_dictionary", "output_dictionary")
    task = SimpleNamespace(**dict.fromkeys(names, words))
    model = ARCH_MODEL_REGISTRY[arch].build_model(args, task)
    for name, weight in model.named_parameters():
        if "norm" in name:  # all ones and zeros would hide a norm too many
            nn.init.normal_(weight, 1.0, 0.3)
    return model.eval()


def transformer(arch: str) -> Any:
    """A small one of an architecture; what else the name stands for is kept."""
    args = Namespace()
    ARCH_CONFIG_REGISTRY[arch](args)
    adaptive = getattr(args, "adaptive_softmax_cutoff", None) is not None
    from fairseq.models.transformer_lm import TransformerLanguageModelConfig

    config = TransformerLanguageModelConfig()
    small = {**SMALL, **(TIED if adaptive else {})}
    for name, value in {**vars(args), **small}.items():
        if name != "criterion":
            setattr(config, name, value)
    torch.manual_seed(3)
    words = dictionary()
    task = SimpleNamespace(source_dictionary=words, target_dictionary=words)
    return ARCH_MODEL_REGISTRY[arch].build_model(config, task).eval()


def of(kind: str) -> Any:
    return made(*OUTPUTS[kind])


def stock(model: nn.Module, sample: dict[str, Any]) -> list[Tensor]:
    """What fairseq's own scorer says of each target of a batch, sentence by sentence."""
    found = SequenceScorer(dictionary()).generate([model], sample)
    return [hypothesis["positional_scores"] for ((hypothesis),) in found]


@pytest.mark.parametrize("kind", list(OUTPUTS))
def test_a_batch_is_scored_as_the_stock_scorer_scores_it(kind: str) -> None:
    sample = batch()
    sample["target"] = sample["net_input"]["src_tokens"].roll(-1, dims=1)
    model = of(kind)
    expected = stock(model, sample)
    found = KnnScorer(PAD, dictionary().eos()).generate([model], sample)
    for theirs, (ours,) in zip(expected, found, strict=True):
        torch.testing.assert_close(ours["positional_scores"], theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", list(OUTPUTS))
def test_log_probs_are_the_models_own(kind: str) -> None:
    """Of the whole vocabulary, at the positions that are asked for; each of them sums to one."""
    model, sample = of(kind), batch_with_context()
    mask = sample["target"].ne(PAD)
    reader = language_model(model)
    found = reader.encode(sample["net_input"], mask)
    with torch.no_grad():
        out = model(**sample["net_input"])
        full = model.get_normalized_probs(out, log_probs=True, sample=None)[mask]
    ours = reader.log_probs(found.features)
    torch.testing.assert_close(ours, full, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.exp().sum(dim=1), torch.ones(len(ours)))
    some = sample["target"][mask]
    expected = full.gather(1, some[:, None]).squeeze(1)
    torch.testing.assert_close(
        reader.log_prob(found.features, some), expected, rtol=1e-5, atol=1e-5
    )
    assert found.mask.shape == (3, 6)
    assert found.keys is None


def last_layer(kind: str, model: Any) -> nn.Module | None:
    """What takes in the decoder's output."""
    decoder = model.decoder
    if decoder.adaptive_softmax is not None:
        return None
    return {
        "lightconv": getattr(decoder, "output_projection", None),
        "fconv": getattr(decoder, "fc3", None),
        "lstm": getattr(decoder, "fc_out", None),
    }[kind.partition("-")[0]]


@pytest.mark.parametrize("kind", list(OUTPUTS))
def test_keys_are_what_the_last_layer_takes_in(kind: str) -> None:
    """As a hook on it sees in a stock forward pass."""
    model, sample = of(kind), batch_with_context()
    mask = sample["target"].ne(PAD)
    found = language_model(model, "decoder_output").encode(sample["net_input"], mask).keys
    assert found is not None
    assert found.shape[1] == check_model(model, "decoder_output") == check_model(model, None)
    layer = last_layer(kind, model)
    seen: list[Tensor] = []
    if layer is not None:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        out = model(**sample["net_input"])[0]
    if layer is not None:
        torch.testing.assert_close(found, seen[0][mask])
    elif kind == "lstm-tied":  # its last layer is a function of the embeddings
        expected = out[mask]
        torch.testing.assert_close(found @ model.decoder.embed_tokens.weight.T, expected)
    else:  # where the softmax is adaptive, the decoder returns its output as it is
        torch.testing.assert_close(found, out[mask])


@pytest.mark.parametrize("kind", list(OUTPUTS))
def test_reading_by_steps_is_reading_the_whole(kind: str) -> None:
    """Two texts that change places and go on from the same beginning, as in a beam.

    The whole is read with more behind it: of a text shorter than its kernel, fairseq's dynamic
    convolution normalises fewer weights, and would say something else of the same beginning.
    """
    model = of(kind)
    reader = language_model(model, "decoder_output")
    random = torch.manual_seed(4)
    tokens = torch.randint(4, VOCABULARY, (2, 1), generator=random)
    state: dict[str, Any] = {}
    for step in range(9):
        found = reader.step(tokens, state)
        longer = nn.functional.pad(tokens, (0, 4), value=5)
        inputs = {"src_tokens": longer, "src_lengths": torch.full((2,), step + 5)}
        with torch.no_grad():
            full = model.get_normalized_probs(model(**inputs), log_probs=True, sample=None)
        ours = reader.log_probs(found.features)
        torch.testing.assert_close(ours, full[:, step], rtol=1e-4, atol=1e-5)
        mask = torch.arange(step + 5).expand_as(longer) == step
        expected = reader.encode(inputs, mask).keys
        torch.testing.assert_close(found.keys, expected, rtol=1e-4, atol=1e-5)
        order = torch.tensor([[0, 1], [1, 0], [1, 1], [0, 0]][step % 4])
        reader.reorder(state, order)
        more = torch.randint(4, VOCABULARY, (2, 1), generator=random)
        tokens = torch.cat([tokens[order], more], dim=1)


@pytest.mark.parametrize("kind", list(OUTPUTS))
def test_nothing_is_known_of_what_comes_after(kind: str) -> None:
    model, sample = of(kind), batch()
    reader, mask = language_model(model, "decoder_output"), sample["target"].ne(PAD)
    before = reader.encode(sample["net_input"], mask)
    tokens = sample["net_input"]["src_tokens"].clone()
    tokens[2, 6:] = 4 + (tokens[2, 6:] + 1) % (VOCABULARY - 4)
    after = reader.encode({**sample["net_input"], "src_tokens": tokens}, mask)
    rows = len(before.features) - 10 + 6  # the third sentence is scored whole
    torch.testing.assert_close(after.features[:rows], before.features[:rows])
    assert (after.features[rows:] - before.features[rows:]).abs().amax(dim=1).min() > 1e-6


@pytest.mark.parametrize("kind", ["lightconv", "fconv", "lstm"])
def test_reading_leaves_no_hook_behind(kind: str) -> None:
    model, sample = of(kind), batch()
    hooks = sum(len(part._forward_pre_hooks) for part in model.modules())
    reader = language_model(model, "decoder_output")
    reader.encode(sample["net_input"], sample["target"].ne(PAD))
    sample["net_input"]["src_tokens"] = torch.full((3, 10), 10**6)  # not in the embedding
    with pytest.raises(IndexError):
        reader.encode(sample["net_input"], sample["target"].ne(PAD))
    assert sum(len(part._forward_pre_hooks) for part in model.modules()) == hooks


@pytest.mark.parametrize("kind", ["lightconv", "fconv", "lstm"])
@pytest.mark.parametrize("key_type", ["last_ffn_input", "decoder_output_before_norm"])
def test_keys_of_a_transformer_are_refused(kind: str, key_type: str) -> None:
    with pytest.raises(ModelError, match="--knn-keytype decoder_output") as told:
        check_model(of(kind), key_type)
    assert f"{kind}_lm has no layer for --knn-keytype {key_type}" in str(told.value)


def test_others_are_no_family() -> None:
    assert not is_supported(nn.Linear(2, 2))
    attending = of("lstm")
    attending.decoder.attention = nn.Linear(2, 2)
    assert not is_supported(attending)
    with pytest.raises(ModelError, match=r"transformer_lm.*lstm_lm"):
        check_model(attending, None)


@pytest.mark.parametrize("arch", TRANSFORMERS)
def test_every_architecture_of_transformers(arch: str) -> None:
    """With all that its name stands for but its size: norms, activation, positions, softmax."""
    model, sample = transformer(arch), batch()
    sample["target"] = sample["net_input"]["src_tokens"].roll(-1, dims=1)
    assert family_of(model).name == "transformer_lm"
    expected = stock(model, sample)
    seen: list[Tensor] = []
    handle = model.decoder.layers[-1].fc1.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].transpose(0, 1).flatten(0, 1))
    )
    stock(model, sample)
    handle.remove()
    scorer = KnnScorer(PAD, dictionary().eos(), key_type="last_ffn_input")
    found = scorer.generate([model], sample)
    for theirs, (ours,) in zip(expected, found, strict=True):
        torch.testing.assert_close(ours["positional_scores"], theirs, rtol=1e-5, atol=1e-5)
    mask = sample["target"].ne(PAD)
    keys = language_model(model, "last_ffn_input").encode(sample["net_input"], mask).keys
    torch.testing.assert_close(keys, seen[0], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs transformers")
@pytest.mark.parametrize("key_type", ["last_ffn_input", "last_attn_input", "decoder_output"])
def test_the_wrapped_gpt2(key_type: str) -> None:
    """Against the GPT-2 of transformers itself: fairseq's wrapper no longer runs it."""
    settings = {"embed_dim": WIDTH, "num_attention_heads": 2, "num_layers": 2}
    model = made("hf_gpt2", {**settings, "dropout": 0.1, "max_target_positions": 32})
    assert check_model(model, key_type) == WIDTH
    gpt, sample = model.decoder.model, batch()
    tokens, mask = sample["net_input"]["src_tokens"], sample["target"].ne(PAD)
    places = torch.arange(1, tokens.shape[1] + 1).expand_as(tokens)
    seen: list[Tensor] = []
    module = {
        "last_ffn_input": gpt.transformer.h[-1].mlp.c_fc,
        "last_attn_input": gpt.transformer.h[-1].attn.c_attn,
        "decoder_output": gpt.lm_head,
    }[key_type]
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        logits = gpt(input_ids=tokens, position_ids=places).logits
    handle.remove()
    reader = language_model(model, key_type)
    found = reader.encode(sample["net_input"], mask)
    full = logits.log_softmax(dim=2)[mask]
    torch.testing.assert_close(reader.log_probs(found.features), full, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.keys, seen[0][mask], rtol=1e-5, atol=1e-5)
    state: dict[str, Any] = {}
    order = torch.tensor([2, 0, 1])
    for step in range(6):
        last = reader.step(tokens[:, : step + 1], state)
        ours = reader.log_probs(last.features)
        torch.testing.assert_close(ours, logits[:, step].log_softmax(dim=1), rtol=1e-4, atol=1e-5)
        reader.reorder(state, order)
        tokens, logits = tokens[order], logits[order]
