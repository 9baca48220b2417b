"""What fairseq calls: a batch in, hypotheses out.

The language model says how likely every target is, the panel of experts mixes its word with theirs,
the mixture is handed to fairseq, and whoever listens (datastore, score table, tally) takes what it
needs.
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

from fairseq_knnlm.calibration.writer import ScoreTableWriter
from fairseq_knnlm.errors import ModelError
from fairseq_knnlm.experts.knn import Opinion, Passage
from fairseq_knnlm.lm.transformer import Scored, TargetLM
from fairseq_knnlm.mixture.model import Panel


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

    def texts(self, scored: Scored) -> Tensor | None:
        """None: all blocks are one text."""
        return None


@dataclass(frozen=True)
class Sentences:
    """Every sentence of a batch is a text of its own, whose rows count from 0.

    Attributes:
        bos: as in ``Blocks``.
    """

    bos: int | None = None

    def rows(self, ids: Tensor, scored: Scored) -> np.ndarray:
        """The row of each scored token, (N,) int64; -1 for an added beginning of sentence."""
        counted = scored.mask.clone()
        if self.bos is not None:
            counted[scored.mask] = scored.targets != self.bos
        rows = (counted.cumsum(dim=1) - 1).masked_fill(~counted, -1)
        return rows[scored.mask].cpu().numpy()

    def texts(self, scored: Scored) -> Tensor | None:
        """The sentence of each scored token, (N,) int64."""
        return scored.mask.nonzero()[:, 0]


@dataclass(frozen=True)
class Batch:
    """A scored batch, as listeners see it. Every array has N rows.

    Attributes:
        rows: int64 row in the split; -1 where the token does not count.
        scored: targets, features and keys.
        base: float32, log p_LM.
        mixed: float32, log p of the mixture (the same without experts).
        opinions: what each expert said, by its name.
    """

    rows: np.ndarray
    scored: Scored
    base: Tensor
    mixed: Tensor
    opinions: dict[str, Opinion]


class Listener(Protocol):
    """Takes every scored batch."""

    def take(self, batch: Batch) -> None: ...


class FillsTable:
    """Writes every token's row of the score table.

    Attributes:
        features: names of the columns that are features.
    """

    def __init__(self, path: Path) -> None:
        self.writer = ScoreTableWriter(path)
        self.features: set[str] = set()

    def take(self, batch: Batch) -> None:
        scored = batch.scored
        columns = {"token": scored.targets.int(), "context": scored.context[:, 0].int()}
        columns["lm"] = batch.base
        for name, opinion in batch.opinions.items():
            self.features |= set(opinion.features)
            columns |= opinion.features
            if opinion.log_probs.shape[1]:
                columns[name] = opinion.log_probs
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
        blocks: where the blocks lie; left out, every sentence is a text of its own.
        key_type: capture these keys, or None for none.
        panel: experts and their mixer.
        mixture_from: where the mixer comes from, in words.
        listeners: told of every batch.
    """

    def __init__(
        self,
        pad: int,
        eos: int,
        *,
        blocks: Blocks | Sentences | None = None,
        key_type: str | None = None,
        panel: Panel | None = None,
        mixture_from: str = "",
        listeners: Sequence[Listener] = (),
    ) -> None:
        self.pad = pad
        self.eos = eos
        self.blocks = blocks if blocks is not None else Sentences()
        self.key_type = key_type
        self.panel = panel if panel is not None else Panel()
        self.mixture_from = mixture_from
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
            ModelError: where keys are needed of an ensemble, or a probability is none.
        """
        started = time.perf_counter()
        scored, base = self._base(models, sample)
        rows = self.blocks.rows(sample["id"], scored)
        places = torch.from_numpy(rows).to(base.device)
        passage = Passage(scored, places, sample, self.blocks.texts(scored))
        verdict = self.panel.judge(base, passage)
        mixed = verdict.log_probs
        batch = Batch(rows, scored, base, mixed, verdict.opinions)
        for listener in self.listeners:
            listener.take(batch)
        self.tally.seconds += time.perf_counter() - started
        if isinstance(self.blocks, Blocks):
            # fairseq-eval-lm would leave out infinite scores, and fail to say so.
            mixed = mixed.clamp_min(torch.finfo(mixed.dtype).min)
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
        if mean.isnan().any():
            raise ModelError(
                "the language model gives probabilities that are no numbers",
                expected="a probability for each token",
                found="NaN",
                do="leave --fp16 out, or check the checkpoint",
            )
        return scored, mean


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
