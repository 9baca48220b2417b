"""One pass over a split: who listens to the scorer, what it leaves behind, what it reports."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fairseq_knnlm.errors import told
from fairseq_knnlm.files import write_json
from fairseq_knnlm.lm.registry import language_model
from fairseq_knnlm.runs.costs import CostMeter
from fairseq_knnlm.runs.experts import make_scorer
from fairseq_knnlm.runs.inputs import Inputs
from fairseq_knnlm.runs.progress import TellsProgress
from fairseq_knnlm.runs.raw_text import RawText
from fairseq_knnlm.runs.receipt import Typed, make_receipt, sealed
from fairseq_knnlm.runs.report import tell
from fairseq_knnlm.runs.results import run_results, table_card
from fairseq_knnlm.runs.save import Saving, open_saving, sample_keys
from fairseq_knnlm.runs.save_blocks import ALONE, BlockSaving, Worker
from fairseq_knnlm.runs.scorer import Blocks, FillsTable, Listener
from fairseq_knnlm.runs.sections import SectionSums, section_rows
from fairseq_knnlm.runs.shares import BatchRange

logger = logging.getLogger(__name__)


class EvaluationRun:
    """One pass over a split.

    Args:
        inputs: options, models, memory.
        sizes: (number of blocks,) tokens of each block, in the order of the text.
        left_out: tokens in blocks that fairseq will drop.
        worker: which part of a datastore is this process's to save.
        text: what figures a word and a byte are taken over, where it is known.
        typed: what fairseq was given, for the receipt of the figures.

    Attributes:
        batch_range: the share of the run that this process has; None where it has all.
    """

    def __init__(
        self,
        inputs: Inputs,
        sizes: np.ndarray,
        left_out: int,
        worker: Worker = ALONE,
        text: RawText | None = None,
        typed: Typed | None = None,
    ) -> None:
        self.inputs = inputs
        self.text = text
        self.typed = typed
        self.left_out = left_out
        self.batch_range: BatchRange | None = None
        options = inputs.options
        listeners: list[Listener] = []
        self.saving: Saving | BlockSaving | None = None
        starts = np.cumsum(sizes) - sizes
        self._whole = int(sizes.sum()) - left_out
        self.table: FillsTable | None = None
        if options.saving.save_knnlm_dstore:
            self.saving = open_saving(inputs, starts, int(sizes.sum()), worker)
            listeners.append(self.saving)
        if options.writing.score_table:
            self.table = FillsTable(Path(options.writing.score_table))
            listeners.append(self.table)
        self.progress: TellsProgress | None = None
        if options.writing.progress_file:
            place = Path(options.writing.progress_file)
            self.progress = TellsProgress(place, int(sizes.sum()))
            listeners.append(self.progress)
        self.blocks = Blocks(starts, inputs.vocabulary.bos)
        self.scorer = make_scorer(inputs, self.blocks, listeners)
        self.scorer.tally.sections = SectionSums(section_rows(sizes))
        if options.writing.table_costs and inputs.memory is not None:
            self.scorer.costs = CostMeter(inputs.memory.experts, inputs.loaded, self._tokens)
        self._warn_of_the_same_split()

    def _tokens(self) -> float:
        """That this process will score, about."""
        share = self.batch_range
        return self._whole if share is None else self._whole * share.batches / share.of_batches

    def _warn_of_the_same_split(self) -> None:
        inputs = self.inputs
        for store in inputs.memory.stores if inputs.memory is not None else ():
            origin = store.manifest.origin
            if origin.split == inputs.split and origin.model == inputs.model:
                logger.warning(
                    "the datastore %s is of a split %r too: where it is the same text, every "
                    "token finds its own entry, and the perplexity says nothing",
                    *(store.path, inputs.split),
                )

    @property
    def texts(self) -> list[range] | None:
        """Which blocks of text are to be read, in stretches that share no batch; None for all."""
        return self.saving.texts if isinstance(self.saving, BlockSaving) else None

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
        key_type = self.inputs.options.datastores.knn_keytype
        lm = language_model(self.inputs.models[0], key_type)
        pad = self.inputs.vocabulary.pad
        self.saving.learn(*sample_keys(lm, pad, self.blocks, batches, to_device))

    def finish(self) -> None:
        """Publishes what was written and reports what was measured.

        Where one thing cannot be published the others are, and what was measured is told.

        Raises:
            KnnlmError: where what was read turns out to be damaged; nothing is published then.
            Exception: the first that publishing raised.
        """
        if self.progress is not None:
            self.progress.tell()
        memory = self.inputs.memory
        for expert in memory.experts.values() if memory is not None else ():
            expert.kind.finish(expert)
        found = run_results(self.inputs, self.scorer, self.left_out, self.batch_range, self.text)
        failures: list[Exception] = []
        publishing = (
            self.publish_datastore,
            partial(self._publish_table, found),
            partial(self._publish_results, found),
        )
        for publish in publishing:
            try:
                publish()
            except Exception as error:
                failures.append(error)
        tell(found, memory.by_kind if memory is not None else ())
        for failure in failures[1:]:
            logger.error(told(failure)[0])
        if failures:
            raise failures[0]

    def publish_datastore(self) -> None:
        """Gives the datastore its name, or says what is missing of it."""
        if self.saving is not None:
            logger.info(self.saving.publish())

    def _publish_table(self, found: dict[str, Any]) -> None:
        if self.table is not None:
            card = table_card(self.inputs, self.scorer, self.table.features, found)
            if self.scorer.costs is not None:
                card["costs"] = self.scorer.costs.told()
            self.table.writer.publish(card)
            logger.info("score table written to %s", self.inputs.options.writing.score_table)

    def _publish_results(self, found: dict[str, Any]) -> None:
        if self.inputs.options.writing.results_json:
            if self.typed is not None:
                found = {**found, "receipt": make_receipt(self.inputs, self.typed)}
            write_json(Path(self.inputs.options.writing.results_json), sealed(found))
