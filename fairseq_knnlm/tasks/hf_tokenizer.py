"""``--bpe hf_tokenizer``: text to a model's token ids and back, by its tokenizer.json."""

# Annotations are not postponed: fairseq makes flags of a dataclass's types.

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fairseq.data.encoders import register_bpe
from fairseq.dataclass import FairseqDataclass

from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.runs.hf_pieces import Pieces, read_pieces
from fairseq_knnlm.runs.spelling import join_words

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
        ConfigError: where there is no such file, or ``tokenizers`` is not installed.
    """

    def __init__(self, cfg: Any) -> None:
        path = Path(cfg.hf_tokenizer)
        if not path.is_file():
            raise ConfigError(
                "--bpe hf_tokenizer needs the model's tokenizer",
                expected="--hf-tokenizer FILE, the tokenizer.json that `fairseq-knnlm wrap` wrote",
                found=f"no file {path}" if cfg.hf_tokenizer else "nothing",
            )
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ConfigError(
                "--bpe hf_tokenizer needs the library tokenizers, which is not installed",
                expected="the extra hf of this package",
                found=str(error),
                do="pip install 'fairseq-knnlm[hf]'",
            ) from error
        self._tokenizer: Any = Tokenizer.from_file(str(path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.path = path

    def encode(self, text: str) -> str:
        """The ids of a text, nothing added to it."""
        return " ".join(map(str, self._tokenizer.encode(text, add_special_tokens=False).ids))

    def decode(self, symbols: str) -> str:
        """The text of ids, as it was."""
        ids = [int(one) for one in symbols.split() if one.isdecimal()]
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def piece(self, symbol: str, begins_line: bool) -> bytes:
        """A symbol of the dictionary as text in UTF-8; one of fairseq's own as it is."""
        if not symbol.isdecimal():
            return symbol.encode()
        number, pieces = int(symbol), self._pieces
        if pieces is None:
            return join_words(self.decode(symbol), begins_line)
        found = pieces.of.get(number, b"")  # the model may have more ids than the tokenizer
        return pieces.first.get(number, found) if begins_line else found

    @cached_property
    def _pieces(self) -> Pieces | None:
        return read_pieces(self._tokenizer.to_str())

    def check(self, symbols: Sequence[str]) -> None:
        """Refuses the tokenizer of another model.

        Args:
            symbols: of the dictionary.

        Raises:
            ConfigError: where it has ids that the dictionary has not.
        """
        size, known = self._tokenizer.get_vocab_size(), set(symbols)
        lacking = sum(str(number) not in known for number in range(size))
        if lacking > SPECIAL:
            raise ConfigError(
                f"{self.path} is not the tokenizer of the model that the data is for",
                expected="the one that `fairseq-knnlm wrap` wrote beside the data's dict.txt",
                found=f"{lacking:,} of its {size:,} tokens are not in the dictionary",
            )
