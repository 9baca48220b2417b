"""Language models of which only the decoder's output is known: what it predicts from.

That output is both the features and, as ``decoder_output``, the key. A family says how its decoder
is made to stop there, and which layer follows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fairseq_knnlm.errors import ModelError
from fairseq_knnlm.lm import softmax
from fairseq_knnlm.lm.contexts import Encoded
from fairseq_knnlm.lm.contract import Reads

#: The one key type that such a model has.
OUTPUT = "decoder_output"


class OutputLM(ABC):
    """A fairseq language model that is read at its decoder's output; see ``LanguageModel``.

    Args:
        model: the model, weights loaded.
        key_type: ``decoder_output``, or None to capture no keys.
    """

    def __init__(self, model: nn.Module, key_type: str | None = None) -> None:
        model.eval()  # returns None once fairseq has prepared the model for inference
        self.model = model
        self.decoder: Any = model.decoder
        self.key_type = key_type

    @abstractmethod
    def features(self, tokens: Tensor, state: dict[str, Any] | None) -> Tensor:
        """The output at tokens (B, T) int64, (B, T, C).

        Args:
            tokens: the texts.
            state: fairseq's incremental state; where there is one, (B, 1, C) of the last token.
        """

    @property
    @abstractmethod
    def head(self) -> softmax.Layer:
        """From features (N, C) to logits (N, V), where the softmax is a plain one."""

    @property
    def reads_ahead(self) -> bool:
        """False: what such a decoder keeps of a text goes on by one token at a time."""
        return False

    def reading(self, texts: int, pad: int) -> Reads:
        """Not to be asked for."""
        raise AssertionError(f"{type(self).__name__} does not read ahead")

    @torch.no_grad()
    def encode(self, inputs: Mapping[str, Any], mask: Tensor) -> Encoded:
        """Runs the model and keeps some of the positions.

        Args:
            inputs: ``net_input`` of one of fairseq's batches.
            mask: (B, T) bool, the positions that are asked for.
        """
        tokens = inputs["src_tokens"]
        found = Encoded.of(tokens, mask, self.features(tokens, None), None)
        return replace(found, keys=self._keys(found.features))

    @torch.no_grad()
    def step(self, tokens: Tensor, state: dict[str, Any]) -> Encoded:
        """Reads one more token of each text, and keeps the last position.

        Args:
            tokens: (B, t) int64, the texts so far; all but the last token were read before.
            state: fairseq's incremental state, which is written to; empty where t is 1.
        """
        features = self.features(tokens, state)[:, -1]
        return Encoded.last(tokens, features, self._keys(features))

    def reorder(self, state: dict[str, Any], order: Tensor) -> None:
        """Has text i go on where text ``order[i]`` stood, (B,) int64."""
        self.decoder.reorder_incremental_state_scripting(state, order)

    @torch.no_grad()
    def log_prob(self, features: Tensor, tokens: Tensor) -> Tensor:
        """log p of one token (N,) each, from features (N, C): (N,) float32, natural log."""
        return softmax.log_prob(self.head, self.decoder.adaptive_softmax, features, tokens)

    @torch.no_grad()
    def log_probs(self, features: Tensor) -> Tensor:
        """log p of every token, from features (N, C): (N, V) float32, natural log."""
        return softmax.log_probs(self.head, self.decoder.adaptive_softmax, features)

    def _keys(self, features: Tensor) -> Tensor | None:
        return None if self.key_type is None else features


class ProjectedLM(OutputLM):
    """One whose decoder goes on to logits in one pass, unless its softmax is adaptive.

    Attributes:
        projection: the name of the decoder's last layer, which is None of an adaptive one.
    """

    projection: ClassVar[str]

    def features(self, tokens: Tensor, state: dict[str, Any] | None) -> Tensor:
        """The output at tokens; the last layer is given nothing to do."""
        return _before_projection(lambda: self.decoder(tokens, incremental_state=state), self.head)

    @property
    def head(self) -> nn.Module:
        """The last layer."""
        found: nn.Module = getattr(self.decoder, self.projection)
        return found


def _before_projection(run: Callable[[], Any], projection: nn.Module | None) -> Tensor:
    """What a decoder hands to its last layer, (B, T, C), which is given no position to work on.

    Args:
        run: the decoder's forward pass.
        projection: that layer; None where the decoder has none, and returns the features.
    """
    if projection is None:
        features: Tensor = run()[0]
        return features
    caught: list[Tensor] = []

    def catch(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor]:
        caught.append(given[0])
        return (given[0][:, :0],)

    handle = projection.register_forward_pre_hook(catch)
    try:
        run()
    finally:
        handle.remove()
    return caught[-1]


class OutputFamily(ABC):
    """A family of such models; see ``Family``."""

    name: str
    reader: type[OutputLM]

    @abstractmethod
    def belongs(self, model: nn.Module) -> bool:
        """Whether this family reads a model."""

    @abstractmethod
    def width(self, model: nn.Module, key_type: str | None) -> int:
        """C, numbers in the features, which are the keys.

        Raises:
            ModelError: of a key type of Transformer decoders.
        """

    def check_key(self, key_type: str | None) -> None:
        """Refuses a key type of Transformer decoders.

        Raises:
            ModelError: naming the one that there is.
        """
        if key_type not in {None, OUTPUT}:
            raise ModelError(
                f"{self.name} has no layer for --knn-keytype {key_type}",
                expected=f"--knn-keytype {OUTPUT}, which is no part of a Transformer",
                found=key_type,
                do=f"pass --knn-keytype {OUTPUT}, to save a datastore and to use it",
            )

    def open(self, model: nn.Module, key_type: str | None) -> OutputLM:
        """The model, read."""
        return self.reader(model, key_type)


class ProjectedFamily(OutputFamily):
    """A family of models whose decoder ends with a projection."""

    reader: type[ProjectedLM]

    def width(self, model: nn.Module, key_type: str | None) -> int:
        """C, numbers in the features: what the head of an adaptive softmax, or the layer, takes."""
        self.check_key(key_type)
        decoder: Any = model.decoder
        if decoder.adaptive_softmax is None:
            return int(getattr(decoder, self.reader.projection).in_features)
        head = decoder.adaptive_softmax.head
        # Tied to the embeddings, the head is a module of two projections.
        return int((head if isinstance(head, nn.Linear) else head.class_proj).in_features)


def is_decoder(model: nn.Module, name: str) -> bool:
    """Whether a model's decoder is fairseq's class of this dotted name, or a subclass of it."""
    kinds = type(getattr(model, "decoder", None)).__mro__
    return any(f"{kind.__module__}.{kind.__qualname__}" == name for kind in kinds)
