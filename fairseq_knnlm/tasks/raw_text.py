"""The text of a split, put together of its tokens, and the raw text that a flag names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.runs.raw_text import RawText, joined_text, raw_text, spelled_lines
from fairseq_knnlm.runs.spelling import pieces_of
from fairseq_knnlm.tasks.spelling import spelling


def text_of(whole: Any, task: Any, dataset: Any, split: str, left_out: int) -> RawText | None:
    """What figures a word and a byte are taken over; None where nobody knows.

    Args:
        whole: fairseq's whole configuration.
        task: ``knn_lm``.
        dataset: the blocks of the split, in its order.
        split: its name.
        left_out: tokens of it that nobody will score.

    Raises:
        ConfigError: where ``--raw-text`` is another text, or a part of it is not scored.
    """
    raw, vocabulary = task.options.writing.raw_text, task.vocabulary()
    cut = spelling(whole, vocabulary, task.target_dictionary.unk())
    known = bool(pieces_of(vocabulary.symbols)) or bool(getattr(whole, "bpe", None))
    if raw is None and not known:
        return None
    if left_out and raw is not None:
        raise ConfigError(
            "--raw-text needs all tokens of the text scored",
            expected="a run that leaves no token out",
            found=f"{left_out:,} tokens left out",
            do="pass --sample-break-mode none and --context-window in the place of --stride, or "
            "leave --raw-text out",
        )
    if left_out:
        return None
    tokens = tokens_of(dataset, added=vocabulary.bos is not None)
    lines = spelled_lines(tokens, vocabulary.eos, cut.text)
    unknown = int((tokens == cut.unknown).sum())
    if raw is None:
        return joined_text(lines, unknown)
    return raw_text(Path(raw), split, lines, unknown)


def tokens_of(dataset: Any, *, added: bool) -> np.ndarray:
    """The tokens (N,) of a text.

    Args:
        dataset: its blocks, in its order.
        added: each has a beginning of sentence before it that is none of its tokens.
    """
    blocks = (dataset[number]["target"].numpy() for number in range(len(dataset)))
    return np.concatenate([block[int(added) :] for block in blocks])
