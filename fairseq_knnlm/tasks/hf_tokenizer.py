"""``--bpe hf_tokenizer``: text to a model's token ids and back, by its tokenizer.json."""

# Annotations are not postponed: fairseq makes flags of a dataclass's types.

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fairseq.data.encoders import register_bpe
from fairseq.dataclass import FairseqDataclass

from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.runs.tokenizer import open_ids

#: Ids of the model that stand in a dictionary under names of fairseq's.
SPECIAL = 3


@dataclass
class HfTokenizerConfig(FairseqDataclass):
    """Where it lies."""

    hf_tokenizer: str = field(default="", metadata={"help": "tokenizer.json of a wrapped model"})


@register_bpe("hf_tokenizer", dataclass=HfTokenizerConfig)
class HfTokenizer:
    """Ids in words, a space between them: the symbols of a wrapped model's dictionary.

    A text is text: a name of a special token in it, such as ``<|endoftext|>``, is read letter by
    letter.

    Raises:
        ConfigError: where there is no such file, it is no tokenizer, or ``tokenizers`` is not
            installed.
    """

    def __init__(self, cfg: Any) -> None:
        path = Path(cfg.hf_tokenizer)
        if not path.is_file():
            raise ConfigError(
                "--bpe hf_tokenizer needs the model's tokenizer",
                expected="--hf-tokenizer FILE, the tokenizer.json that `fairseq-knnlm wrap` wrote",
                found=f"no file {path}" if cfg.hf_tokenizer else "nothing",
            )
        self.path = path
        self.tokenizer = open_ids(path, {}, lines=True)

    def encode(self, text: str) -> str:
        """The ids of a text, nothing added to it."""
        return " ".join(map(str, self.tokenizer.ids(text)))

    def decode(self, symbols: str) -> str:
        """The text of ids, as it was."""
        return self.tokenizer.text([int(one) for one in symbols.split() if one.isdecimal()])

    def check(self, symbols: Sequence[str]) -> None:
        """Refuses the tokenizer of another model.

        Args:
            symbols: of the dictionary.

        Raises:
            ConfigError: where it has ids that the dictionary has not.
        """
        size, known = len(self.tokenizer.symbols), set(symbols)
        lacking = sum(symbol not in known for symbol in self.tokenizer.symbols)
        if lacking > SPECIAL:
            raise ConfigError(
                f"{self.path} is not the tokenizer of the model that the data is for",
                expected="the one that `fairseq-knnlm wrap` wrote beside the data's dict.txt",
                found=f"{lacking:,} of its {size:,} tokens are not in the dictionary",
            )
