"""Sections of a text, scored again: in the batches of the whole run, after those that count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from fairseq import utils
from fairseq.data import BaseWrapperDataset
from fairseq.tasks.language_modeling import LanguageModelingTask

from fairseq_knnlm.calibration.sections import Sections
from fairseq_knnlm.runs.experts import make_scorer
from fairseq_knnlm.runs.inputs import Inputs
from fairseq_knnlm.runs.replay import runs_of
from fairseq_knnlm.runs.scorer import Blocks, KnnScorer
from fairseq_knnlm.runs.sections import SectionSums, section_rows
from fairseq_knnlm.tasks import stock
from fairseq_knnlm.tasks.raw_text import text_of
from fairseq_knnlm.tasks.session import Session, open_session
from fairseq_knnlm.tasks.shares import batches_before


class BatchesWith(BaseWrapperDataset):
    """A split of which fairseq gets the batches that hold some of its blocks, and a few before.

    They are whole batches, so that what is computed of them is the same to the last bit. Where that
    would be far more than is wanted, as in batches that go by the length of their blocks, it is of
    each batch what is wanted alone.

    Args:
        dataset: the whole split, as one process reads it.
        blocks: that are wanted.
        looks_back: tokens before them that must have been read; None for all.

    Attributes:
        before: batches that hold those, once fairseq has asked for batches.
        whole: whether they are batches of the whole run.
    """

    def __init__(self, dataset: Any, blocks: range, looks_back: int | None) -> None:
        super().__init__(dataset)
        self.before = 0
        self.whole = True
        self._blocks = blocks
        self._looks_back = looks_back

    def batch_by_size(self, indices: Any, *sizes: Any, **named: Any) -> Sequence[Any]:
        """The batches, those before them first."""
        batches = [list(one) for one in self.dataset.batch_by_size(indices, *sizes, **named)]
        tokens = np.array([sum(int(self.dataset.size(one)) for one in some) for some in batches])
        wanted = [[one for one in some if one in self._blocks] for some in batches]
        holding = [number for number, some in enumerate(wanted) if some]
        if not holding:
            return []
        least = sum(int(self.dataset.size(one)) for one in self._blocks)
        first, last = holding[0], holding[-1] + 1
        if tokens[first:last].sum() > 2 * least + 2 * tokens.max():
            self.whole = False
            return [wanted[number] for number in holding]
        looks_back = self._looks_back
        self.before = first if looks_back is None else batches_before(tokens[:first], looks_back)
        return batches[first - self.before : last]


class TextAgain:
    """A split, and what scores it, opened as a receipt says; see ``runs.replay.Again``.

    Args:
        data: folder that fairseq-preprocess wrote.
        split: of it.
        flags: as they are typed.

    Raises:
        KnnlmError: of the kind that fits what is wrong.
    """

    def __init__(self, data: str, split: str, flags: Sequence[str]) -> None:
        stock.check_data(data)
        stock.check_split(data, split)
        self._session: Session = open_session(data, flags)
        task = self._session.task
        task.load_dataset(split)
        self._dataset = task.dataset(split)
        self._sizes = np.asarray(self._dataset.sizes, dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self.rows = section_rows(self._sizes)
        self.whole = True
        most = self._session.cfg.dataset.max_tokens
        self.left_out: int = task.left_out(self._dataset, self._longest, most)
        self.text = text_of(self._session.cfg, task, self._dataset, split, self.left_out)

    @property
    def inputs(self) -> Inputs:
        """Options, models and memory."""
        session = self._session
        window, data = session.cfg.eval_lm.context_window, session.cfg.dataset
        batches = {"max_tokens": data.max_tokens, "batch_size": data.batch_size}
        found: Inputs = session.task.inputs(session.models, session.task.context(window), batches)
        return found

    def scorer(self) -> KnnScorer:
        """One that has read nothing yet."""
        bos = self._session.task.vocabulary().bos
        scorer = make_scorer(self.inputs, Blocks(self._starts, bos))
        scorer.tally.sections = SectionSums(self.rows)
        return scorer

    def score(self, sections: Sequence[int]) -> Iterator[tuple[range, Sections]]:
        """Scores sections again.

        Args:
            sections: their numbers, ascending.

        Yields:
            Those that follow each other, with the sums of all sections; others than these are in
            part there.
        """
        for some in runs_of(sections):
            scorer = self.scorer()
            first, last = np.searchsorted(self._starts, self.rows[[some.start, some.stop]])
            part = BatchesWith(
                self._as_read, range(int(first), int(last)), scorer.mixture.looks_back
            )
            loaded = self._loaded(part)
            self.whole &= part.whole
            catch_up = partial(scorer.catch_up, self._session.models)
            for number, batch in enumerate(loaded):
                if self._session.device.type == "cuda":
                    batch = utils.move_to_cuda(batch)
                if number < part.before:
                    catch_up(batch)
                else:
                    scorer.generate(self._session.models, batch)
            assert scorer.tally.sections is not None
            yield some, scorer.tally.sections.sections
        memory = self.inputs.memory
        for expert in memory.experts.values() if memory is not None else ():
            expert.kind.finish(expert)

    @property
    def _longest(self) -> Any:
        models = self._session.models
        return utils.resolve_max_positions(*(model.max_positions() for model in models))

    @property
    def _as_read(self) -> Any:
        window = self._session.cfg.eval_lm.context_window
        return self._session.task.as_read(self._dataset, window, self._longest)

    def _loaded(self, part: Any) -> Iterator[dict[str, Any]]:
        """Batches by the stock loader."""
        data = self._session.cfg.dataset
        return iter(
            LanguageModelingTask.eval_lm_dataloader(
                self._session.task,
                part,
                max_tokens=data.max_tokens,
                batch_size=data.batch_size,
                max_positions=self._longest,
                num_workers=data.num_workers,
                data_buffer_size=data.data_buffer_size,
            )
        )
