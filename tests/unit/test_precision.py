"""Layers in bfloat16, against the same model in float32."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from fairseq.models.lstm import LSTMDecoder
from fairseq.models.lstm_lm import LSTMLanguageModel
from test_lm import ADAPTIVE, DECODERS, PAD, batch, decoder, dictionary

from fairseq_knnlm.errors import ConfigError, ModelError
from fairseq_knnlm.lm.fingerprints import model_fingerprint
from fairseq_knnlm.lm.keys import KEY_TYPES
from fairseq_knnlm.lm.precision import compute_in, precision
from fairseq_knnlm.lm.transformer import TransformerLM
from fairseq_knnlm.tasks import loading


@pytest.mark.parametrize("key_type", list(KEY_TYPES))
@pytest.mark.parametrize("kind", list(DECODERS))
def test_keys_and_features_are_float32_and_near(kind: str, key_type: str) -> None:
    """bfloat16 has 8 bits: relative differences of some percent at most, and not none."""
    model, sample = decoder(**DECODERS[kind]), batch()
    mask = sample["target"].ne(PAD)
    exact = TransformerLM(model, key_type).encode(sample["net_input"], mask)
    compute_in(model, "bfloat16")
    found = TransformerLM(model, key_type).encode(sample["net_input"], mask)
    for ours, theirs in ((found.keys, exact.keys), (found.features, exact.features)):
        assert ours is not None and theirs is not None
        assert ours.dtype == torch.float32
        assert 0 < float((ours - theirs).norm() / theirs.norm()) < 0.03


def test_it_is_known_of_a_model_and_of_its_copy_alone() -> None:
    model = decoder(**ADAPTIVE)
    before = model_fingerprint(model)
    assert precision(model) == "float32"
    plain = copy.deepcopy(model)
    compute_in(model, "bfloat16")
    assert precision(model) == precision(copy.deepcopy(model)) == "bfloat16"
    assert precision(plain) == "float32"
    assert model_fingerprint(model) == before
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
    compute_in(plain, "float32")
    assert precision(plain) == "float32"
    assert precision(plain.half()) == "float16"


def test_gradients_are_float32_and_near() -> None:
    model, sample = decoder(dropout=0.0).train(), batch()
    theirs = copy.deepcopy(model)
    compute_in(model, "bfloat16")
    for one in (model, theirs):
        out, _ = one(**sample["net_input"])
        torch.nn.functional.cross_entropy(
            out.flatten(0, 1), sample["target"].flatten(), ignore_index=PAD
        ).backward()
    for (name, ours), exact in zip(model.named_parameters(), theirs.parameters(), strict=True):
        assert ours.grad is not None and exact.grad is not None, name
        assert ours.grad.dtype == torch.float32
        if float(exact.grad.norm()) > 1e-4:
            assert float((ours.grad - exact.grad).norm() / exact.grad.norm()) < 0.1, name


def lstm() -> torch.nn.Module:
    """fairseq's, whose decoder has layers, too."""
    types = dictionary()
    layers = LSTMDecoder(types, embed_dim=8, hidden_size=8, out_embed_dim=8, num_layers=1)
    assert len(layers.layers) == 1
    return LSTMLanguageModel(layers)


def test_models_that_it_is_not_for_are_refused() -> None:
    for other in (torch.nn.Linear(2, 2), lstm()):
        with pytest.raises(ModelError, match="does not work with this model"):
            compute_in(other, "bfloat16")
        compute_in(other, "float32")
    model, sample = decoder(), batch()
    compute_in(model, "bfloat16")
    with pytest.raises(ModelError, match="float32"):
        TransformerLM(model.half()).encode(sample["net_input"], sample["target"].ne(PAD))


def run(**common: bool) -> SimpleNamespace:
    """fairseq's configuration as far as it is read."""
    flags = dict.fromkeys((*loading.HALF, "cpu"), False)
    return SimpleNamespace(common=SimpleNamespace(**{**flags, **common}))


@pytest.mark.parametrize("flag", loading.HALF)
def test_other_flags_of_half_precision_are_refused(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"--{flag.replace('_', '-')} exclude each other"):
        loading.check_lm_dtype(run(**{flag: True}), "bfloat16")
    loading.check_lm_dtype(run(**{flag: True}), "float32")


@pytest.mark.parametrize("fast", [True, False])
def test_a_processor_without_instructions_is_named(
    fast: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading, "fast_in_bfloat16", lambda _: fast)
    with caplog.at_level(logging.WARNING):
        loading.check_lm_dtype(run(cpu=True), "bfloat16")
        loading.check_lm_dtype(None, "float32")
    assert len(caplog.messages) == (not fast)
    assert all("this CPU has no instructions" in text for text in caplog.messages)
