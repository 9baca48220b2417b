"""What a run works on: options, models, text, and what was opened for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fairseq_knnlm.datastore import PROCESSOR, Origin
from fairseq_knnlm.errors import ModelError
from fairseq_knnlm.experts.kind import Models
from fairseq_knnlm.lm.fingerprints import dictionary_fingerprint, model_fingerprint
from fairseq_knnlm.lm.precision import precision
from fairseq_knnlm.lm.processor import processor
from fairseq_knnlm.lm.registry import check_model
from fairseq_knnlm.runs.opening import Memory, key_type_of
from fairseq_knnlm.runs.options import Options
from fairseq_knnlm.versions import versions


@dataclass(frozen=True)
class Vocabulary:
    """A dictionary in plain values.

    Attributes:
        symbols: its types in order; the place of each is its id.
        pad: the padding token's id.
        eos: the id that ends a line.
        bos: the id of a token that is put before each block and does not count; None of none.
    """

    symbols: Sequence[str]
    pad: int
    eos: int
    bos: int | None = None

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of each type; the first, where one stands there twice."""
        return {symbol: number for number, symbol in reversed([*enumerate(self.symbols)])}


@dataclass(frozen=True)
class Inputs:
    """What is known once the models are loaded.

    Attributes:
        options: what the run is asked to do.
        models: fairseq's language models, weights loaded.
        vocabulary: of the targets.
        split: the split loaded last.
        memory: what was opened for experts; None where none are asked for.
        others: by the expert's name, further language models.
        context: blocks and context of the run, as ``Origin`` has them; None where sentences are
            scored by themselves.
        batches: how many tokens and blocks are read at a time, ``max_tokens`` and ``batch_size``,
            where a split is read.
    """

    options: Options
    models: Sequence[Any]
    vocabulary: Vocabulary
    split: str
    memory: Memory | None = None
    others: Mapping[str, Any] = field(default_factory=dict)
    context: dict[str, Any] | None = None
    batches: Mapping[str, int | None] = field(default_factory=dict)

    def are_of(
        self,
        models: Sequence[Any],
        split: str,
        context: dict[str, Any] | None,
        batches: Mapping[str, int | None],
    ) -> bool:
        """Whether they are of these very models, on that split."""
        same = list(map(id, self.models)) == list(map(id, models))
        asked = split, context, batches
        return same and (self.split, self.context, self.batches) == asked

    @property
    def told_context(self) -> dict[str, Any] | None:
        """``context``, and what the first model computes in: what figures and weights hold for."""
        if self.context is None:
            return None
        return {**self.context, "precision": precision(self.models[0])}

    @property
    def origin(self) -> Origin:
        """What a datastore that is made of them says of itself."""
        model, symbols = self.models[0], self.vocabulary.symbols
        forward = {
            **self.batches,
            "add_bos_token": int(self.vocabulary.bos is not None),
            "precision": precision(model),
        }
        return Origin(
            model=self.model,
            dictionary=dictionary_fingerprint(symbols),
            vocabulary=len(symbols),
            key_type=self.options.datastores.knn_keytype,
            split=self.split,
            context={**(self.context or {}), **forward},
            versions={**versions(), PROCESSOR: processor(model)},
        )

    @property
    def key_type(self) -> str | None:
        """The type of the keys that are read of the first model; None where none are needed."""
        return key_type_of(self.options, self.memory)

    @cached_property
    def model(self) -> str:
        """Fingerprint of the first model, computed once.

        Raises:
            ModelError: where its weights are not all numbers.
        """
        return model_fingerprint(self.models[0])

    @cached_property
    def loaded(self) -> Models:
        """The models as experts know them.

        Raises:
            ModelError: where the first is none whose keys can be read.
        """
        return Models(
            first=self.models[0],
            width=check_model(self.models[0], self.key_type),
            eos=self.vocabulary.eos,
            others=self.others,
        )


def several_models(count: int) -> ModelError:
    """What to raise where a datastore or another expert is asked for, and several checkpoints."""
    return ModelError(
        "a datastore belongs to one language model",
        expected="one checkpoint",
        found=f"{count}",
        do="evaluate them one by one, or a second one as --expert-lm",
    )
