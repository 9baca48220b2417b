"""A folder of Hugging Face transformers made into a checkpoint and a dictionary of fairseq's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fairseq_knnlm.errors import ModelError
from fairseq_knnlm.files import publish
from fairseq_knnlm.lm.causal import key_module, library
from fairseq_knnlm.lm.hf_folder import check_folder, check_output, open_model

#: What `wrap` writes.
CHECKPOINT, DICTIONARY, TOKENIZER = "checkpoint.pt", "dict.txt", "tokenizer.json"


def wrap(folder: Path, out: Path, dtype: str | None, module: str | None) -> dict[str, Any]:
    """Writes checkpoint, dictionary and tokenizer.

    Args:
        folder: of the model, with its tokenizer.
        out: folder to write, which may be there.
        dtype: of the weights; None for their own.
        module: whose input is the key; None for the family's.

    Returns:
        ``family``, ``parameters``, ``vocabulary``, ``dtype`` and ``longest``.

    Raises:
        KnnlmError: of the kind that fits what is wrong; nothing is written then.
    """
    config = check_folder(folder)
    tokenizer = library().AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"the tokenizer in {folder} runs in Python alone",
            expected="one that can be written as tokenizer.json",
            found=type(tokenizer).__name__,
        )
    model: Any = open_model(folder, dtype)
    key_module(model, module)
    check_output(model)
    size = int(model.get_output_embeddings().weight.shape[0])
    if len(tokenizer) > size:
        raise ModelError(
            f"the tokenizer in {folder} is another model's",
            expected=f"at most {size:,} tokens, as the model has",
            found=f"{len(tokenizer):,}",
        )
    special = special_ids(model.config, tokenizer)
    kind = str(model.dtype).removeprefix("torch.")
    settings = {
        "_name": "hf_causal_lm",
        "hf_config": json.dumps(config, sort_keys=True),
        "hf_special": json.dumps(special),
        "hf_dtype": kind,
        "hf_knn_module": module or "",
    }
    longest = int(model.config.max_position_embeddings)
    out.mkdir(parents=True, exist_ok=True)
    with publish(out / TOKENIZER) as path:
        backend.save(str(path))
    with publish(out / DICTIONARY) as path:
        taken = set(special.values())
        path.write_text("".join(f"{one} 1\n" for one in range(size) if one not in taken))
    bpe = {"_name": "hf_tokenizer", "hf_tokenizer": str((out / TOKENIZER).absolute())}
    with publish(out / CHECKPOINT) as path:
        torch.save(checkpoint(model, settings, bpe, longest), path)
    count = sum(one.numel() for one in model.parameters())
    return {
        "family": model.config.model_type,
        "parameters": count,
        "vocabulary": size,
        "dtype": kind,
        "longest": longest,
    }


def special_ids(config: Any, tokenizer: Any) -> dict[str, int]:
    """The model's ids in the place of fairseq's special symbols, no id twice.

    Raises:
        ModelError: where nothing ends a text.
    """
    end = config.eos_token_id
    end = end[0] if isinstance(end, list) else end
    end = tokenizer.eos_token_id if end is None else end
    if end is None:
        raise ModelError(
            "the model has no token that ends a text",
            expected="eos_token_id in config.json",
            found="none",
        )
    found = {"</s>": int(end)}
    for name, one in (("<s>", config.bos_token_id), ("<unk>", tokenizer.unk_token_id)):
        if one is not None and one not in found.values():
            found[name] = int(one)
    return found


def checkpoint(
    model: Any, settings: Mapping[str, Any], bpe: Mapping[str, Any], longest: int
) -> dict[str, Any]:
    """What fairseq loads, of plain values and tensors alone."""
    task = {"_name": "language_modeling", "data": "", "tokens_per_sample": longest}
    weights = {f"decoder.causal.lm.{name}": one for name, one in model.state_dict().items()}
    history = {
        "criterion_name": "CrossEntropyCriterion",
        "optimizer_name": "FairseqAdam",
        "lr_scheduler_state": {},
        "num_updates": 0,
    }
    return {
        "args": None,
        "cfg": {"model": dict(settings), "task": task, "bpe": dict(bpe)},
        "model": weights,
        "optimizer_history": [history],
        "last_optimizer_state": None,
        "extra_state": {"train_iterator": {"epoch": 1}},
    }
