"""Models of transformers, wrapped: fairseq's figures against transformers' own computation."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_calls import Capture, refuse
from hf_models import CONFIGS, POSITIONS, SIZE, as_symbols, opened, save_model, some_ids

from fairseq_knnlm.errors import KnnlmError
from fairseq_knnlm.lm.fingerprints import model_fingerprint
from fairseq_knnlm.lm.registry import check_model, language_model
from fairseq_knnlm.runs.wrapping import wrap

#: The module whose input is the key, by the name that transformers gives it.
KEYS = {
    "gpt2": "transformer.h.1.mlp",
    "gpt_neox": "gpt_neox.layers.1.mlp",
    "opt": "model.decoder.layers.1.fc1",
}


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def wrapped(request: Any, tmp_path_factory: Any) -> tuple[str, Any, Any, Any]:
    """Family, transformers' model, ours and its dictionary."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = save_model(folder / "hf", request.param)
    wrap(folder / "hf", folder / "out", None, None)
    return request.param, theirs, *opened(folder / "out")


@torch.no_grad()
def test_losses_are_those_of_transformers(wrapped: Any) -> None:
    _, theirs, model, dictionary = wrapped
    ids = some_ids(3, 24)
    tokens = as_symbols(dictionary, ids)
    expected = theirs(input_ids=ids).logits.log_softmax(-1)[:, :-1]
    expected = expected.gather(2, ids[:, 1:, None])[..., 0].flatten()
    lm = language_model(model)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, -1] = False
    features = lm.encode({"src_tokens": tokens}, mask).features
    targets = tokens[:, 1:].flatten()
    assert torch.allclose(lm.log_prob(features, targets), expected, atol=1e-4)
    every = lm.log_probs(features)
    assert torch.allclose(every.gather(1, targets[:, None])[:, 0], expected, atol=1e-4)
    assert torch.allclose(every.exp().sum(1), torch.ones(len(every)), atol=1e-4)


@torch.no_grad()
def test_keys_are_what_the_mlp_is_given(wrapped: Any) -> None:
    family, theirs, model, dictionary = wrapped
    ids, caught = some_ids(2, 20), []
    module = theirs.get_submodule(KEYS.get(family, "model.layers.1.mlp"))
    handle = module.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    theirs(input_ids=ids)
    handle.remove()
    tokens = as_symbols(dictionary, ids)
    lm = language_model(model, "last_ffn_input")
    keys = lm.encode({"src_tokens": tokens}, torch.ones_like(tokens, dtype=torch.bool)).keys
    assert keys is not None
    assert torch.allclose(keys, caught[0].view(-1, 32), atol=1e-5)
    assert check_model(model, "last_ffn_input") == 32


@torch.no_grad()
def test_padding_changes_nothing(wrapped: Any) -> None:
    """On either side."""
    _, _, model, dictionary = wrapped
    tokens = as_symbols(dictionary, some_ids(1, 12))
    lm, pad = language_model(model), torch.full((1, 5), dictionary.pad())
    alone = lm.encode({"src_tokens": tokens}, torch.ones_like(tokens, dtype=torch.bool)).features
    for padded in (torch.cat([pad, tokens], 1), torch.cat([tokens, pad], 1)):
        found = lm.encode({"src_tokens": padded}, padded.ne(dictionary.pad())).features
        assert torch.allclose(found, alone, atol=1e-4)


@torch.no_grad()
def test_steps_are_the_whole(wrapped: Any) -> None:
    """By the cache, and with texts that change places."""
    _, _, model, dictionary = wrapped
    tokens = as_symbols(dictionary, some_ids(2, 14))
    lm, state = language_model(model, "last_ffn_input"), {}
    whole = lm.encode({"src_tokens": tokens}, torch.ones_like(tokens, dtype=torch.bool))
    for end in range(1, 15):
        found = lm.step(tokens[:, :end], state)
        expected = whole.features.view(2, 14, -1)[:, end - 1]
        assert torch.allclose(found.features, expected, atol=1e-4)
        if end == 7:
            lm.reorder(state, torch.tensor([1, 0]))
            tokens = tokens.flip(0)
            whole = lm.encode({"src_tokens": tokens}, torch.ones_like(tokens, dtype=torch.bool))


def test_a_longer_text_than_positions_is_refused(wrapped: Any) -> None:
    _, _, model, dictionary = wrapped
    tokens = as_symbols(dictionary, some_ids(1, POSITIONS + 1))
    with pytest.raises(KnnlmError, match="longer than the model has positions"):
        language_model(model).encode({"src_tokens": tokens}, tokens.ne(dictionary.pad()))


def test_weights_in_several_files(tmp_path: Path) -> None:
    """As large models have them; one that is gone is missed."""
    folder = tmp_path / "hf"
    theirs = save_model(folder, "gpt2")
    (folder / "model.safetensors").unlink()
    theirs.save_pretrained(folder, max_shard_size="40KB")
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 1 and (folder / "model.safetensors.index.json").is_file()
    wrap(folder, tmp_path / "out", None, None)
    model, _ = opened(tmp_path / "out")
    ours = dict(model.decoder.causal.lm.named_parameters())
    assert all(torch.equal(ours[name], one) for name, one in theirs.named_parameters())
    files[-1].unlink()
    with pytest.raises(KnnlmError, match="cannot open the model"):
        wrap(folder, tmp_path / "again", None, None)


def test_weights_in_bfloat16_stay_so(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", "llama")
    wrap(tmp_path / "hf", tmp_path / "out", "bfloat16", None)
    model, _ = opened(tmp_path / "out")
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}


def spoilt(path: Path, **more: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def spoilt_config(folder: Path, **more: Any) -> None:
    spoilt(folder / "config.json", **more)


def refused(
    capsys: Capture, match: str, folder: Path, module: str | None = None, out: Path | None = None
) -> None:
    """``wrap`` says so in one message, and leaves nothing behind."""
    out = out or folder.parent / "out"
    before = out.exists()
    more = () if module is None else ("--knn-module", module)
    said = refuse(capsys, "wrap", "--hf", folder, "--out", out, *more)
    assert re.search(match, said), said
    assert said.count("error: ") == 1 and "  expected: " in said and "  found:    " in said
    assert out.exists() == before


def test_folders_that_are_refused(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "hf"
    refused(capsys, "holds no model", folder)
    save_model(folder, "llama")
    refused(capsys, "into the folder of the model", folder, out=folder)
    refused(capsys, "cannot be written", folder, out=folder / "config.json")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    refused(capsys, "cannot open the model", folder)
    weights.write_bytes(b"x" * 100)
    refused(capsys, "cannot open the model", folder)
    weights.unlink()
    refused(capsys, "found:    no weights", folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused(capsys, "pytorch_model.bin, which could run code", folder)
    weights.write_bytes(whole)
    spoilt_config(folder, quantization_config={"quant_method": "gptq"})
    refused(capsys, "are quantised", folder)
    spoilt_config(folder, auto_map={"AutoModel": "code.Model"})
    refused(capsys, "code of its own", folder)
    (folder / "config.json").write_text("{")
    refused(capsys, "config.json cannot be read", folder)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_code_that_comes_with_a_model_is_not_run(
    family: str, tmp_path: Path, capsys: Capture
) -> None:
    """Nor passed over, where transformers has a tokenizer of its own for the family."""
    folder, ran = tmp_path / "hf", tmp_path / "ran"
    save_model(folder, family)
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    tokenizer = folder / "tokenizer_config.json"
    spoilt(tokenizer, tokenizer_class="Own", auto_map={"AutoTokenizer": ["code.Own", None]})
    refused(capsys, "the tokenizer in .* brings code of its own, which is not run", folder)
    spoilt(folder / "config.json", auto_map={"AutoModelForCausalLM": "code.Own"})
    refused(capsys, "the model in .* brings code of its own, which is not run", folder)
    tokenizer.write_text("[]")
    (folder / "config.json").write_text("[]")
    refused(capsys, "config.json cannot be read", folder)
    assert not ran.exists()


def test_settings_that_do_not_fit_the_weights(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "hf"
    save_model(folder, "llama")
    spoilt_config(folder, num_hidden_layers=3)
    refused(capsys, "weights are missing", folder)
    spoilt_config(folder, num_hidden_layers=2, intermediate_size=40)
    refused(capsys, "none, or of another shape, for model.layers.0.mlp", folder)
    spoilt_config(folder, intermediate_size=48, model_type="t5")
    refused(capsys, "cannot open the model", folder)
    spoilt_config(folder, model_type="never_heard_of")
    refused(capsys, "cannot open the", folder)


def test_the_tokenizer_of_another_model(tmp_path: Path, caplog: Any, capsys: Capture) -> None:
    """With more tokens than the model has; or with another end of a text, which is said."""
    folder = tmp_path / "hf"
    save_model(folder, "llama")
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"] |= {f"w{number}": number for number in range(SIZE, SIZE + 3)}
    path.write_text(json.dumps(tokenizer))
    refused(capsys, "tokenizer in .* is another model's", folder)
    for one in ("tokenizer.json", "tokenizer_config.json"):
        (folder / one).unlink()
    refused(capsys, "cannot open the tokenizer", folder)
    save_model(folder, "llama")
    spoilt_config(folder, eos_token_id=5)
    wrap(folder, tmp_path / "out", None, None)
    assert "ends a text by id 5, its tokenizer by id 2, </s>" in caplog.text


def test_where_keys_are_read_may_be_named(tmp_path: Path, capsys: Capture) -> None:
    """Of a family that nobody here knows, it must be."""
    folder = tmp_path / "hf"
    theirs = save_model(folder, "bloom")
    refused(capsys, "--knn-module, such as", folder)
    refused(capsys, "names no module", folder, "transformer.h.7.mlp")
    refused(capsys, "not given a vector for each token", folder, "transformer.h")
    refused(capsys, "not given a vector for each token", folder, "transformer.word_embeddings")
    wrap(folder, tmp_path / "out", None, "transformer.h.1.mlp.dense_4h_to_h")
    model, dictionary = opened(tmp_path / "out")
    assert check_model(model, "last_ffn_input") == 4 * 32
    assert check_model(model, "decoder_output") == 32
    ids = some_ids(2, 9)
    tokens, caught = as_symbols(dictionary, ids), []
    theirs.transformer.h[1].mlp.dense_4h_to_h.register_forward_pre_hook(
        lambda _, given: caught.append(given[0])
    )
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits.log_softmax(-1).flatten(0, 1)
    lm = language_model(model, "last_ffn_input")
    found = lm.encode({"src_tokens": tokens}, torch.ones_like(tokens, dtype=torch.bool))
    assert found.keys is not None
    torch.testing.assert_close(found.keys, caught[0].flatten(0, 1), rtol=1e-5, atol=1e-5)
    columns = as_symbols(dictionary, torch.arange(3, 90)[None])[0]
    told = lm.log_probs(found.features)[:, columns]
    torch.testing.assert_close(told, expected[:, 3:90], rtol=1e-4, atol=1e-4)
    assert not lm.reads_ahead
    padded = torch.nn.functional.pad(tokens, (4, 0), value=dictionary.pad())
    alike = lm.encode({"src_tokens": padded}, padded.ne(dictionary.pad()))
    assert torch.allclose(alike.features, found.features, atol=1e-4)


def test_the_dictionary_of_another_model(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", "gpt2")
    wrap(tmp_path / "hf", tmp_path / "out", None, None)
    path = tmp_path / "out" / "dict.txt"
    path.write_text(path.read_text() + "96 1\n")
    with pytest.raises(KnnlmError, match="dictionary is not the one"):
        opened(tmp_path / "out")


def test_where_keys_are_read_belongs_to_the_model(tmp_path: Path) -> None:
    """The same weights, read elsewhere or by another configuration, are another model."""
    found = set()
    for name, module, more in (
        ("plain", None, {}),
        ("below", "model.layers.0.mlp", {}),
        ("turned", None, {"rms_norm_eps": 1e-3}),
    ):
        save_model(tmp_path / name, "llama", **more)
        wrap(tmp_path / name, tmp_path / f"{name}-out", None, module)
        found.add(model_fingerprint(opened(tmp_path / f"{name}-out")[0]))
    assert len(found) == 3
    wrap(tmp_path / "plain", tmp_path / "named", None, "model.layers.1.mlp")
    assert model_fingerprint(opened(tmp_path / "named")[0]) in found
