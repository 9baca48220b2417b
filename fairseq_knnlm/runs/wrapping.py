"""A folder of Hugging Face transformers made into a checkpoint and a dictionary of fairseq's."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fairseq_knnlm.errors import ConfigError, ModelError
from fairseq_knnlm.files import check_output, check_outputs, publish
from fairseq_knnlm.lm.causal import key_module, longest
from fairseq_knnlm.lm.hf_folder import (
    check_folder,
    check_key,
    check_logits,
    open_model,
    open_tokenizer,
)

logger = logging.getLogger(__name__)

#: What `wrap` writes.
WRITTEN = CHECKPOINT, DICTIONARY, TOKENIZER = "checkpoint.pt", "dict.txt", "tokenizer.json"


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
    check_places(folder, out)
    config = check_folder(folder)
    tokenizer = open_tokenizer(folder)
    model: Any = open_model(folder, dtype)
    check_key(model, key_module(model, module), module or "")
    check_logits(model)
    size = int(model.get_output_embeddings().weight.shape[0])
    last = max(tokenizer.get_vocab().values())
    if last >= size:
        raise ModelError(
            f"the tokenizer in {folder} is another model's",
            expected=f"ids below {size:,}, as the model has them",
            found=f"{last:,}",
        )
    special = special_ids(model.config, tokenizer)
    check_end(special["</s>"], model.config, tokenizer)
    kind = str(model.dtype).removeprefix("torch.")
    settings = {
        "_name": "hf_causal_lm",
        "hf_config": json.dumps(config, sort_keys=True),
        "hf_special": json.dumps(special),
        "hf_dtype": kind,
        "hf_knn_module": module or "",
    }
    most = longest(model.config)
    out.mkdir(parents=True, exist_ok=True)
    with publish(out / TOKENIZER) as path:
        tokenizer.backend_tokenizer.save(str(path))
    with publish(out / DICTIONARY) as path:
        path.write_text("".join(f"{one} 1\n" for one in symbols_of(size, special)))
    bpe = {"_name": "hf_tokenizer", "hf_tokenizer": str((out / TOKENIZER).absolute())}
    with publish(out / CHECKPOINT) as path:
        torch.save(checkpoint(model, settings, bpe, most), path)
    count = sum(one.numel() for one in model.parameters())
    return {
        "family": model.config.model_type,
        "parameters": count,
        "vocabulary": size,
        "dtype": kind,
        "longest": most,
    }


def check_places(folder: Path, out: Path) -> None:
    """Refuses a folder that cannot be written, before a model is opened.

    Raises:
        ConfigError: where that is the model's own.
        OutputError: where it cannot be written.
    """
    if out.exists() and folder.exists() and out.samefile(folder):
        raise ConfigError(
            "--out would write into the folder of the model",
            expected="another folder",
            found=out,
            do="name one that is new",
        )
    if out.exists():
        check_outputs({f"--out {out}: {name}": out / name for name in WRITTEN})
    else:
        check_output("--out", out)


def check_end(end: int, config: Any, tokenizer: Any) -> None:
    """Says where the tokenizer has another end of a text than the model."""
    theirs, ours = tokenizer.eos_token_id, getattr(config, "eos_token_id", None)
    known = ours if isinstance(ours, list) else [end]
    if theirs is not None and theirs not in known:
        logger.warning(
            "the model ends a text by id %d, its tokenizer by id %d, %s: is it this model's "
            "tokenizer? The model's end is taken",
            *(end, theirs, tokenizer.eos_token),
        )


def symbols_of(size: int, special: Mapping[str, int]) -> list[str]:
    """The dictionary's symbols behind fairseq's own: ids, but for those that these stand for.

    Args:
        size: of the model's vocabulary.
        special: as ``special_ids`` has it.
    """
    taken = set(special.values())
    return [str(one) for one in range(size) if one not in taken]


def special_ids(config: Any, tokenizer: Any) -> dict[str, int]:
    """The model's ids in the place of fairseq's special symbols, no id twice.

    Raises:
        ModelError: where nothing ends a text.
    """
    end = getattr(config, "eos_token_id", None)
    end = end[0] if isinstance(end, list) else end
    end = tokenizer.eos_token_id if end is None else end
    if end is None:
        raise ModelError(
            "the model has no token that ends a text",
            expected="eos_token_id in config.json",
            found="none",
        )
    found = {"</s>": int(end)}
    for name, one in (
        ("<s>", getattr(config, "bos_token_id", None)),
        ("<unk>", tokenizer.unk_token_id),
    ):
        if one is not None and one not in found.values():
            found[name] = int(one)
    return found


def checkpoint(
    model: Any, settings: Mapping[str, Any], bpe: Mapping[str, Any], most: int
) -> dict[str, Any]:
    """What fairseq loads, of plain values and tensors alone."""
    task = {"_name": "language_modeling", "data": "", "tokens_per_sample": most}
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
