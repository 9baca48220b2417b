"""The task ``knn_lm``: fairseq's language modelling, with a memory.

Training is the stock task's. In evaluation the task opens what the flags name, checks that it
fits the model, and hands fairseq a ``KnnScorer`` (``host`` tells how).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from fairseq import utils
from fairseq.checkpoint_utils import load_model_ensemble
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingTask

from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.experts.kind import spelled
from fairseq_knnlm.lm.precision import compute_in
from fairseq_knnlm.lm.registry import check_model, is_supported
from fairseq_knnlm.runs.evaluate import EvaluationRun
from fairseq_knnlm.runs.experts import make_scorer
from fairseq_knnlm.runs.generate import drafts_for, make_writer
from fairseq_knnlm.runs.inputs import Inputs, Vocabulary, several_models
from fairseq_knnlm.runs.opening import Memory, key_type_of, open_memory
from fairseq_knnlm.runs.options import Options
from fairseq_knnlm.runs.save_blocks import ALONE, Worker
from fairseq_knnlm.signals import end_on_request
from fairseq_knnlm.tasks import host, loading, stock
from fairseq_knnlm.tasks.checks import check
from fairseq_knnlm.tasks.flags import KnnlmConfig, options_of, whole_run
from fairseq_knnlm.tasks.generation import MixtureEnsemble, MixtureGenerator
from fairseq_knnlm.tasks.host import WithEnd, hand_over
from fairseq_knnlm.tasks.idle import name_ignored
from fairseq_knnlm.tasks.outputs import check_writes
from fairseq_knnlm.tasks.raw_text import text_of
from fairseq_knnlm.tasks.receipts import typed_run
from fairseq_knnlm.tasks.shares import ShareOfBatches
from fairseq_knnlm.tasks.strides import WindowsAtStride, check_reads
from fairseq_knnlm.tasks.windows import InStretches, InTextOrder, WindowsInText

logger = logging.getLogger(__name__)

#: Where no split is read.
NO_BATCHES: Mapping[str, int | None] = MappingProxyType({})


@register_task("knn_lm", dataclass=KnnlmConfig)
class KnnLanguageModelingTask(LanguageModelingTask):
    """Language modelling that can save a datastore and score with nearest neighbours."""

    def __init__(
        self, args: Any, dictionary: Any, output_dictionary: Any = None, targets: Any = None
    ):
        super().__init__(args, dictionary, output_dictionary, targets)
        self.models: list[Any] = []
        self.split = ""
        self.options = options_of(args)
        self.memory: Memory | None = None
        self._known: Inputs | None = None

    @classmethod
    def setup_task(cls, args: Any, **kwargs: Any) -> KnnLanguageModelingTask:
        """Checks the flags and opens datastore and index, before any model is loaded."""
        options = check(args)
        _check_run(args, options)
        task = super().setup_task(args, **kwargs)
        if options.mixing.evaluates:
            task.memory = open_memory(options, task.target_dictionary.symbols)
        name_ignored(args, options, task.memory)
        return task

    def build_model(self, args: Any, from_checkpoint: bool = False) -> Any:
        """Builds the model and checks that its keys are those of the datastore."""
        model = super().build_model(args, from_checkpoint)
        compute_in(model, self.options.lm.lm_dtype)
        if self.memory is not None or self.options.saving.save_knnlm_dstore:
            width = check_model(model, key_type_of(self.options, self.memory))
            for store in self.memory.stores if self.memory is not None else ():
                store.check_origin(width=width)
            if self.models:
                raise several_models(len(self.models) + 1)
        self.models.append(model)
        return model

    def load_dataset(self, split: str, *args: Any, **kwargs: Any) -> Any:
        self.split = split
        super().load_dataset(split, *args, **kwargs)
        if (stride := self.options.reading.stride) is not None:
            length, blocks = self.args.tokens_per_sample, self.datasets[split]
            self.datasets[split] = WindowsAtStride(blocks, length, stride)

    def build_generator(self, models: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        """For ``fairseq-interactive``, ``fairseq-generate`` and the hub interface."""
        if all(map(is_supported, models)):
            if getattr(args, "score_reference", False):
                return make_scorer(self.inputs(models))
            loading.check_writes_nothing(self.options)
            if self.memory is not None:
                inputs = self.inputs(models)
                models = MixtureEnsemble(make_writer(inputs))
                drafts = partial(drafts_for, inputs, speculate=self.options.generation.wanted)
                kwargs["seq_gen_cls"] = partial(MixtureGenerator, drafts=drafts)
        else:
            loading.check_stock_is_enough(self.options, "this decoder")
        return super().build_generator(models, args, *rest, **kwargs)

    def eval_lm_dataloader(
        self,
        dataset: Any,
        max_tokens: int | None = 36000,
        batch_size: int | None = None,
        max_positions: Any = None,
        num_shards: int = 1,
        shard_id: int = 0,
        num_workers: int = 1,
        data_buffer_size: int = 10,
        context_window: int = 0,
    ) -> Any:
        """The stock loader; puts our scorer where ``fairseq-eval-lm`` makes its own."""
        saving = self.options.saving.save_knnlm_dstore
        if saving:
            loading.check_saving(num_shards, self.options)
        left_out = self.left_out(dataset, max_positions, max_tokens)
        sizes = np.asarray(dataset.sizes, dtype=np.int64)
        whole = whole_run(self.args)
        text = None if saving else text_of(whole, self, dataset, self.split, left_out)
        dataset = self.as_read(dataset, context_window, max_positions)
        in_part = num_shards > 1 and not saving  # which is shared out by blocks of its own
        part = ShareOfBatches(dataset, shard_id, num_shards) if in_part else None
        read = dataset if part is None else part
        load = partial(
            super().eval_lm_dataloader,
            max_tokens=max_tokens,
            batch_size=batch_size,
            max_positions=max_positions,
            num_workers=num_workers,
            data_buffer_size=data_buffer_size,
        )
        if not all(map(is_supported, self.models)):
            loading.check_stock_is_enough(self.options, "this decoder")
            logger.info("%s is scored by the stock scorer", type(self.models[0]).__name__)
            return load(read)
        on_gpu = next(self.models[0].parameters()).is_cuda
        to_device = utils.move_to_cuda if on_gpu else lambda batch: batch
        if whole is not None:
            loading.name_precision(whole.common.fp16, whole.common.bf16, on_gpu)
        sizing = {"max_tokens": max_tokens, "batch_size": batch_size}
        inputs = self.inputs(self.models, self.context(context_window), sizing)
        # What is left out of the text is counted once.
        left_out = left_out if shard_id == 0 else 0
        saved = Worker(shard_id, num_shards) if saving else ALONE
        typed = typed_run(whole, self.args, inputs) if whole is not None else None
        run = EvaluationRun(inputs, sizes, left_out, saved, text, typed)
        if run.sample_every:
            run.learn(load(read, num_shards=run.sample_every), to_device)
            self.dataset_to_epoch_iter.clear()  # fairseq would hand out the shard again
        if run.texts is not None:
            if not run.texts:
                run.publish_datastore()
                sys.exit(0)
            read = InStretches(dataset, run.texts)
        if part is None:
            batches = WithEnd(load(read), run.finish)
        else:
            part.looks_back = loading.check_looks_back(run.scorer.mixture.looks_back)
            ours, run.batch_range = load(part), part.batch_range
            catch_up = partial(run.scorer.catch_up, self.models)
            batches = WithEnd(ours, run.finish, part.before, lambda one: catch_up(to_device(one)))
        if run.scorer.mixture.searches_elsewhere:
            run.scorer.following = lambda: to_device(batches.following)
        hand_over(run.scorer)
        return batches

    def as_read(self, dataset: Any, context_window: int, max_positions: Any) -> Any:
        """Blocks of a split as an evaluation reads them."""
        if self.needs_order():
            dataset = InTextOrder(dataset)
        return self.in_windows(dataset, context_window, max_positions)

    def in_windows(self, dataset: Any, context_window: int, max_positions: Any) -> Any:
        """Blocks of a split after the context that stands before each, where there is one."""
        if context_window == 0:
            return dataset
        size, pad = self.args.tokens_per_sample, self.target_dictionary.pad()
        longest = max_positions if isinstance(max_positions, int) else None
        return WindowsInText(dataset, size, context_window, pad, longest)

    def left_out(self, dataset: Any, max_positions: Any, max_tokens: int | None) -> int:
        """How many tokens of a split nobody will read; it is said, or refused where all must be."""
        if isinstance(dataset, WindowsAtStride):
            check_reads(dataset.longest, max_positions)
            stock.check_batches(dataset.longest, int(dataset.sizes.sum()), max_tokens)
            dataset.name_unpredicted()
            return dataset.unpredicted
        sizes = np.asarray(dataset.sizes, dtype=np.int64)
        read = sizes[sizes <= max_positions] if isinstance(max_positions, int) else sizes
        too_long = int(sizes.sum() - read.sum())
        loading.check_left_out(too_long, max_positions, self.options.saving.save_knnlm_dstore)
        omitted = stock.omitted(dataset)
        loading.name_omitted(omitted, str(self.args.sample_break_mode))
        stock.check_batches(int(read.max(initial=0)), int(read.sum()), max_tokens)
        return too_long + omitted

    def needs_order(self) -> bool:
        """Whether somebody must be given the text in its order."""
        experts = self.memory.experts.values() if self.memory is not None else ()
        return any(expert.kind.needs_order(expert.options) for expert in experts)

    def context(self, window: int) -> dict[str, Any]:
        """Blocks and context of a run over a split; ``stride`` where there is one."""
        stride = self.options.reading.stride
        return {
            "tokens_per_sample": self.args.tokens_per_sample,
            "context_window": window,
            "sample_break_mode": str(self.args.sample_break_mode),
            **({} if stride is None else {"stride": stride}),
        }

    def inputs(
        self,
        models: Any,
        context: dict[str, Any] | None = None,
        batches: Mapping[str, int | None] = NO_BATCHES,
    ) -> Inputs:
        """The same ones as long as the models are: their weights are read once."""
        known, models = self._known, list(models)
        if known is None or not known.are_of(models, self.split, context, batches):
            known = self._known = Inputs(
                options=self.options,
                models=models,
                vocabulary=self.vocabulary(),
                split=self.split,
                memory=self.memory,
                others=self._others(models[0]),
                context=context,
                batches=batches,
            )
        return known

    def vocabulary(self) -> Vocabulary:
        types = self.target_dictionary
        bos = types.bos() if self.args.add_bos_token else None
        return Vocabulary(types.symbols, types.pad(), types.eos(), bos)

    def _others(self, first: Any) -> dict[str, Any]:
        """The further models that experts ask for, by the expert's name, where the first one is."""
        found = {}
        for name, expert in self.memory.experts.items() if self.memory is not None else ():
            for flag in expert.kind.flags("checkpoint"):
                found[name] = self._another(first, flag, getattr(expert.options, flag))
        return found

    def _another(self, first: Any, flag: str, path: str) -> Any:
        """The model of a checkpoint that a flag names."""
        if not Path(path).is_file():
            raise ConfigError(
                f"no checkpoint {path}", expected=f"{spelled(flag)} FILE", found="nothing"
            )
        stock = LanguageModelingTask(
            self.args, self.dictionary, self.output_dictionary, self.targets
        )
        with torch.random.fork_rng(devices=[]):  # building draws weights, which are then replaced
            loaded, _ = load_model_ensemble([path], task=stock)
        parameter = next(first.parameters())
        other = loaded[0].to(parameter.device, parameter.dtype).eval()
        compute_in(other, self.options.lm.lm_dtype)
        return other


def _check_run(args: Any, options: Options) -> None:
    """What fairseq is given besides the task's flags, and what will be written.

    The hub interface has the configuration that the model was trained with in its place.
    """
    run, command = whole_run(args), host.command()
    loading.check_lm_dtype(run, options.lm.lm_dtype)
    if command is not None:
        end_on_request()
    stock.check_data(args.data)
    inputs: dict[str, list[str]] = {}
    if run is not None:
        stock.check_numbers(run)
        shards, processes = run.dataset.num_shards, stock.processes(run)
        if options.saving.save_knnlm_dstore:
            loading.check_saving(stock.shards(run), options)
        loading.check_processes(shards, processes, options)
        path, split = run.common_eval.path, run.dataset.gen_subset
        if command is not None and path is not None:
            asks = options.saving.save_knnlm_dstore or options.mixing.evaluates
            stock.check_checkpoint(path, one=command == "eval_lm" or asks)
            stock.check_split(args.data, split)
            inputs = {"--path": path.split(":"), "the data": stock.data_files(args.data, split)}
    check_writes(options, inputs)
