"""A mixture that writes, put together for a run."""

from __future__ import annotations

from fairseq_knnlm.generation.writer import Writer
from fairseq_knnlm.lm.registry import language_model
from fairseq_knnlm.runs.experts import make_mixture
from fairseq_knnlm.runs.inputs import Inputs, several_models


def make_writer(inputs: Inputs) -> Writer:
    """A writer, once the models' weights are known to be those of the datastore.

    Args:
        inputs: options, models, and the memory, which must be there.

    Raises:
        DatastoreError: where the datastore is of another checkpoint.
        ModelError: where a model's weights are not all numbers, or there are several models.
        TableError: where the calibration is.
        ConfigError: where an expert needs a text that is there already, or memory is too small.
    """
    options, memory = inputs.options, inputs.memory
    assert memory is not None
    if len(inputs.models) > 1:
        raise several_models(len(inputs.models))
    for kind in memory.by_kind:
        kind.check_sentences(options.of(kind))
    make, _ = make_mixture(inputs, memory)
    return Writer(
        language_model(inputs.models[0], options.datastores.knn_keytype),
        make,
        {name: language_model(model) for name, model in inputs.others.items()},
        len(inputs.vocabulary.symbols),
        inputs.vocabulary.pad,
    )
