"""A text and the model that computes its keys, read as ``fairseq-eval-lm`` reads them to save."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from fairseq import utils
from fairseq.tasks.language_modeling import LanguageModelingTask

from fairseq_knnlm.datastore import Origin
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.lm.registry import check_model, language_model
from fairseq_knnlm.runs.differences import Computed
from fairseq_knnlm.runs.origins import MAX_TOKENS, reading_flags, words
from fairseq_knnlm.runs.scorer import Blocks
from fairseq_knnlm.tasks import stock
from fairseq_knnlm.tasks.session import Session, open_session
from fairseq_knnlm.tasks.windows import InStretches


class Texts:
    """Opens the texts of blocks, each once.

    Args:
        data: folder that fairseq-preprocess wrote.
        path: the checkpoint.
        flags: further ones of fairseq's.
    """

    def __init__(self, data: str, path: str, flags: Sequence[str]) -> None:
        self._data = data
        self._flags = ["--path", path, *flags]
        self._open: dict[tuple[str, ...], SplitText | None] = {}

    def __call__(self, origin: Origin) -> SplitText | None:
        """The text that a block of this origin is of; None where the data lacks its split.

        Raises:
            KnnlmError: of the kind that fits, where it cannot be read.
        """
        flags = reading_flags(origin)
        known = tuple(words(flags))
        if known not in self._open:
            _check_flags(flags, self._flags)
            try:
                stock.check_data(self._data)
                stock.check_split(self._data, origin.split)
            except ConfigError:
                if not self._open:
                    raise
                self._open[known] = None
            else:
                session = open_session(self._data, [*self._flags, *known])
                self._open[known] = SplitText(session, origin.split)
        return self._open[known]


def _check_flags(known: dict[str, str | None], typed: Sequence[str]) -> None:
    """Refuses flags that the datastore knows better.

    Raises:
        ConfigError: naming one.
    """
    given = {word.split("=")[0] for word in typed}
    for flag, value in known.items():
        if flag in given:
            raise ConfigError(
                f"{flag} is not to be chosen: the datastore is computed again as it was saved",
                expected=f"{flag} {value or ''}, as its manifest says, without being told",
                found=f"{flag} among the arguments",
                do="leave it out",
            )


class SplitText:
    """A split, in the blocks and batches that the flags say; see ``runs.recompute.Text``."""

    def __init__(self, session: Session, split: str) -> None:
        self._session = session
        session.task.load_dataset(split)
        self._dataset = session.task.dataset(split)
        sizes = np.asarray(self._dataset.sizes, dtype=np.int64)
        self.edges = np.append(0, np.cumsum(sizes))
        self._window = session.cfg.eval_lm.context_window
        self._bos = session.task.vocabulary().bos
        data = session.cfg.dataset
        self._batches = {
            "max_tokens": data.max_tokens or MAX_TOKENS,
            "batch_size": data.batch_size,
        }

    @cached_property
    def _inputs(self) -> Any:
        session = self._session
        return session.task.inputs(
            session.models, session.task.context(self._window), self._batches
        )

    @property
    def origin(self) -> Origin:
        """What a datastore that was saved of it now would say of itself."""
        found: Origin = self._inputs.origin
        return found

    @property
    def width(self) -> int:
        """Of the keys."""
        session = self._session
        return check_model(session.models[0], session.task.options.datastores.knn_keytype)

    def values(self, texts: range) -> np.ndarray:
        """The tokens (n,) int64 of blocks of text."""
        first = int(self.edges[texts.start])
        found = np.empty(int(self.edges[texts.stop]) - first, np.int64)
        for number in texts:
            tokens = self._dataset[number]["target"].numpy()
            start, stop = self.edges[number : number + 2] - first
            found[start:stop] = tokens[len(tokens) - (stop - start) :]
        return found

    @torch.no_grad()
    def compute(self, texts: range, *, whole: bool) -> Iterator[Computed]:
        """The entries of blocks of text, in batches of their own; or as one reads all of it."""
        session, task = self._session, self._session.task
        pad = task.target_dictionary.pad()
        lm = language_model(session.models[0], task.options.datastores.knn_keytype)
        blocks = Blocks(self.edges[:-1], self._bos)
        for batch in self._loaded(texts, whole):
            if session.device.type == "cuda":
                batch = utils.move_to_cuda(batch)
            target = batch["target"]
            encoded = lm.encode(batch["net_input"], target.ne(pad))
            target = target[:, -encoded.mask.shape[1] :]
            rows = blocks.rows(batch["id"], encoded.mask, target).cpu().numpy()
            counted = rows >= 0
            assert encoded.keys is not None
            keys = encoded.keys.cpu().numpy()[counted]
            yield Computed(rows[counted], keys, target[encoded.mask].cpu().numpy()[counted])

    def _loaded(self, texts: range, whole: bool) -> Iterator[dict[str, Any]]:
        """Batches by the stock loader, as the task has them loaded."""
        session, task, data = self._session, self._session.task, self._session.cfg.dataset
        longest = utils.resolve_max_positions(*(model.max_positions() for model in session.models))
        dataset = task.in_windows(self._dataset, self._window, longest)
        if not whole:
            dataset = InStretches(dataset, [texts])
        loaded = LanguageModelingTask.eval_lm_dataloader(
            task,
            dataset,
            max_positions=longest,
            num_workers=data.num_workers,
            data_buffer_size=data.data_buffer_size,
            **self._batches,
        )
        return iter(loaded)
