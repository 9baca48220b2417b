"""Windows of a text that begin a stride apart, as Hugging Face's page on perplexity takes them.

A window of up to L tokens begins at every S-th token, and predicts of its tokens those that no
window before it did, each from what stands before it in the window. The first token of a window has
nothing before it there: it is predicted where an earlier window reaches beyond it, else by none.

Source: "Perplexity of fixed-length models", https://huggingface.co/docs/transformers/perplexity.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from fairseq.data import MonolingualDataset

from fairseq_knnlm.bounds import check_count
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.tasks.host import command

logger = logging.getLogger(__name__)


def windows(tokens: int, length: int, stride: int) -> np.ndarray:
    """Where windows lie in a text.

    Args:
        tokens: of the text.
        length: of a window, L.
        stride: tokens from where one begins to where the next one does, S, 1 to L.

    Returns:
        (W, 3) int64: the token that each begins with, the first one that it predicts, and the one
        behind its end, up to which it predicts. Windows that would predict nothing are not among
        them.
    """
    further = max(0, -(-(tokens - length) // stride))
    begins = np.arange(1 + further, dtype=np.int64) * stride
    firsts = begins + max(1, length - stride)  # where the window before it ends
    firsts[0] = 1
    ends = np.minimum(begins + length, tokens)
    return np.stack([begins, firsts, ends], axis=1)[firsts < ends]


class WindowsAtStride(MonolingualDataset):
    """A split in such windows, in the order of the text.

    An item's ``source`` are the tokens of a window but for its last, its ``target`` the tokens that
    follow each of these: padding where they are predicted by an earlier window. ``sizes`` count
    tokens that are predicted, ``num_tokens`` those that the model reads.

    Args:
        blocks: the split as fairseq's task loads it; its text is read in other blocks.
        length: of a window.
        stride: tokens from one to the next.
    """

    def __init__(self, blocks: MonolingualDataset, length: int, stride: int) -> None:
        text = blocks.dataset.dataset
        self._edges = np.append(0, np.cumsum(np.asarray(text.sizes, dtype=np.int64)))
        self._windows = windows(int(self._edges[-1]), length, stride)
        begins, firsts, ends = self._windows.T
        super().__init__(text, ends - firsts, blocks.vocab, blocks.tgt_vocab)
        self._read = ends - begins - 1
        self._length = length
        self._stride = stride

    @property
    def longest(self) -> int:
        """Tokens that are read of the longest window; 0 where there is none."""
        return int(self._read.max(initial=0))

    @property
    def unpredicted(self) -> int:
        """Tokens of the text that no window predicts."""
        return int(self._edges[-1] - self.sizes.sum())

    def name_unpredicted(self) -> None:
        """Says how many these are, and why."""
        if self._stride < self._length:
            logger.info("the first token of the text has nothing before it, and is not predicted")
            return
        logger.warning(
            "with a --stride as long as the windows, %s tokens are neither scored nor saved: the "
            "first of each window has nothing before it there. With --stride %s it is the first of "
            "the text alone.",
            *(f"{self.unpredicted:,}", f"{self._length - 1:,}"),
        )

    def __getitem__(self, index: int) -> dict[str, Any]:
        begin, first, end = self._windows[index].tolist()
        tokens = self._tokens(begin, end)
        target = tokens[1:].clone()
        target[: first - begin - 1] = self.vocab.pad()
        return {"id": index, "source": tokens[:-1], "target": self._filter_vocab(target)}

    def _tokens(self, start: int, stop: int) -> torch.Tensor:
        """(n,) int64, tokens of the text."""
        line = int(np.searchsorted(self._edges, start, side="right")) - 1
        behind = int(np.searchsorted(self._edges, stop, side="left"))
        lines = torch.cat([self.dataset[number] for number in range(line, behind)])
        return lines[start - self._edges[line] :][: stop - start]

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """As fairseq's, with ``start_indices`` as of a context window.

        ``ntokens`` are those that are predicted.
        """
        batch: dict[str, Any] = super().collater(samples)
        if batch:
            begins, firsts, ends = self._windows[batch["id"].numpy()].T
            batch["start_indices"] = (firsts - begins - 1).tolist()
            batch["ntokens"] = int((ends - firsts).sum())
        return batch

    def num_tokens(self, index: int) -> int:
        """Tokens that are read for a window."""
        return int(self._read[index])

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        """(n,) int64, the same of several."""
        read: np.ndarray = self._read[indices]
        return read

    def ordered_indices(self) -> np.ndarray:
        """(W,) int64, as they stand in the text."""
        return np.arange(len(self))

    def __len__(self) -> int:
        return len(self._windows)


def check_stride(cfg: Any, run: Any) -> None:
    """Refuses a stride that gives no windows, or beside flags that make other blocks.

    Args:
        cfg: a ``KnnlmConfig``, or fairseq's object with its fields.
        run: fairseq's whole configuration; None where the task's part comes alone.

    Raises:
        ConfigError: naming the flag.
    """
    window = 0 if run is None else int(run.eval_lm.context_window)
    mode = str(cfg.sample_break_mode)
    for flag, there, why in (
        ("--context-window", window, "a window's tokens stand before those that it predicts"),
        (f"--sample-break-mode {mode}", mode != "none", "windows go on over the ends of lines"),
        ("--add-bos-token", cfg.add_bos_token, "windows begin with a token of the text"),
    ):
        if there:
            raise ConfigError(
                f"--stride and {flag} exclude each other: {why}",
                expected=f"--stride without {flag}",
                found="both",
                do="leave one of them out",
            )
    if run is not None and run.common_eval.path is None and command() is None:
        raise ConfigError(
            "--stride does nothing in training",
            expected="fairseq-eval-lm, or a command of fairseq-knnlm that reads a text",
            found="no --path of a language model",
            do="leave --stride out",
        )
    check_count("--stride", cfg.stride, "counts tokens from one window to the next")
    length = cfg.tokens_per_sample
    if length < 2 or cfg.stride > length:
        raise ConfigError(
            "windows of --tokens-per-sample tokens cannot begin --stride apart",
            expected="--stride from 1 to --tokens-per-sample, and that 2 or more"
            if length < 2
            else "--stride from 1 to --tokens-per-sample: tokens between windows would be lost",
            found=f"--stride {cfg.stride:,}, --tokens-per-sample {length:,}",
            do="pass both, as in --tokens-per-sample 1024 --stride 512",
        )


def check_reads(longest: int, most: Any) -> None:
    """Refuses windows that are longer than the model takes.

    Args:
        longest: tokens that are read of the longest one.
        most: tokens that the model takes; no integer where there is no end to them.

    Raises:
        ConfigError: saying how long they may be.
    """
    if isinstance(most, int) and longest > most:
        raise ConfigError(
            "windows are longer than the model takes",
            expected=f"--tokens-per-sample up to {most + 1:,}: of a window all but the last token "
            "is read",
            found=f"{longest + 1:,}",
            do=f"pass --tokens-per-sample {most}, and a --stride up to that",
        )
