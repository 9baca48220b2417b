"""How a checkpoint's text is cut into tokens: by fairseq's ``--bpe`` and ``--tokenizer``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from fairseq.data.encoders import build_bpe, build_tokenizer
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE
from fairseq.tokenizer import tokenize_line

from fairseq_knnlm.errors import ConfigError, KnnlmError
from fairseq_knnlm.runs.inputs import Vocabulary
from fairseq_knnlm.runs.spelling import (
    WORD_BEGINS,
    Join,
    Spelling,
    join_halves,
    join_pieces,
    join_words,
    pieces_of,
)
from fairseq_knnlm.runs.token_spelling import AnySpelling, TokenizerSpelling
from fairseq_knnlm.runs.tokenizer import Pieces, Tokenizer
from fairseq_knnlm.tasks.encoded import encoded_in
from fairseq_knnlm.tasks.hf_tokenizer import HfTokenizer


def spelling(cfg: Any, vocabulary: Vocabulary, unknown: int) -> AnySpelling:
    """How text is cut, and what tokens are as text.

    Args:
        cfg: fairseq's whole configuration, of which ``bpe``, ``tokenizer`` and the data are read.
        vocabulary: the dictionary.
        unknown: the id of what it does not have.

    Raises:
        ConfigError: where what ``--bpe`` needs cannot be opened, or is another model's.
    """
    if cfg.bpe is None and cfg.tokenizer is None:
        data = getattr(getattr(cfg, "task", None), "data", None)
        if (encoded := encoded_in(data, vocabulary.symbols)) is not None:
            return TokenizerSpelling(vocabulary, unknown, encoded.tokenizer())
    bpe, tokenizer = _built(build_bpe, cfg.bpe), _built(build_tokenizer, cfg.tokenizer)
    if isinstance(bpe, HfTokenizer):
        bpe.check(vocabulary.symbols)
    if tokenizer is None and (exact := _exact(bpe)) is not None:
        return TokenizerSpelling(vocabulary, unknown, exact)

    def split(line: str) -> Sequence[str]:
        if bpe is None and (mark := pieces_of(vocabulary.symbols)):
            raise _nothing_splits(mark)
        for each in (tokenizer, bpe):
            line = line if each is None else each.encode(line)
        return list(tokenize_line(line))

    return Spelling(vocabulary, split, _join(bpe, vocabulary), unknown)


def _exact(bpe: Any) -> Tokenizer | None:
    """A tokenizer that ``--bpe`` names and that tells text exactly; None of one that does not."""
    if isinstance(bpe, HfTokenizer):
        return bpe.tokenizer
    if isinstance(bpe, SentencepieceBPE) and not bpe.enable_sampling:
        return Pieces(bpe.sp)
    return None


def _join(bpe: Any, vocabulary: Vocabulary) -> Join:
    """What fits the dictionary, which tells more surely than a flag; else what ``--bpe`` says."""
    mark = pieces_of(vocabulary.symbols)
    if mark:
        return join_pieces if mark == WORD_BEGINS else join_halves
    return join_words if bpe is None else partial(_decoded, bpe)


def _decoded(bpe: Any, symbol: str, _: bool) -> bytes:
    """A symbol that only ``--bpe`` can read, such as the numbers of GPT-2's bytes."""
    try:
        return str(bpe.decode(symbol)).encode()
    except (KeyError, ValueError):  # one of fairseq's own, such as <unk>
        return symbol.encode()


def _built(build: Any, cfg: Any) -> Any:
    try:
        return build(cfg)
    except KnnlmError:
        raise
    except ImportError as error:
        raise ConfigError(
            "what --bpe or --tokenizer asks for is not installed",
            expected="its library",
            found=str(error),
        ) from error
    except Exception as error:
        raise ConfigError(
            "what --bpe or --tokenizer asks for cannot be opened",
            expected="its files, such as --sentencepiece-model FILE",
            found=f"{type(error).__name__}: {error}",
            do="check the path",
        ) from error


def _nothing_splits(mark: str) -> ConfigError:
    return ConfigError(
        "nothing says how text is cut into the model's pieces of words",
        expected="--bpe sentencepiece --sentencepiece-model FILE"
        if mark == WORD_BEGINS
        else "--bpe subword_nmt --bpe-codes FILE",
        found=f"a dictionary of pieces (with {mark}), and no --bpe",
        do="name what cut the text that the model was trained on",
    )
