"""What fairseq calls: a batch in, hypotheses out.

The language model and the neighbours each say how likely every target is, the mixture of the two
is handed to fairseq, and whoever listens (datastore, score table, tally) takes what it needs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fairseq_knnlm.errors import ModelError
from fairseq_knnlm.experts import KnnExpert, Opinion
from fairseq_knnlm.lm import Scored, TargetLM
from fairseq_knnlm.mixing import fixed_log_weights, mix
from fairseq_knnlm.tables import ScoreTableWriter


@dataclass(frozen=True)
class Blocks:
    """Where the blocks of a split lie in its text.

    Attributes:
        starts: (number of blocks,) int64, row of each block's first token.
        bos: the id that ``--add-bos-token`` puts before a block and fairseq does not count.
    """

    starts: np.ndarray
    bos: int | None = None

    def rows(self, ids: Tensor, scored: Scored) -> np.ndarray:
        """The row of each scored token, (N,) int64; -1 for an added beginning of sentence."""
        mask = scored.mask
        offsets = mask.cumsum(dim=1) - (1 if self.bos is None else 2)
        starts = torch.from_numpy(self.starts[ids.cpu().numpy()]).to(mask.device)
        rows = (starts[:, None] + offsets)[mask]
        if self.bos is not None:
            rows = rows.masked_fill(scored.targets == self.bos, -1)
        return rows.cpu().numpy()


@dataclass(frozen=True)
class Batch:
    """A scored batch, as listeners see it. Every array has N rows.

    Attributes:
        rows: int64 row in the split; -1 where the token does not count.
        scored: targets, features and keys.
        base: float32, log p_LM.
        mixed: float32, log p of the mixture (the same without neighbours).
        knn: what the neighbours said.
    """

    rows: np.ndarray
    scored: Scored
    base: Tensor
    mixed: Tensor
    knn: Opinion | None


class Listener(Protocol):
    """Takes every scored batch."""

    def take(self, batch: Batch) -> None: ...


class FillsTable:
    """Writes every token's row of the score table."""

    def __init__(self, path: Path) -> None:
        self.writer = ScoreTableWriter(path)

    def take(self, batch: Batch) -> None:
        columns = {"token": batch.scored.targets.int(), "lm": batch.base}
        if batch.knn is not None:
            columns |= {"knn": batch.knn.log_probs, **batch.knn.columns}
        counted = batch.rows >= 0
        self.writer.write(
            {"row": batch.rows[counted]}
            | {name: column.cpu().numpy()[counted] for name, column in columns.items()}
        )


@dataclass
class Tally:
    """Sums over a run, in natural log and seconds."""

    tokens: int = 0
    base: float = 0.0
    mixed: float = 0.0
    impossible: int = 0
    seconds: float = field(default=0.0)

    def take(self, batch: Batch) -> None:
        counted = torch.from_numpy(batch.rows >= 0).to(batch.base.device)
        mixed = batch.mixed[counted]
        self.tokens += len(mixed)
        self.base += float(batch.base[counted].double().sum())
        self.mixed += float(mixed.double().sum())
        self.impossible += int(torch.isneginf(mixed).sum())


class KnnScorer:
    """Scores references; has the interface of fairseq's ``SequenceScorer``.

    Args:
        pad: the padding token's id.
        eos: the id that ends a sentence; ``fairseq-generate`` reads it.
        blocks: where the blocks lie, or None where rows do not matter.
        key_type: capture these keys, or None for none.
        knn: the neighbours, or None for the language model alone.
        lmbda: weight of the neighbours.
        listeners: told of every batch.
    """

    def __init__(
        self,
        pad: int,
        eos: int,
        *,
        blocks: Blocks | None = None,
        key_type: str | None = None,
        knn: KnnExpert | None = None,
        lmbda: float = 0.0,
        listeners: Sequence[Listener] = (),
    ) -> None:
        self.pad = pad
        self.eos = eos
        self.blocks = blocks
        self.key_type = key_type
        self.knn = knn
        self.log_weights = torch.tensor(fixed_log_weights(lmbda), dtype=torch.float32)
        self.tally = Tally()
        self.listeners = (self.tally, *listeners)

    @torch.no_grad()
    def generate(
        self, models: Sequence[nn.Module], sample: dict[str, Any], **_: Any
    ) -> list[list[dict[str, Any]]]:
        """Scores a batch of fairseq's.

        Args:
            models: one language model, or several for the mean of their probabilities.
            sample: the batch, with ``net_input`` and ``target``.

        Returns:
            For each sentence one hypothesis, with ``tokens``, ``positional_scores`` (natural
            log) and their mean ``score``.

        Raises:
            ModelError: where keys are needed of an ensemble.
        """
        started = time.perf_counter()
        scored, base = self._base(models, sample)
        opinion = self.knn.opinion(scored) if self.knn is not None else None
        mixed = base if opinion is None else self._mix(base, opinion)
        if self.blocks is not None:
            rows = self.blocks.rows(sample["id"], scored)
        else:
            rows = np.zeros(len(base), np.int64)
        batch = Batch(rows, scored, base, mixed, opinion)
        for listener in self.listeners:
            listener.take(batch)
        self.tally.seconds += time.perf_counter() - started
        return _hypotheses(scored, mixed)

    def _base(self, models: Sequence[nn.Module], sample: dict[str, Any]) -> tuple[Scored, Tensor]:
        if len(models) > 1 and self.key_type is not None:
            raise ModelError(
                "a datastore belongs to one language model",
                expected="one checkpoint in --path",
                found=f"{len(models)}",
                do="evaluate them one by one",
            )
        columns = []
        for model in models:
            lm = TargetLM(model, self.pad, self.key_type)
            scored = lm.score(sample)
            columns.append(lm.target_log_probs(scored))
        mean = torch.logsumexp(torch.stack(columns), dim=0) - math.log(len(columns))
        return scored, mean

    def _mix(self, base: Tensor, opinion: Opinion) -> Tensor:
        available = torch.stack([torch.ones_like(opinion.available), opinion.available], dim=1)
        log_probs = torch.stack([base, opinion.log_probs], dim=1)
        return mix(log_probs, self.log_weights.to(base.device), available)


def _hypotheses(scored: Scored, log_probs: Tensor) -> list[list[dict[str, Any]]]:
    """Cuts the flat scores into fairseq's hypotheses, one a sentence."""
    lengths = scored.mask.sum(dim=1).tolist()
    pairs = zip(scored.targets.split(lengths), log_probs.split(lengths), strict=True)
    return [
        [
            {
                "tokens": tokens,
                "score": scores.mean(),
                "attention": None,
                "alignment": None,
                "positional_scores": scores,
            }
        ]
        for tokens, scores in pairs
    ]
