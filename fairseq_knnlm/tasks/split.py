"""Rows of a split, read as ``fairseq-eval-lm`` reads them: in the same blocks and contexts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from fairseq import utils

from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.runs.explain import Span, SplitRows
from fairseq_knnlm.runs.inputs import Inputs
from fairseq_knnlm.runs.scorer import Blocks
from fairseq_knnlm.runs.sources import BEFORE
from fairseq_knnlm.tasks import stock
from fairseq_knnlm.tasks.session import Session
from fairseq_knnlm.tasks.windows import WindowsInText

#: Tokens that are read at a time, unless --max-tokens says so.
TOKENS_AT_A_TIME = 4096


def open_rows(session: Session, split: str, rows: range) -> tuple[Inputs, SplitRows]:
    """Rows of a split, and what is to be read for their sake.

    That is the blocks that hold them; where an expert needs the text in its order, such as the
    cache, all text up to them.

    Args:
        session: with fairseq's flags for reading blocks.
        split: its name.
        rows: of its tokens, the first is 0.

    Raises:
        ConfigError: where the split is not there, or does not have these rows.
    """
    stock.check_split(session.cfg.task.data, split)
    session.task.load_dataset(split)
    dataset, window = session.task.dataset(split), session.cfg.eval_lm.context_window
    sizes = np.asarray(dataset.sizes, dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    _check_rows(split, rows, int(sizes.sum()))
    bos = session.task.vocabulary().bos
    first, last = (_block_of(starts, row) for row in (rows.start, rows.stop - 1))
    _check_lengths(session, max(map(dataset.num_tokens, range(first, last + 1))))
    read = _block_of(starts, max(0, rows.start - BEFORE))
    whole = session.task.needs_order()
    reached = 0 if whole else first
    span = Span(_tokens(dataset, range(read, last + 1)), int(starts[read]), rows)
    context = session.task.context(window)
    return session.task.inputs(session.models, context), SplitRows(
        f"{split}, rows {rows.start:,} to {rows.stop:,}",
        Blocks(starts, bos),
        _batches(session, dataset, range(reached, last + 1)),
        span,
    )


def _check_rows(split: str, rows: range, length: int) -> None:
    if rows.stop > length:
        raise ConfigError(
            f"--rows are not all in the split {split}",
            expected=f"A:B with B up to {length:,}, the tokens of its blocks",
            found=f"{rows.start}:{rows.stop}",
        )


def _check_lengths(session: Session, longest: int) -> None:
    """Refuses blocks that fairseq would leave out, and windows that the model does not take."""
    most = utils.resolve_max_positions(*(model.max_positions() for model in session.models))
    if longest > most:
        raise ConfigError(
            "the rows lie in blocks that are longer than the model takes",
            expected=f"blocks of at most {most:,} tokens",
            found=f"{longest:,}",
            do="pass --sample-break-mode none and a --tokens-per-sample up to that",
        )


def _block_of(starts: np.ndarray, row: int) -> int:
    return int(np.searchsorted(starts, row, side="right")) - 1


def _tokens(dataset: Any, blocks: range) -> list[int]:
    """The tokens of blocks, without what stands before these: a beginning of sentence, padding."""
    parts = [dataset[block]["target"][-int(dataset.size(block)) :] for block in blocks]
    return [token for part in parts for token in part.tolist()]


def _batches(session: Session, dataset: Any, blocks: range) -> Iterator[dict[str, Any]]:
    """Blocks after their context, as fairseq hands them to a scorer."""
    window, pad = session.cfg.eval_lm.context_window, session.task.target_dictionary.pad()
    if window:
        size = session.task.args.tokens_per_sample
        dataset = WindowsInText(dataset, size, window, pad)
    longest = max(int(dataset.num_tokens(block)) for block in blocks) + window
    most = session.cfg.dataset.max_tokens or TOKENS_AT_A_TIME
    together = max(1, min(most // longest, session.cfg.dataset.batch_size or most))
    for start in range(blocks.start, blocks.stop, together):
        numbers = range(start, min(start + together, blocks.stop))
        batch: dict[str, Any] = dataset.collater([dataset[number] for number in numbers])
        yield utils.move_to_cuda(batch) if session.device.type == "cuda" else batch
