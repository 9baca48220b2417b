"""A mixture that writes: it predicts the next token of several texts at once, step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fairseq_knnlm.experts.lm import LMExpert
from fairseq_knnlm.lm.contexts import Contexts
from fairseq_knnlm.lm.registry import language_model
from fairseq_knnlm.lm.transformer import TransformerLM
from fairseq_knnlm.mixture.model import MixtureLM
from fairseq_knnlm.runs.experts import make_mixture
from fairseq_knnlm.runs.inputs import Inputs, several_models


class Writer:
    """Predicts what comes next in B texts, which begin together and go on a token at a time.

    Args:
        lm: the language model, its keys captured.
        mixture: makes the mixture of it.
        others: further language models, by the name of their expert.
    """

    def __init__(
        self,
        lm: TransformerLM,
        mixture: Callable[[LMExpert], MixtureLM],
        others: Mapping[str, TransformerLM],
    ) -> None:
        self.lm = lm
        self.mixture = mixture(LMExpert(lm))
        self._others = others
        self._states: dict[str, Any] = {}

    @torch.no_grad()
    def log_probs(self, tokens: Tensor, state: dict[str, Any]) -> Tensor:
        """log p of every token that may come next: (B, V) float32, natural log.

        Args:
            tokens: (B, t) int64, the texts so far; the first is no text, but what begins one.
            state: fairseq's incremental state of the language model; empty where t is 1.
        """
        size, step = tokens.shape[0], tokens.shape[1] - 1
        if step == 0:
            self._states = {name: {} for name in self._others}
        encoded = self.lm.step(tokens, state)
        others = {
            name: lm.step(tokens, self._states[name]).features for name, lm in self._others.items()
        }
        rows = torch.full((size,), step, device=tokens.device)
        texts = torch.arange(size, device=tokens.device)
        contexts = Contexts(encoded.features, encoded.keys, encoded.before, rows, texts, others)
        return self.mixture.predict(contexts).log_probs()

    def reorder(self, order: Tensor) -> None:
        """From now on text i goes on where text ``order[i]`` stood, (B',) int64.

        fairseq reorders the state of the language model itself.
        """
        for name, lm in self._others.items():
            lm.reorder(self._states[name], order)
        self.mixture.reorder(order)


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
    )
