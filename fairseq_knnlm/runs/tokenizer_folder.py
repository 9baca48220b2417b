"""The tokenizer of a folder of transformers, or of one that `wrap` wrote, and its dictionary."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from fairseq_knnlm.errors import ModelError, kind_and_line
from fairseq_knnlm.lm.hf_folder import open_tokenizer, opened
from fairseq_knnlm.runs.wrapping import CHECKPOINT, DICTIONARY, TOKENIZER, special_ids, symbols_of


@dataclass(frozen=True)
class Found:
    """What a folder says of its tokenizer.

    Attributes:
        text: of ``tokenizer.json``.
        special: the model's ids in the place of fairseq's own symbols.
        symbols: of fairseq's dictionary, behind its own.
    """

    text: str
    special: dict[str, int]
    symbols: list[str]


def open_folder(folder: Path) -> Found:
    """Looks into a folder.

    Raises:
        ConfigError: where it is one of transformers, which is not installed.
        ModelError: where there is no tokenizer, or none that runs by itself.
    """
    if (folder / CHECKPOINT).is_file() and (folder / DICTIONARY).is_file():
        return _wrapped(folder)
    if (folder / "config.json").is_file():
        return _of_transformers(folder)
    raise _none(folder, "neither config.json nor checkpoint.pt")


def _wrapped(folder: Path) -> Found:
    path = folder / CHECKPOINT
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        special = json.loads(state["cfg"]["model"]["hf_special"])
        text = (folder / TOKENIZER).read_text(encoding="utf-8")
        lines = (folder / DICTIONARY).read_text(encoding="utf-8").splitlines()
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _none(folder, kind_and_line(error)) from None
    return Found(text, special, [line.rpartition(" ")[0] for line in lines])


def _of_transformers(folder: Path) -> Found:
    tokenizer = open_tokenizer(folder)
    try:
        config = opened("AutoConfig", folder)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise _none(folder, kind_and_line(error)) from None
    special = special_ids(config, tokenizer)
    size = int(config.get_text_config().vocab_size)
    last = max(tokenizer.get_vocab().values())
    if last >= size:
        raise _none(folder, f"ids up to {last:,}, for a model of {size:,}")
    return Found(tokenizer.backend_tokenizer.to_str(), special, symbols_of(size, special))


def _none(folder: Path, found: str) -> ModelError:
    return ModelError(
        f"{folder} has no tokenizer that can be used",
        expected="a folder of transformers, with config.json and tokenizer.json, or what "
        "`fairseq-knnlm wrap` wrote",
        found=found,
        do="name the folder of the model",
    )
