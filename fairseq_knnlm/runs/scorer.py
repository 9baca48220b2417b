"""What fairseq calls: a batch in, hypotheses out.

The language model encodes the batch, the mixture says how likely every target is, that is handed to
fairseq, and whoever listens (datastore, score table, tally) takes what it needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fairseq_knnlm.calibration.writer import ScoreTableWriter
from fairseq_knnlm.errors import ModelError
from fairseq_knnlm.experts.lm import LMExpert, member
from fairseq_knnlm.lm.contexts import Contexts, Encoded
from fairseq_knnlm.lm.contract import LanguageModel
from fairseq_knnlm.lm.registry import language_model
from fairseq_knnlm.mixture.model import MixtureLM, Scores, Watch
from fairseq_knnlm.runs.costs import CostMeter
from fairseq_knnlm.runs.sections import SectionSums
from fairseq_knnlm.runs.sums import ExactSum


@dataclass(frozen=True)
class Blocks:
    """Where the blocks of a split lie in its text.

    Attributes:
        starts: (number of blocks,) int64, row of each block's first token.
        bos: the id that ``--add-bos-token`` puts before a block and fairseq does not count.
    """

    starts: np.ndarray
    bos: int | None = None

    def rows(self, ids: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        """The row of each scored token, (N,) int64; -1 for an added beginning of sentence.

        Args:
            ids: (B,) of the blocks.
            mask: (B, T) bool, the positions that are scored.
            targets: (B, T) int64.
        """
        offsets = _offsets(mask, targets, self.bos)
        starts = torch.from_numpy(self.starts[ids.cpu().numpy()]).to(mask.device)
        return (starts[:, None] + offsets).masked_fill(offsets < 0, -1)[mask]

    def texts(self, mask: Tensor) -> Tensor | None:
        """None: all blocks are one text."""
        return None


@dataclass(frozen=True)
class Sentences:
    """Every sentence of a batch is a text of its own, whose rows count from 0.

    Attributes:
        bos: as in ``Blocks``.
    """

    bos: int | None = None

    def rows(self, ids: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        """The row of each scored token, (N,) int64; -1 for an added beginning of sentence."""
        return _offsets(mask, targets, self.bos)[mask]

    def texts(self, mask: Tensor) -> Tensor | None:
        """The sentence of each scored token, (N,) int64."""
        return mask.nonzero()[:, 0]


def _offsets(mask: Tensor, targets: Tensor, bos: int | None) -> Tensor:
    """(B, T) int64, the place of each scored token in its block or sentence; -1 of an added one.

    Nowhere but at the very beginning is that token an added one; the hub interface adds none.
    """
    places = mask.cumsum(dim=1) - 1
    if bos is None:
        return places
    added = ((places == 0) & mask & (targets == bos)).any(dim=1)
    return places - added[:, None].long()


@dataclass(frozen=True)
class Batch:
    """A scored batch, as listeners see it.

    Attributes:
        rows: (N,) int64 row in the split; -1 where the token does not count.
        targets: (N,) int64.
        contexts: N, with keys where they were captured.
        scores: of the targets; the language model's own are its first column, ``lm``.
    """

    rows: np.ndarray
    targets: Tensor
    contexts: Contexts
    scores: Scores

    @property
    def base(self) -> Tensor:
        """(N,) float32, natural log, log p_LM."""
        return self.scores.columns["lm"][:, 0]

    @property
    def mixed(self) -> Tensor:
        """(N,) float32, natural log, of the mixture; the same without experts."""
        return self.scores.log_probs


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
        scores = batch.scores
        self.features |= set(scores.features)
        columns = {"token": batch.targets.int(), "context": batch.contexts.before[:, 0].int()}
        columns |= {"lm": batch.base, **scores.features}
        # Experts that only name features have no columns of their own.
        columns |= {name: x for name, x in scores.columns.items() if name != "lm" and x.shape[1]}
        counted = batch.rows >= 0
        self.writer.write(
            {"row": batch.rows[counted]}
            | {name: column.cpu().numpy()[counted] for name, column in columns.items()}
        )


@dataclass
class Tally:
    """Sums over a run, in natural log and seconds; ``sections`` where it reads a text."""

    tokens: int = 0
    base: ExactSum = field(default_factory=ExactSum)
    mixed: ExactSum = field(default_factory=ExactSum)
    impossible: int = 0
    seconds: float = 0.0
    sections: SectionSums | None = None

    def take(self, batch: Batch) -> None:
        counted = batch.rows >= 0
        base, mixed = (some.float().cpu().numpy()[counted] for some in (batch.base, batch.mixed))
        self.tokens += len(mixed)
        self.base.add(base)
        self.mixed.add(mixed)
        self.impossible += int(np.isneginf(mixed).sum())
        if self.sections is not None:
            self.sections.take(batch.rows[counted], base, mixed)


#: A mixture around the language model.
MakeMixture = Callable[[LMExpert], MixtureLM]


class KnnScorer:
    """Scores references; has the interface of fairseq's ``SequenceScorer``.

    Args:
        pad: the padding token's id.
        eos: the id that ends a sentence; ``fairseq-generate`` reads it.
        blocks: where the blocks lie; left out, every sentence is a text of its own.
        key_type: capture these keys, or None for none.
        mixture: makes the mixture of the language model; left out, there are no experts.
        others: further language models, by the name of their expert.
        mixture_from: where the mixer comes from, in words.
        listeners: told of every batch.
        watch: is shown every prediction.
    """

    def __init__(
        self,
        pad: int,
        eos: int,
        *,
        blocks: Blocks | Sentences | None = None,
        key_type: str | None = None,
        mixture: MakeMixture = MixtureLM,
        others: Mapping[str, LanguageModel] | None = None,
        mixture_from: str = "",
        listeners: Sequence[Listener] = (),
        watch: Watch | None = None,
    ) -> None:
        self.watch = watch
        self.pad = pad
        self.eos = eos
        self.blocks = blocks if blocks is not None else Sentences()
        self.key_type = key_type
        self.mixture_from = mixture_from
        self.tally = Tally()
        self.listeners = (self.tally, *listeners)
        self.lm = LMExpert()
        self.mixture = mixture(self.lm)
        self._others = dict(others or {})
        #: Gives the batch after the one to be scored, or None; set where others search, so that
        #: they do so while this process computes that batch's contexts.
        self.following: Callable[[], dict[str, Any] | None] | None = None
        self._next: tuple[Contexts, Tensor, Tensor] | None = None
        #: Measures what the columns of a score table cost, where that is asked.
        self.costs: CostMeter | None = None

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
        contexts, targets, mask = self._in_turn(models, sample)
        if self.costs is not None:
            read = time.perf_counter()
            self.costs.take(self.mixture, contexts, targets, read - started)
            started += time.perf_counter() - read  # the batch is not charged for it
        scores = self.mixture.score(contexts, targets, self.watch)
        batch = Batch(contexts.rows.cpu().numpy(), targets, contexts, scores)
        _check_numbers(batch.base)
        for listener in self.listeners:
            listener.take(batch)
        self.tally.seconds += time.perf_counter() - started
        mixed = scores.log_probs
        if isinstance(self.blocks, Blocks):
            # fairseq-eval-lm would leave out infinite scores, and fail to say so.
            mixed = mixed.clamp_min(torch.finfo(mixed.dtype).min)
        return _hypotheses(targets, mask, mixed)

    @torch.no_grad()
    def catch_up(self, models: Sequence[nn.Module], sample: dict[str, Any]) -> None:
        """Reads a batch that stands before those to be scored; nobody is told of it.

        Args:
            models: as for ``generate``.
            sample: the batch.
        """
        contexts, targets, _ = self._understood(models, sample)
        self.mixture.catch_up(contexts, targets)

    def _in_turn(
        self, models: Sequence[nn.Module], sample: dict[str, Any]
    ) -> tuple[Contexts, Tensor, Tensor]:
        """What is understood of a batch; where others search, the next one is begun before."""
        if self.following is None:
            return self._understood(models, sample)
        ours = self._begin(models, sample) if self._next is None else self._next
        following = self.following()
        # One of several processes may end with a batch of nothing.
        self._next = self._begin(models, following) if following else None
        return ours

    def _begin(
        self, models: Sequence[nn.Module], sample: dict[str, Any]
    ) -> tuple[Contexts, Tensor, Tensor]:
        found = self._understood(models, sample)
        self.mixture.ahead(found[0], self.watch)
        return found

    def _understood(
        self, models: Sequence[nn.Module], sample: dict[str, Any]
    ) -> tuple[Contexts, Tensor, Tensor]:
        """The N contexts that are scored, what came after each, and where in the batch they are."""
        self.lm.models = self._read(models)
        target = sample["target"]
        contexts, mask = self._contexts(sample, target.ne(self.pad))
        return contexts, target[:, -mask.shape[1] :][mask], mask

    def _read(self, models: Sequence[nn.Module]) -> tuple[LanguageModel, ...]:
        if len(models) > 1 and self.key_type is not None:
            raise ModelError(
                "a datastore belongs to one language model",
                expected="one checkpoint in --path",
                found=f"{len(models)}",
                do="evaluate them one by one",
            )
        return tuple(language_model(model, self.key_type) for model in models)

    def _contexts(self, sample: dict[str, Any], mask: Tensor) -> tuple[Contexts, Tensor]:
        """The contexts of the scored positions, and the mask as far as these reach."""
        first, *more = self.lm.models
        others = self._others | {member("lm", n): lm for n, lm in enumerate(more, start=1)}
        encoded: Encoded = first.encode(sample["net_input"], mask)
        width = encoded.mask.shape[1]
        contexts = Contexts(
            encoded.features,
            encoded.keys,
            encoded.before,
            self.blocks.rows(sample["id"], encoded.mask, sample["target"][:, -width:]),
            self.blocks.texts(encoded.mask),
            {name: lm.encode(sample["net_input"], mask).features for name, lm in others.items()},
        )
        return contexts, encoded.mask


def _check_numbers(log_probs: Tensor) -> None:
    if log_probs.isnan().any():
        raise ModelError(
            "the language model gives probabilities that are no numbers",
            expected="a probability for each token",
            found="NaN",
            do="leave --fp16 out, or check the checkpoint",
        )


def _hypotheses(targets: Tensor, mask: Tensor, log_probs: Tensor) -> list[list[dict[str, Any]]]:
    """Cuts the flat scores into fairseq's hypotheses, one a sentence."""
    lengths = mask.sum(dim=1).tolist()
    pairs = zip(targets.split(lengths), log_probs.split(lengths), strict=True)
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
