"""The experts of a run and what mixes them, once the models' weights are known to be right."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.experts.contract import Expert
from fairseq_knnlm.experts.kind import Opened
from fairseq_knnlm.experts.lm import KeyExpert, ShapeExpert
from fairseq_knnlm.lm.fingerprints import check_finite
from fairseq_knnlm.lm.precision import precision
from fairseq_knnlm.lm.registry import language_model
from fairseq_knnlm.mixture.components import Component
from fairseq_knnlm.mixture.mixers import Mixer
from fairseq_knnlm.mixture.model import MixtureLM, Watch
from fairseq_knnlm.mixture.skipping import SkippingMixtureLM
from fairseq_knnlm.runs.inputs import Inputs, several_models
from fairseq_knnlm.runs.mixing import mixture
from fairseq_knnlm.runs.opening import Memory
from fairseq_knnlm.runs.scorer import Blocks, KnnScorer, Listener, MakeMixture, Sentences

logger = logging.getLogger(__name__)

#: Features of the language model's whole distribution.
SHAPE = {"lm_entropy", "lm_top"}
#: The feature that is the query.
KEY = "lm_key"


def make_scorer(
    inputs: Inputs,
    blocks: Blocks | None = None,
    listeners: Sequence[Listener] = (),
    watch: Watch | None = None,
) -> KnnScorer:
    """A scorer, once the models' weights are known to be those of the datastore.

    Args:
        inputs: options, models, memory.
        blocks: where the blocks lie; left out, every sentence is a text of its own.
        listeners: told of every batch.
        watch: is shown every prediction.

    Raises:
        DatastoreError: where the datastore is of another checkpoint.
        ModelError: where a model's weights are not all numbers, or there are several models.
        TableError: where the calibration is.
        ConfigError: where pointers are asked for and there is no text, or memory is too small.
    """
    options, memory = inputs.options, inputs.memory
    if blocks is None and memory is not None:
        for kind in memory.by_kind:
            kind.check_sentences(options.of(kind))
    if memory is None and not options.saving.save_knnlm_dstore:
        for model in inputs.models:
            check_finite(model)
    elif len(inputs.models) > 1:
        raise several_models(len(inputs.models))
    make: MakeMixture = MixtureLM
    source = ""
    if memory is not None:
        for_table = bool(options.writing.score_table and blocks)
        make, source = make_mixture(inputs, memory, for_table=for_table)
    return KnnScorer(
        inputs.vocabulary.pad,
        inputs.vocabulary.eos,
        blocks=blocks if blocks is not None else Sentences(inputs.vocabulary.bos),
        key_type=inputs.key_type,
        mixture=make,
        others={name: language_model(model) for name, model in inputs.others.items()},
        mixture_from=source,
        listeners=listeners,
        watch=watch,
    )


def make_mixture(
    inputs: Inputs, memory: Memory, *, for_table: bool = False
) -> tuple[MakeMixture, str]:
    """What makes the mixture of the language model, and where the mixer comes from.

    Args:
        inputs: options and models.
        memory: what was opened for experts.
        for_table: with all settings and features of a score table.

    Raises:
        DatastoreError: where a datastore is of another checkpoint.
        TableError: where the calibration is.
        KnnlmError: of another kind, where an expert cannot be made.
    """
    for store in memory.stores:
        store.check_origin(model=inputs.model)
        _name_precision(store, precision(inputs.models[0]))
    if memory.calibration is not None:
        memory.calibration.check_model(inputs.model)
    chosen = mixture(
        inputs.options, memory.calibration, memory.experts, inputs.loaded, inputs.told_context
    )
    skipping = memory.skipping
    components, needed = _wanted(chosen.mixer)
    if skipping is not None:
        others, further = _wanted(skipping.rest)
        components += others
        needed |= {*further, *skipping.skip.gate.features}
    mixed = {component.expert for component in components}
    experts: list[Expert] = [
        _expert(inputs, opened, components, needed, for_table=for_table)
        for name, opened in memory.experts.items()
        if for_table or name in mixed
    ]
    if needed & SHAPE or (for_table and inputs.options.writing.lm_features):
        experts.append(ShapeExpert(language_model(inputs.models[0])))
    if KEY in needed or (for_table and any(kind.searches for kind in memory.by_kind)):
        experts.append(KeyExpert())
    if skipping is None:
        return lambda lm: MixtureLM(lm, experts, chosen.mixer), chosen.source
    share = inputs.options.mixing.skip_searches
    assert share is not None
    how = (experts, chosen.mixer, skipping.rest, skipping.skip, share)
    return lambda lm: SkippingMixtureLM(lm, *how), chosen.source


def _name_precision(store: Datastore, now: str) -> None:
    """Says where keys were computed in another type than queries will be: they differ slightly."""
    then = store.manifest.origin.context.get("precision")
    if then is not None and then != now:
        logger.warning(
            "the keys of %s were computed in %s, queries are computed in %s: they are near each "
            "other, and not the same. Save and evaluate with one --lm-dtype where figures matter.",
            *(store.path, then, now),
        )


def _wanted(mixer: Mixer) -> tuple[list[Component], set[str]]:
    """The components and features of a mixer."""
    return list(mixer.components), set(mixer.features)


def _expert(
    inputs: Inputs,
    opened: Opened,
    components: Sequence[Component],
    needed: set[str],
    *,
    for_table: bool,
) -> Expert:
    """One expert, with the settings and features that mixers need, and those of a score table."""
    kind, models = opened.kind, inputs.loaded
    grid: Sequence[Any] = kind.grid(opened, models) if for_table else ()
    used = [kind.read(one.setting) for one in components if one.expert == opened.name]
    features = for_table or any(feature.startswith(f"{opened.name}_") for feature in needed)
    return kind.make(opened, models, list(dict.fromkeys([*grid, *used])), features)
