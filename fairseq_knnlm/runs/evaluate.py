"""Scorers made of flags, models and memory, and one pass of ``fairseq-eval-lm`` with such a scorer:
who listens to it, what it leaves behind, what it reports.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fairseq_knnlm.datastore import DatastoreWriter, Origin
from fairseq_knnlm.errors import ModelError, told
from fairseq_knnlm.experts.cache import (
    CacheExpert,
    CacheSetting,
    cache_bytes,
    cache_grid,
    check_memory,
)
from fairseq_knnlm.experts.contract import Expert
from fairseq_knnlm.experts.knn import DISTANCE_RANKS, KnnExpert, KnnSetting, knn_grid
from fairseq_knnlm.experts.lm import KeyExpert, LMExpert, ShapeExpert
from fairseq_knnlm.experts.ngram import NGramExpert
from fairseq_knnlm.experts.pointers import PointerExpert
from fairseq_knnlm.files import write_json
from fairseq_knnlm.index.build import BuildOptions, IndexBuilder
from fairseq_knnlm.index.device import wants_gpu
from fairseq_knnlm.index.recipes import choose
from fairseq_knnlm.index.specification import check_factory
from fairseq_knnlm.lm.fingerprints import (
    check_finite,
    dictionary_fingerprint,
    model_fingerprint,
)
from fairseq_knnlm.lm.registry import check_model, language_model
from fairseq_knnlm.mixture.components import Component
from fairseq_knnlm.mixture.mixers import Fixed
from fairseq_knnlm.mixture.model import MixtureLM, SkippingMixtureLM
from fairseq_knnlm.runs.mixing import describe, mixed_experts, mixture
from fairseq_knnlm.runs.opening import Memory
from fairseq_knnlm.runs.report import closing_lines, results
from fairseq_knnlm.runs.save import Saving
from fairseq_knnlm.runs.scorer import (
    Blocks,
    FillsTable,
    KnnScorer,
    Listener,
    MakeMixture,
    Sentences,
)
from fairseq_knnlm.tasks import checks
from fairseq_knnlm.tasks import flags as config
from fairseq_knnlm.versions import versions

logger = logging.getLogger(__name__)

#: Share of the tokens with an entry of their own from which a datastore seems to hold the text.
RECALLED = 0.25


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
        context: blocks and context of the run, as ``Origin`` has them; None where sentences are
            scored by themselves.
    """

    args: Any
    models: Sequence[Any]
    dictionary: Any
    split: str
    memory: Memory | None
    second: Any = None
    context: dict[str, Any] | None = None

    def holds(self, models: Sequence[Any], split: str, context: dict[str, Any] | None) -> bool:
        """Whether this is the setting of these very models, on that split."""
        same = list(map(id, self.models)) == list(map(id, models))
        return same and (self.split, self.context) == (split, context)

    @cached_property
    def model(self) -> str:
        """Fingerprint of the first model, computed once.

        Raises:
            ModelError: where its weights are not all numbers.
        """
        return model_fingerprint(self.models[0])

    @cached_property
    def second_model(self) -> str:
        """The same of the model of ``--expert-lm``."""
        return model_fingerprint(self.second)


def make_scorer(
    setting: Setting, blocks: Blocks | None = None, listeners: Sequence[Listener] = ()
) -> KnnScorer:
    """A scorer, once the models' weights are known to be those of the datastore.

    Args:
        setting: flags, models, memory.
        blocks: where the blocks lie; left out, every sentence is a text of its own.
        listeners: told of every batch.

    Raises:
        DatastoreError: where the datastore is of another checkpoint.
        ModelError: where a model's weights are not all numbers, or there are several models.
        TableError: where the calibration is.
        ConfigError: where pointers are asked for and there is no text, or memory is too small.
    """
    args, memory = setting.args, setting.memory
    if blocks is None:
        checks.check_in_text(args)
    key_type = str(args.knn_keytype) if memory or args.save_knnlm_dstore else None
    if key_type is None:
        for model in setting.models:
            check_finite(model)
    elif len(setting.models) > 1:
        raise several_models(len(setting.models))
    make: MakeMixture = MixtureLM
    source, others = "", {}
    if memory is not None:
        make, source = _mixture(setting, memory, for_table=bool(args.score_table and blocks))
        if "lm2" in memory.experts:
            others = {"lm2": language_model(setting.second)}
    return KnnScorer(
        setting.dictionary.pad(),
        setting.dictionary.eos(),
        blocks=blocks if blocks is not None else Sentences(bool(args.add_bos_token)),
        key_type=key_type,
        mixture=make,
        others=others,
        mixture_from=source,
        listeners=listeners,
    )


def several_models(count: int) -> ModelError:
    """What to raise where a datastore or another expert is asked for, and several checkpoints."""
    return ModelError(
        "a datastore belongs to one language model",
        expected="one checkpoint",
        found=f"{count}",
        do="evaluate them one by one, or a second one as --expert-lm",
    )


def _mixture(setting: Setting, memory: Memory, *, for_table: bool) -> tuple[MakeMixture, str]:
    """What makes the mixture of the language model, and where the mixer comes from."""
    args = setting.args
    for store in memory.stores:
        store.check_origin(model=setting.model)
    if memory.calibration is not None:
        memory.calibration.check_model(setting.model)
    width = check_model(setting.models[0], str(args.knn_keytype))
    chosen = mixture(
        *(args, memory.calibration, memory.experts, described(setting), width, setting.context)
    )
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
        experts.append(ShapeExpert(language_model(setting.models[0])))
    if "lm_key" in needed or (for_table and memory.retrievers):
        experts.append(KeyExpert())
    if skipping is None:
        return lambda lm: MixtureLM(lm, experts, chosen.mixer), chosen.source
    how = (experts, chosen.mixer, skipping.rest, skipping.skip, args.skip_searches)
    return lambda lm: SkippingMixtureLM(lm, *how), chosen.source


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
        check_memory(cache_bytes(columns, width, features=features), available_memory())
        eos = setting.dictionary.eos()
        return CacheExpert(columns, eos, reset=args.cache_reset, features=features)
    if name == "ngram":
        assert memory.ngram is not None
        return NGramExpert(memory.ngram, features=features)
    if name == "lm2":
        return LMExpert(language_model(setting.second), name="lm2")
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
        found["lm2"] = {"model": setting.second_model}
    return found


class EvaluationRun:
    """One pass over a split.

    Args:
        setting: flags, models, memory.
        sizes: (number of blocks,) tokens of each block, in the order of the text.
        left_out: tokens in blocks that fairseq will drop.
    """

    def __init__(self, setting: Setting, sizes: np.ndarray, left_out: int) -> None:
        self.setting = setting
        self.left_out = left_out
        args = setting.args
        listeners: list[Listener] = []
        self.saving: Saving | None = None
        self.table: FillsTable | None = None
        if args.save_knnlm_dstore:
            self.saving = _saving(setting, int(sizes.sum()))
            listeners.append(self.saving)
        if args.score_table:
            self.table = FillsTable(Path(args.score_table))
            listeners.append(self.table)
        self.blocks = Blocks(np.cumsum(sizes) - sizes, bool(args.add_bos_token))
        self.scorer = make_scorer(setting, self.blocks, listeners)
        self._warn_of_the_same_split()

    def _warn_of_the_same_split(self) -> None:
        setting = self.setting
        for store in setting.memory.stores if setting.memory is not None else ():
            origin = store.manifest.origin
            if origin.split == setting.split and origin.model == setting.model:
                logger.warning(
                    "the datastore %s is of a split %r too: where it is the same text, every "
                    "token finds its own entry, and the perplexity says nothing",
                    *(store.path, setting.split),
                )

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
        lm, pad = language_model(model, key_type), self.setting.dictionary.pad()
        self.saving.learn(lm, pad, self.blocks, batches, to_device)

    def finish(self) -> None:
        """Publishes what was written and reports what was measured.

        Where one thing cannot be published the others are, and what was measured is told.

        Raises:
            KnnlmError: where keys or values turn out to be damaged; nothing is published then.
            Exception: the first that publishing raised.
        """
        if self.setting.memory is not None:
            for retriever in self.setting.memory.retrievers.values():
                if checked := retriever.check_files():
                    logger.info("checked the other %s chunks of %s", checked, retriever.store.path)
        found = self._results()
        failures: list[Exception] = []
        for publish in (self._publish_datastore, self._publish_table, self._publish_results):
            try:
                publish(found)
            except Exception as error:
                failures.append(error)
        self._tell(found)
        for failure in failures[1:]:
            logger.error(told(failure)[0])
        if failures:
            raise failures[0]

    def _publish_datastore(self, found: dict[str, Any]) -> None:
        if self.saving is not None:
            path = self.saving.publish()
            logger.info("saved %s entries in %s", f"{found['tokens']:,}", path)

    def _publish_table(self, found: dict[str, Any]) -> None:
        if self.table is not None:
            experts = self.scorer.mixture.experts
            self.table.writer.publish(_card(self.setting, experts, self.table.features, found))
            logger.info("score table written to %s", self.setting.args.score_table)

    def _publish_results(self, found: dict[str, Any]) -> None:
        if self.setting.args.results_json:
            write_json(Path(self.setting.args.results_json), found)

    def _tell(self, found: dict[str, Any]) -> None:
        for line in closing_lines(found):
            logger.info(line)
        if found.get("tokens_recalled", 0) > RECALLED * found["tokens"]:
            logger.warning(
                "%s of %s tokens have an entry of their own in the datastore, at no distance: it "
                "seems to hold the evaluated text, and then the perplexity says nothing",
                *(f"{found[name]:,}" for name in ("tokens_recalled", "tokens")),
            )
        if found["tokens_impossible"]:
            logger.warning(
                "%s tokens have probability 0: the loss is infinite",
                f"{found['tokens_impossible']:,}",
            )

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
        where = {"split": self.setting.split, "context": self.setting.context}
        return found | where | {"versions": versions()}

    def _mixed(self, memory: Memory) -> dict[str, Any]:
        """What was mixed, for the results."""
        mixture = self.scorer.mixture
        found: dict[str, Any] = {
            "experts": list(memory.experts),
            "mixed": mixed_experts(mixture.mixer),
            "mixer": mixture.mixer.kind,
            "mixture": describe(mixture.mixer),
            "mixture_from": self.scorer.mixture_from,
        }
        if isinstance(mixture.mixer, Fixed):
            pairs = zip(mixture.mixer.components, mixture.mixer.weights, strict=True)
            found["weights"] = [
                {"expert": component.expert, "weight": weight, **component.setting}
                for component, weight in pairs
            ]
        if memory.retrievers:
            knn = [expert for expert in mixture.experts if isinstance(expert, KnnExpert)]
            retriever = next(iter(memory.retrievers.values()))
            found |= {
                "k": self.setting.args.k,
                "search_seconds": sum(expert.search_seconds for expert in knn),
                "tokens_recalled": max((expert.recalled for expert in knn), default=0),
                "index": retriever.index.card.describe(),
                "distances": retriever.distances,
            }
        pointed = [expert for expert in mixture.experts if isinstance(expert, PointerExpert)]
        if pointed:
            searches = sum(expert.searches for expert in pointed)
            saved = 1 - searches / max(1, sum(expert.queries for expert in pointed))
            found |= {**_pointers(self.setting.args), "searches_saved": saved}
        if isinstance(mixture, SkippingMixtureLM):
            found["searches_skipped"] = 1 - mixture.searched / max(mixture.tokens, 1)
        if memory.stores:
            found |= {
                "datastore": ":".join(str(store.path) for store in memory.stores),
                "entries": sum(map(len, memory.stores)),
            }
        return found


def available_memory() -> int:
    """Bytes that this process may still take, as far as the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":") for line in lines)
        return 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _saving(setting: Setting, rows: int) -> Saving:
    args, model = setting.args, setting.models[0]
    origin = Origin(
        model=setting.model,
        dictionary=dictionary_fingerprint(setting.dictionary.symbols),
        vocabulary=len(setting.dictionary),
        key_type=str(args.knn_keytype),
        split=setting.split,
        context=setting.context or {},
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
    builder = IndexBuilder(recipe, width, rows, BuildOptions(nprobe=args.probe))
    builder.check_any_order()
    return builder


def _card(
    setting: Setting, experts: Sequence[Expert], features: Iterable[str], found: dict[str, Any]
) -> dict[str, Any]:
    """What the score table says of itself: the results, and what its columns are."""
    card = {**found, "model": setting.model, "experts": {}, "features": []}
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
