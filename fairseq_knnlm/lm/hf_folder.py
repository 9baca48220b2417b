"""A folder that transformers saved a model in: looked at, and opened without running its code."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fairseq_knnlm.errors import ModelError, first_line
from fairseq_knnlm.lm.causal import library, taken

#: Ids in a row whose logits are computed in two ways.
TRIED = 7


def check_folder(folder: Path) -> dict[str, Any]:
    """The configuration of a folder's model.

    Raises:
        ModelError: where there is none, or its weights are missing or pickled, or it comes with
            code of its own.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            f"{folder} holds no model of transformers",
            expected="a folder with config.json, model.safetensors and tokenizer.json",
            found="no config.json" if folder.is_dir() else "no such folder",
            do="name the folder that save_pretrained wrote, or a clone of the model's repository",
        )
    config = without_code(path, "model")
    if "quantization_config" in config:
        raise ModelError(
            f"the weights in {folder} are quantised",
            expected="weights as numbers: float32, float16 or bfloat16",
            found="quantization_config in config.json",
            do="name the folder of the model that this one was made of",
        )
    if not list(folder.glob("*.safetensors")):
        pickled = sorted(one.name for one in folder.glob("*.bin"))
        raise ModelError(
            f"{folder} has no weights that are safe to open",
            expected="model.safetensors",
            found=f"{', '.join(pickled)}, which could run code" if pickled else "no weights",
            do="save the model again by save_pretrained, in transformers 4.35 or later",
        )
    return config


def without_code(path: Path, what: str) -> dict[str, Any]:
    """What a configuration says.

    Args:
        path: of it.
        what: it is of, ``"model"`` or ``"tokenizer"``.

    Raises:
        ModelError: where it cannot be read, or names code that comes with it.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(
            f"{path} cannot be read", expected=f"a {what}'s configuration, as JSON", found=error
        ) from error
    if not isinstance(config, dict):
        raise ModelError(
            f"{path} cannot be read",
            expected=f"a {what}'s configuration",
            found=type(config).__name__,
        )
    if "auto_map" in config:
        raise ModelError(
            f"the {what} in {path.parent} brings code of its own, which is not run",
            expected=f"a {what} that transformers itself has",
            found=f"auto_map in {path.name}: {str(config['auto_map'])[:200]}",
        )
    return config


def open_model(folder: Path, dtype: str | None) -> nn.Module:
    """The model of a folder, weights loaded.

    Args:
        folder: one that ``check_folder`` has looked at.
        dtype: of the weights; None for their own.

    Raises:
        ConfigError: where transformers is not installed.
        ModelError: where it cannot open the model, or weights of it are missing.
    """
    try:
        model, told = opened(
            "AutoModelForCausalLM",
            folder,
            dtype="auto" if dtype is None else getattr(torch, dtype),
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # which are named below
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"transformers cannot open the model in {folder}",
            expected="a causal language model, its files whole",
            found=first_line(error),
        ) from error
    missing = sorted({*told["missing_keys"], *(one[0] for one in told["mismatched_keys"])})
    if missing:
        raise ModelError(
            f"weights are missing in {folder}",
            expected="all weights of a causal language model",
            found=f"none, or of another shape, for {', '.join(missing[:3])}",
        )
    found: nn.Module = model.eval()
    return found


def opened(kind: str, folder: Path, **more: Any) -> Any:
    """What transformers opens in a folder: by none of the folder's code, and of no network.

    Args:
        kind: of transformers' classes, such as ``"AutoTokenizer"``.
        folder: where its files are.
        more: that the class is told.

    Raises:
        ConfigError: where transformers is not installed.
    """
    transformers = library()
    with _quiet(transformers):
        return getattr(transformers, kind).from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, **more
        )


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keeps transformers from telling in its own words what is told here, or refused.

    Its progress shows where a terminal shows it.
    """
    says = transformers.utils.logging
    level, bars = says.get_verbosity(), says.is_progress_bar_enabled()
    says.set_verbosity_error()
    if not sys.stderr.isatty():
        says.disable_progress_bar()
    try:
        yield
    finally:
        says.set_verbosity(level)
        if bars:
            says.enable_progress_bar()


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, of the library ``tokenizers``.

    Raises:
        ConfigError: where transformers is not installed.
        ModelError: where there is none, or one that runs in Python alone, or by code of its own.
    """
    if (settings := folder / "tokenizer_config.json").is_file():
        without_code(settings, "tokenizer")
    try:
        found = opened("AutoTokenizer", folder)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"transformers cannot open the tokenizer in {folder}",
            expected="tokenizer.json, or files of which it can be made",
            found=first_line(error),
        ) from error
    if getattr(found, "backend_tokenizer", None) is None:
        raise ModelError(
            f"the tokenizer in {folder} runs in Python alone",
            expected="one that can be written as tokenizer.json",
            found=type(found).__name__,
        )
    return found


@torch.no_grad()
def check_key(model: nn.Module, module: nn.Module, name: str) -> None:
    """Refuses a module that is not given a vector for each token.

    Args:
        model: transformers' own.
        module: whose input is the key.
        name: of it, as it was typed.

    Raises:
        ModelError: where it is given something else, or nothing.
    """
    lm: Any = model
    caught: list[Tensor] = []
    handle = module.register_forward_pre_hook(
        lambda _, given, named: caught.extend([*given, *named.values()][:1]), with_kwargs=True
    )
    try:
        lm.base_model(input_ids=torch.arange(TRIED)[None])
    finally:
        handle.remove()
    shape = tuple(caught[-1].shape) if caught and isinstance(caught[-1], Tensor) else ()
    width = taken(module, model)
    if shape not in ((1, TRIED, width), (TRIED, width)):
        raise ModelError(
            f"--knn-module {name} is not given a vector for each token",
            expected="a module whose input is (B, T, D), such as the last block's MLP",
            found=f"{shape} of {TRIED} tokens" if shape else "no input",
        )


@torch.no_grad()
def check_logits(model: nn.Module) -> None:
    """Refuses a model that does more behind its output layer than that layer.

    Raises:
        ModelError: where logits are not the layer's output.
    """
    lm: Any = model
    size = int(lm.get_output_embeddings().weight.shape[0])
    ids = torch.arange(TRIED)[None] % size
    told: Tensor = lm(input_ids=ids).logits
    ours: Tensor = lm.get_output_embeddings()(lm.base_model(input_ids=ids).last_hidden_state)
    if told.shape != ours.shape or not torch.allclose(told, ours, rtol=1e-3, atol=1e-3):
        raise ModelError(
            "the model's probabilities are not those of its output layer alone",
            expected="logits that the output layer makes of the last hidden state",
            found=f"others, of {type(model).__name__}",
        )
