"""Saving: the keys and values of a forward pass go into a datastore, or into an index at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace
from tqdm import tqdm

from fairseq_knnlm.background import Behind
from fairseq_knnlm.datastore import (
    INDEX,
    DatastoreWriter,
    Documents,
    open_datastore,
)
from fairseq_knnlm.datastore.making import Making, Plan
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.index.build import BuildOptions, IndexBuilder
from fairseq_knnlm.index.codes import can_be_cut
from fairseq_knnlm.index.device import wants_gpu
from fairseq_knnlm.index.recipes import choose
from fairseq_knnlm.index.specification import check_factory
from fairseq_knnlm.index.storage import save as save_index
from fairseq_knnlm.lm.contexts import Contexts, Encoded
from fairseq_knnlm.lm.contract import LanguageModel
from fairseq_knnlm.runs.append import plan_onto
from fairseq_knnlm.runs.documents import find_documents, keep_documents
from fairseq_knnlm.runs.inputs import Inputs
from fairseq_knnlm.runs.options import Options, WritingOptions
from fairseq_knnlm.runs.save_blocks import BlockSaving, Worker, check_shards, cut
from fairseq_knnlm.runs.scorer import Batch, Blocks
from fairseq_knnlm.runs.streaming import Streaming

logger = logging.getLogger(__name__)

#: Keys that are gathered before they are added to an index, which is faster for many.
KEYS_AT_A_TIME = 65_536


class Saving:
    """Takes every scored batch and writes it, while the next one is computed.

    Args:
        writer: of the datastore.
        find: the documents of its values (N,), once all of them are written.
        builder: of the index that the keys are streamed into; None where they are only written.
    """

    def __init__(
        self,
        writer: DatastoreWriter,
        find: Callable[[np.ndarray], Documents],
        builder: IndexBuilder | None = None,
    ) -> None:
        self.builder = builder
        self._writer = writer
        self._find = find
        self._write = Behind(writer.write)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def learn(self, rows: np.ndarray, keys: np.ndarray) -> None:
        """Trains the index on keys (n, D) float32, drawn evenly, of these rows (n,)."""
        assert self.builder is not None
        self.builder.train(keys, rows)

    def take(self, batch: Batch) -> None:
        rows, keys = _entries(batch.rows, batch.contexts)
        self._write(rows, keys, batch.targets.cpu().numpy()[batch.rows >= 0])
        if self.builder is not None:
            self._waiting.append((rows, keys))
            if sum(len(rows) for rows, _ in self._waiting) >= KEYS_AT_A_TIME:
                self._add(self.builder)

    def publish(self) -> str:
        """Gives the datastore its name, once everything is in it; says what was saved."""
        self._write.wait()
        return f"saved {self._writer.rows:,} entries in {self._publish()}"

    def _publish(self) -> Path:
        if self.builder is None:
            return self._writer.publish(self._add_documents)
        if self._waiting:
            self._add(self.builder)
        index, card = self.builder.finish()

        def add_files(folder: Path, fingerprint: str) -> None:
            save_index(index, card, folder / INDEX, fingerprint)
            self._add_documents(folder, fingerprint)

        return self._writer.publish(add_files)

    def _add_documents(self, folder: Path, _: str) -> None:
        keep_documents(open_datastore(folder, load_keys=False), self._find)

    def _add(self, builder: IndexBuilder) -> None:
        rows, keys = _joined(self._waiting)
        self._waiting.clear()
        builder.see(keys, rows)
        builder.add(keys, rows)


def sample_keys(
    lm: LanguageModel,
    pad: int,
    blocks: Blocks,
    batches: Iterable[Any],
    to_device: Callable[[Any], Any],
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (n,) int64 and keys (n, D) float32 of some batches of a text.

    Args:
        lm: reads the batches.
        pad: the padding token's id.
        blocks: where the blocks lie.
        batches: fairseq's, drawn evenly from the split.
        to_device: moves a batch to the model.
    """
    sampled = []
    for sample in tqdm(batches, desc="sampling keys", unit=" batches"):
        sample = to_device(sample)
        encoded = lm.encode(sample["net_input"], sample["target"].ne(pad))
        targets = sample["target"][:, -encoded.mask.shape[1] :]
        rows = blocks.rows(sample["id"], encoded.mask, targets).cpu().numpy()
        sampled.append(_entries(rows, encoded))
    return _joined(sampled)


def _entries(rows: np.ndarray, found: Encoded | Contexts) -> tuple[np.ndarray, np.ndarray]:
    """The rows (n,) that count, of (N,) with -1 for those that do not, and their keys (n, D)."""
    assert found.keys is not None
    counted = rows >= 0
    return rows[counted], found.keys.cpu().numpy()[counted]


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows (n,) and keys (n, D) float32 of several parts."""
    rows, keys = (np.concatenate(column) for column in zip(*parts, strict=True))
    return rows, np.ascontiguousarray(keys, dtype=np.float32)


def open_saving(
    inputs: Inputs, starts: np.ndarray, rows: int, worker: Worker
) -> Saving | BlockSaving:
    """Makes place for a datastore, or goes on with one.

    Args:
        inputs: options, models, dictionary.
        starts: (B,) int64, the row of the first token of each block of text.
        rows: tokens of the text.
        worker: which part of the work is this process's.

    Raises:
        KnnlmError: of the kind that fits, where it cannot be saved.
    """
    options, symbols = inputs.options.saving, inputs.vocabulary.symbols
    assert options.dstore_mmap is not None
    path = Path(options.dstore_mmap)
    origin, width = inputs.origin, inputs.loaded.width
    find = partial(
        find_documents,
        eos=inputs.vocabulary.eos,
        boundary=options.document_boundary,
        symbols=symbols,
    )
    texts = cut(starts, rows, options.block_rows)
    check_shards(worker, len(texts))  # before anything is begun, or changed
    edges = [*(int(starts[text.start]) for text in texts), rows]
    plan = Plan(width, options.key_dtype, origin, edges, options.document_boundary)
    builder = None
    if options.append_dstore:
        plan = plan_onto(path, plan, options)
    elif options.no_save_keys:
        builder = _index_builder(inputs.options, rows, width)
        plan = replace(plan, recipe=builder.recipe.factory)
    if not options.append_dstore and (len(texts) == 1 or not _can_be_cut(builder)):
        check_shards(worker, 1)
        writer = DatastoreWriter(path, rows, width, origin, options.key_dtype)
        return Saving(writer, find, builder)
    making = Making(path, plan)
    streaming = None if plan.key_dtype else Streaming(path, plan.fingerprint, builder)
    saving = BlockSaving(making, texts, worker, find, streaming)
    _check_whole(inputs.options.writing, saving)
    return saving


def _can_be_cut(builder: IndexBuilder | None) -> bool:
    """Whether keys can be streamed into pieces; they can be where they are kept."""
    return builder is None or can_be_cut(builder.index)


def _check_whole(writing: WritingOptions, saving: BlockSaving) -> None:
    """Refuses results of a run that goes on with a datastore, since they would be of a part."""
    if saving.goes_on and (writing.results_json or writing.score_table):
        flag = "--results-json" if writing.results_json else "--score-table"
        raise ConfigError(
            f"{flag} would hold a part of the text",
            expected="a run over the whole text",
            found="one that goes on with a datastore, and reads what is missing of it",
            do=f"leave {flag} out, and evaluate in a run of its own",
        )


def _index_builder(options: Options, rows: int, width: int) -> IndexBuilder:
    """Of the index that keys are streamed into, which is made to be searched as flags say."""
    search, saving = options.knn, options.saving
    gpu, budget = wants_gpu(search.knn_device), saving.max_bytes_per_key
    recipe = choose(saving.recipe, rows, width, gpu=gpu, max_bytes=budget, lists=True)
    check_factory(recipe.factory, width)
    builder = IndexBuilder(recipe, width, rows, BuildOptions(nprobe=search.probe))
    builder.check_any_order()
    return builder
