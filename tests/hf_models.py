"""Tiny models of transformers, one a family, wrapped; for tests that need the extra ``hf``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
tokenizers = pytest.importorskip("tokenizers", reason="needs the extra hf")

import fairseq_knnlm.tasks  # noqa: E402, F401

from fairseq.checkpoint_utils import load_model_ensemble  # noqa: E402  # isort: skip
from fairseq.data import Dictionary  # noqa: E402  # isort: skip

SIZE, POSITIONS = 96, 48
SMALL = {
    "vocab_size": SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "n_inner": 48},
    "gpt_neox": {},
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {
        "head_dim": 8,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,  # of two: one layer looks back as far as there is text
    },
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}


#: Of families that are not known; this is Bloom's.
FURTHER: dict[str, Any] = {"n_layer": 2, "n_head": 4, "hidden_size": 32}


def configuration(family: str, **more: Any) -> Any:
    """Of a tiny model."""
    named = ("vocab_size", "bos_token_id", "eos_token_id")
    taken = named if family in {"gpt2", "bloom"} else tuple(SMALL)
    settings = {name: SMALL[name] for name in taken} | CONFIGS.get(family, FURTHER) | more
    return transformers.CONFIG_MAPPING[family](**settings)


def save_model(folder: Path, family: str, *, trained: bool = False, **more: Any) -> Any:
    """A tiny model of random weights, and a tokenizer of fewer tokens than it has.

    Args:
        folder: to write.
        family: of ``CONFIGS``.
        trained: it will be; otherwise its output is as peaked as a trained one's.
        more: settings.
    """
    torch.manual_seed(1)
    config = configuration(family, **more)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1 if trained else 20)
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n for n in range(3, SIZE - 6)}}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    fast.save_pretrained(folder)
    return model


class Task:
    """As much of a task as building a model asks for."""

    def __init__(self, dictionary: Any) -> None:
        self.target_dictionary = self.source_dictionary = dictionary

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        from fairseq import models

        return models.build_model(cfg, self, from_checkpoint)


def opened(out: Path) -> tuple[Any, Any]:
    dictionary = Dictionary.load(str(out / "dict.txt"))
    (model,), _ = load_model_ensemble([str(out / "checkpoint.pt")], task=Task(dictionary))
    return model, dictionary


def some_ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, SIZE - 6, (rows, length), generator=torch.Generator().manual_seed(2))


def as_symbols(dictionary: Any, ids: torch.Tensor) -> torch.Tensor:
    return torch.tensor([[dictionary.index(str(one)) for one in row] for row in ids.tolist()])


def save_trained(folder: Path, family: str, text: str) -> Any:
    """A tiny model trained on the lines of a text, with a tokenizer of bytes; the latter."""
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=letters,
        show_progress=False,
    )
    raw.train_from_iterator(text.splitlines(), trainer)
    end = "<|endoftext|>"
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=end, bos_token=end)
    fast.save_pretrained(folder)
    torch.manual_seed(1)
    positions = "n_positions" if family == "gpt2" else "max_position_embeddings"
    more = {positions: 64, "vocab_size": len(fast) + 9, "bos_token_id": 0, "eos_token_id": 0}
    config = configuration(family, **more)
    model = transformers.AutoModelForCausalLM.from_config(config)
    ids = [one for line in text.splitlines() for one in [*fast(line)["input_ids"], 0]]
    blocks = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    for step in range(30):
        batch = blocks[step * 16 % len(blocks) :][:16]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    return fast
