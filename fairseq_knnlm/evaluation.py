"""Scorers made of flags, models and memory, and one pass of ``fairseq-eval-lm`` with such a scorer:
who listens to it, what it leaves behind, what it reports.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fairseq_knnlm.datastore import DatastoreWriter, Origin
from fairseq_knnlm.experts import DISTANCE_RANKS, TEMPERATURES, KnnExpert
from fairseq_knnlm.files import write_json
from fairseq_knnlm.index import wants_gpu
from fairseq_knnlm.indexing import IndexBuilder, Wishes
from fairseq_knnlm.lm import TargetLM, check_model, dictionary_fingerprint, model_fingerprint
from fairseq_knnlm.memory import Memory
from fairseq_knnlm.recipes import choose
from fairseq_knnlm.report import closing_lines, results
from fairseq_knnlm.saving import Saving
from fairseq_knnlm.scorer import Blocks, FillsTable, KnnScorer, Listener
from fairseq_knnlm.versions import versions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """What the task knows once its models are loaded.

    Attributes:
        args: the flags, checked.
        models: fairseq's language models, weights loaded.
        dictionary: fairseq's dictionary of the targets.
        split: the split loaded last.
        memory: what ``--knnlm`` opened.
    """

    args: Any
    models: Sequence[Any]
    dictionary: Any
    split: str
    memory: Memory | None


def make_scorer(
    setting: Setting, blocks: Blocks | None = None, listeners: Sequence[Listener] = ()
) -> KnnScorer:
    """A scorer, once the models' weights are known to be those of the datastore.

    Args:
        setting: flags, models, memory.
        blocks: where the blocks lie, or None where rows do not matter.
        listeners: told of every batch.

    Raises:
        DatastoreError: where the datastore is of another checkpoint.
    """
    args, memory = setting.args, setting.memory
    key_type = str(args.knn_keytype) if memory or args.save_knnlm_dstore else None
    knn = None
    if memory is not None:
        memory.store.check_origin(model=model_fingerprint(setting.models[0]))
        for_table = bool(args.score_table and blocks is not None)
        knn = KnnExpert(memory.retriever, args.k, memory.temperature, for_table=for_table)
    return KnnScorer(
        setting.dictionary.pad(),
        setting.dictionary.eos(),
        blocks=blocks,
        key_type=key_type,
        knn=knn,
        lmbda=memory.lmbda if memory else 0.0,
        listeners=listeners,
    )


class EvaluationRun:
    """One pass over a split.

    Args:
        setting: flags, models, memory.
        sizes: (number of blocks,) tokens of each block, in the order of the text.
        left_out: tokens in blocks that fairseq will drop.
        context_window: tokens of context before each block.
    """

    def __init__(
        self, setting: Setting, sizes: np.ndarray, left_out: int, context_window: int
    ) -> None:
        self.setting = setting
        self.left_out = left_out
        args = setting.args
        listeners: list[Listener] = []
        self.saving: Saving | None = None
        self.table: FillsTable | None = None
        if args.save_knnlm_dstore:
            self.saving = _saving(setting, int(sizes.sum()), context_window)
            listeners.append(self.saving)
        if args.score_table:
            self.table = FillsTable(Path(args.score_table))
            listeners.append(self.table)
        bos = setting.dictionary.bos() if args.add_bos_token else None
        self.blocks = Blocks(np.cumsum(sizes) - sizes, bos)
        self.scorer = make_scorer(setting, self.blocks, listeners)

    @property
    def sample_every(self) -> int:
        """Call ``learn`` first, on every n-th batch; 0 where there is nothing to learn."""
        builder = self.saving.builder if self.saving is not None else None
        return max(1, builder.rows // builder.sample_rows) if builder is not None else 0

    def learn(self, batches: Iterable[Any], to_device: Callable[[Any], Any]) -> None:
        """Trains the index that keys will be streamed into.

        Args:
            batches: fairseq's, a sample of the split.
            to_device: moves one to the model.
        """
        assert self.saving is not None
        model, key_type = self.setting.models[0], str(self.setting.args.knn_keytype)
        lm = TargetLM(model, self.setting.dictionary.pad(), key_type)
        self.saving.learn(lm, self.blocks, batches, to_device)

    def finish(self) -> None:
        """Publishes what was written and reports what was measured."""
        args, found = self.setting.args, self._results()
        if self.saving is not None:
            path = self.saving.publish()
            logger.info("saved %s entries in %s", f"{found['tokens']:,}", path)
        if self.table is not None:
            self.table.writer.publish(_card(self.setting, found))
            logger.info("score table written to %s", args.score_table)
        if args.results_json:
            write_json(Path(args.results_json), found)
        if found["tokens_impossible"]:
            logger.warning(
                "%s tokens have probability 0: the loss is infinite, while fairseq's own figure "
                "below leaves them out",
                f"{found['tokens_impossible']:,}",
            )
        for line in closing_lines(found):
            logger.info(line)

    def _results(self) -> dict[str, Any]:
        tally, knn, memory = self.scorer.tally, self.scorer.knn, self.setting.memory
        found = results(
            tokens=tally.tokens,
            base_log_prob=tally.base,
            log_prob=tally.mixed,
            seconds=tally.seconds,
            impossible=tally.impossible,
            left_out=self.left_out,
        )
        if memory is not None and knn is not None:
            found |= {
                "lambda": memory.lmbda,
                "temperature": memory.temperature,
                "mixture_from": memory.mixture_from,
                "k": knn.k,
                "search_seconds": knn.search_seconds,
                "index": memory.retriever.index.card.describe(),
                "distances": memory.retriever.distances,
                "datastore": str(memory.store.path),
                "entries": len(memory.store),
            }
        return found | {"split": self.setting.split, "versions": versions()}


def _saving(setting: Setting, rows: int, context_window: int) -> Saving:
    args, model = setting.args, setting.models[0]
    origin = Origin(
        model=model_fingerprint(model),
        dictionary=dictionary_fingerprint(setting.dictionary.symbols),
        vocabulary=len(setting.dictionary),
        key_type=str(args.knn_keytype),
        split=setting.split,
        context={
            "tokens_per_sample": args.tokens_per_sample,
            "context_window": context_window,
            "sample_break_mode": str(args.sample_break_mode),
        },
        versions=versions(),
    )
    width = check_model(model, origin.key_type)
    builder = _index_builder(args, rows, width) if args.no_save_keys else None
    key_dtype = None if args.no_save_keys else "float32" if args.dstore_fp32 else "float16"
    return Saving(DatastoreWriter(Path(args.dstore_mmap), rows, width, origin, key_dtype), builder)


def _index_builder(args: Any, rows: int, width: int) -> IndexBuilder:
    """Of the index that keys are streamed into."""
    gpu, budget = wants_gpu(args.knn_device), args.max_bytes_per_key
    recipe = choose(args.recipe, rows, width, gpu=gpu, max_bytes=budget, lists=True)
    builder = IndexBuilder(recipe, width, rows, Wishes(nprobe=args.probe))
    builder.check_any_order()
    return builder


def _card(setting: Setting, found: dict[str, Any]) -> dict[str, Any]:
    """What the score table says of itself: the results, and what its columns are."""
    card = {**found, "model": model_fingerprint(setting.models[0])}
    if setting.memory is not None:
        card |= {
            "datastore": setting.memory.store.fingerprint,
            "temperatures": TEMPERATURES,
            "distance_ranks": [rank for rank in DISTANCE_RANKS if rank <= found["k"]],
        }
    return card
