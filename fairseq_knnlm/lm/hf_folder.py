"""A folder that transformers saved a model in: looked at, and opened without running its code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_knnlm.errors import ModelError
from fairseq_knnlm.lm.causal import library

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
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if "auto_map" in config:
        raise ModelError(
            f"the model in {folder} brings code of its own, which is not run",
            expected="a model that transformers itself has",
            found=f"auto_map in config.json: {', '.join(config['auto_map'])}",
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


def open_model(folder: Path, dtype: str | None) -> nn.Module:
    """The model of a folder, weights loaded.

    Args:
        folder: one that ``check_folder`` has looked at.
        dtype: of the weights; None for their own.

    Raises:
        ConfigError: where transformers is not installed.
        ModelError: where it cannot open the model, or weights of it are missing.
    """
    transformers = library()
    try:
        model, told = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto" if dtype is None else getattr(torch, dtype),
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"transformers cannot open the model in {folder}",
            expected="a causal language model",
            found=str(error).strip().splitlines()[0][:300],
        ) from error
    missing = sorted(told["missing_keys"])
    if missing:
        raise ModelError(
            f"weights are missing in {folder}",
            expected="all weights of a causal language model",
            found=f"none for {', '.join(missing[:3])}",
        )
    found: nn.Module = model.eval()
    return found


@torch.no_grad()
def check_output(model: nn.Module) -> None:
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
