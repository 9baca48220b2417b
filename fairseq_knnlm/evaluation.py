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

from fairseq_knnlm import config
from fairseq_knnlm.cache import CacheExpert, CacheSetting, cache_grid
from fairseq_knnlm.datastore import DatastoreWriter, Origin
from fairseq_knnlm.experts import (
    DISTANCE_RANKS,
    Expert,
    KeyExpert,
    KnnExpert,
    KnnSetting,
    ModelExpert,
    NGramExpert,
    ShapeExpert,
    knn_grid,
)
from fairseq_knnlm.files import write_json
from fairseq_knnlm.index import check_factory, wants_gpu
from fairseq_knnlm.indexing import IndexBuilder, Wishes
from fairseq_knnlm.lm import TargetLM, check_model, dictionary_fingerprint, model_fingerprint
from fairseq_knnlm.memory import Memory
from fairseq_knnlm.mixers import Component, Fixed
from fairseq_knnlm.mixture import describe, mixed_experts, mixture
from fairseq_knnlm.panel import Panel, SkippingPanel
from fairseq_knnlm.pointers import PointerExpert
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
        memory: what ``--knnlm`` or ``--experts`` opened.
        second: the model of ``--expert-lm``.
    """

    args: Any
    models: Sequence[Any]
    dictionary: Any
    split: str
    memory: Memory | None
    second: Any = None


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
        TableError: where the calibration is.
        ConfigError: where pointers are asked for and rows are not known.
    """
    args, memory = setting.args, setting.memory
    if blocks is None:
        config.check_in_text(args)
    key_type = str(args.knn_keytype) if memory or args.save_knnlm_dstore else None
    panel, source = Panel(), ""
    if memory is not None:
        panel, source = _panel(setting, memory, for_table=bool(args.score_table and blocks))
    return KnnScorer(
        setting.dictionary.pad(),
        setting.dictionary.eos(),
        blocks=blocks,
        key_type=key_type,
        panel=panel,
        mixture_from=source,
        listeners=listeners,
    )


def _panel(setting: Setting, memory: Memory, *, for_table: bool) -> tuple[Panel, str]:
    """Experts and mixer, and where the mixer comes from."""
    args = setting.args
    model = model_fingerprint(setting.models[0])
    for store in memory.stores:
        store.check_origin(model=model)
    if memory.calibration is not None:
        memory.calibration.check_model(model)
    width = check_model(setting.models[0], str(args.knn_keytype))
    chosen = mixture(args, memory.calibration, memory.experts, described(setting), width)
    skipping = memory.skipping
    components, needed = list(chosen.mixer.components), set(chosen.mixer.features)
    if skipping is not None:
        components += skipping.rest.components
        needed |= {*skipping.rest.features, *skipping.skip.gate.features}
    mixed = {component.expert for component in components}
    experts: list[Expert] = [
        _expert(setting, memory, name, components, needed, width, for_table=for_table)
        for name in memory.experts
        if for_table or name in mixed
    ]
    if needed & {"lm_entropy", "lm_top"} or (for_table and args.lm_features):
        pad = setting.dictionary.pad()
        experts.append(ShapeExpert(TargetLM(setting.models[0], pad)))
    if "lm_key" in needed or (for_table and memory.retrievers):
        experts.append(KeyExpert())
    if skipping is None:
        return Panel(experts, chosen.mixer), chosen.source
    skip, rest = skipping.skip, skipping.rest
    return SkippingPanel(experts, chosen.mixer, rest, skip, args.skip_searches), chosen.source


def _expert(
    setting: Setting,
    memory: Memory,
    name: str,
    components: Sequence[Component],
    needed: set[str],
    width: int,
    *,
    for_table: bool,
) -> Expert:
    """One expert, with the settings and features that mixers need, and those of a score table."""
    args = setting.args
    used = [component.setting for component in components if component.expert == name]
    features = for_table or any(feature.startswith(f"{name}_") for feature in needed)
    if name == "cache":
        grid = cache_grid(width) if for_table else []
        columns = _distinct([*grid, *(CacheSetting(**setting) for setting in used)])
        eos = setting.dictionary.eos()
        return CacheExpert(columns, eos, reset=args.cache_reset, features=features)
    if name == "ngram":
        assert memory.ngram is not None
        return NGramExpert(memory.ngram, features=features)
    if name == "lm2":
        return ModelExpert(TargetLM(setting.second, setting.dictionary.pad()))
    neighbours = knn_grid(args.k) if for_table else []
    settings = _distinct([*neighbours, *(KnnSetting(**setting) for setting in used)])
    retriever = memory.retrievers[name]
    if not _pointers(args):
        return KnnExpert(retriever, args.k, settings, features=features, name=name)
    least = config.least_pointers(args)
    return PointerExpert(retriever, args.k, settings, least=least, features=features, name=name)


def _pointers(args: Any) -> dict[str, str]:
    """What pointers do, where there are any."""
    return {} if str(args.pointers) == "none" else {"pointers": config.pointers_in_words(args)}


def _distinct(settings: list[Any]) -> list[Any]:
    return list(dict.fromkeys(settings))


def described(setting: Setting) -> dict[str, dict[str, Any]]:
    """What each expert is in this run, by its name: what a calibration holds for."""
    args, memory = setting.args, setting.memory
    assert memory is not None
    found: dict[str, dict[str, Any]] = {
        name: {
            "k": args.k,
            "index": retriever.index.card.describe(),
            "distances": retriever.distances,
            **_pointers(args),
        }
        for name, retriever in memory.retrievers.items()
    }
    if "cache" in memory.experts:
        found["cache"] = {"reset": bool(args.cache_reset)}
    if memory.ngram is not None:
        found["ngram"] = {"order": memory.ngram.order, "tokens": memory.ngram.tokens}
    if "lm2" in memory.experts:
        found["lm2"] = {"model": model_fingerprint(setting.second)}
    return found


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
            experts = self.scorer.panel.experts
            self.table.writer.publish(_card(self.setting, experts, self.table.features, found))
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
        tally, memory = self.scorer.tally, self.setting.memory
        found = results(
            tokens=tally.tokens,
            base_log_prob=tally.base,
            log_prob=tally.mixed,
            seconds=tally.seconds,
            impossible=tally.impossible,
            left_out=self.left_out,
        )
        if memory is not None:
            found |= self._mixed(memory)
        return found | {"split": self.setting.split, "versions": versions()}

    def _mixed(self, memory: Memory) -> dict[str, Any]:
        """What was mixed, for the results."""
        panel = self.scorer.panel
        found: dict[str, Any] = {
            "experts": list(memory.experts),
            "mixed": mixed_experts(panel.mixer),
            "mixer": panel.mixer.kind,
            "mixture": describe(panel.mixer),
            "mixture_from": self.scorer.mixture_from,
        }
        if isinstance(panel.mixer, Fixed):
            pairs = zip(panel.mixer.components, panel.mixer.weights, strict=True)
            found["weights"] = [
                {"expert": component.expert, "weight": weight, **component.setting}
                for component, weight in pairs
            ]
        if memory.retrievers:
            knn = [expert for expert in panel.experts if isinstance(expert, KnnExpert)]
            retriever = next(iter(memory.retrievers.values()))
            found |= {
                "k": self.setting.args.k,
                "search_seconds": sum(expert.search_seconds for expert in knn),
                "index": retriever.index.card.describe(),
                "distances": retriever.distances,
            }
        pointed = [expert for expert in panel.experts if isinstance(expert, PointerExpert)]
        if pointed:
            searches = sum(expert.searches for expert in pointed)
            saved = 1 - searches / max(1, sum(expert.queries for expert in pointed))
            found |= {**_pointers(self.setting.args), "searches_saved": saved}
        if isinstance(panel, SkippingPanel):
            found["searches_skipped"] = 1 - panel.searched / max(panel.tokens, 1)
        if memory.stores:
            found |= {
                "datastore": ":".join(str(store.path) for store in memory.stores),
                "entries": sum(map(len, memory.stores)),
            }
        return found


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
    check_factory(recipe.factory, width)
    builder = IndexBuilder(recipe, width, rows, Wishes(nprobe=args.probe))
    builder.check_any_order()
    return builder


def _card(
    setting: Setting, experts: Sequence[Expert], features: Iterable[str], found: dict[str, Any]
) -> dict[str, Any]:
    """What the score table says of itself: the results, and what its columns are."""
    card = {**found, "model": model_fingerprint(setting.models[0]), "experts": {}, "features": []}
    if setting.memory is not None:
        card |= {
            "datastores": [store.fingerprint for store in setting.memory.stores],
            "described": described(setting),
            "experts": {
                expert.name: [dict(column) for column in expert.settings]
                for expert in experts
                if expert.settings
            },
            "features": sorted(features),
            "distance_ranks": [rank for rank in DISTANCE_RANKS if rank <= setting.args.k],
        }
    return card
