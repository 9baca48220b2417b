"""``--bpe hf_tokenizer``: text to a model's token ids and back, by its tokenizer.json."""

# Annotations are not postponed: fairseq makes flags of a dataclass's types.

from dataclasses import dataclass, field
from typing import Any

from fairseq.data.encoders import register_bpe
from fairseq.dataclass import FairseqDataclass


@dataclass
class HfTokenizerConfig(FairseqDataclass):
    """Where it lies."""

    hf_tokenizer: str = field(default="", metadata={"help": "tokenizer.json of a wrapped model"})


@register_bpe("hf_tokenizer", dataclass=HfTokenizerConfig)
class HfTokenizer:
    """Ids in words, a space between them: the symbols of a wrapped model's dictionary."""

    def __init__(self, cfg: Any) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(cfg.hf_tokenizer)

    def encode(self, text: str) -> str:
        """The ids of a text, nothing added to it."""
        return " ".join(map(str, self._tokenizer.encode(text, add_special_tokens=False).ids))

    def decode(self, symbols: str) -> str:
        """The text of ids, as it was."""
        ids = [int(one) for one in symbols.split() if one.isdecimal()]
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))
