"""A mixture that writes: it reads texts as they grow, and predicts what comes next in each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fairseq_knnlm.experts.lm import LMExpert
from fairseq_knnlm.lm.contexts import Contexts, Encoded, only
from fairseq_knnlm.lm.contract import LanguageModel, Reads
from fairseq_knnlm.mixture.model import MixtureLM


class Writer:
    """Reads B texts as they grow.

    Args:
        lm: the language model, its keys captured.
        mixture: makes the mixture of it.
        others: further language models, by the name of their expert.
        vocabulary: how many types there are.
        pad: the padding token's id.
    """

    def __init__(
        self,
        lm: LanguageModel,
        mixture: Callable[[LMExpert], MixtureLM],
        others: Mapping[str, LanguageModel],
        vocabulary: int,
        pad: int,
    ) -> None:
        self.lm = lm
        self.vocabulary = vocabulary
        self.mixture = mixture(LMExpert(lm))
        self.pad = pad
        self._others = dict(others)
        self._readings: list[Reads] = []
        self._states: dict[str, Any] = {}

    @property
    def reads_ahead(self) -> bool:
        """Whether it can read several tokens at a time, and take some back."""
        return all(one.reads_ahead for one in (self.lm, *self._others.values()))

    @property
    def device(self) -> torch.device:
        """Where the language model is."""
        found: torch.device = next(self.lm.model.parameters()).device
        return found

    def begin(self, texts: int) -> None:
        """Forgets all texts and begins others, B of them."""
        everyone = (self.lm, *self._others.values())
        self._readings = [lm.reading(texts, self.pad) for lm in everyone]

    def read(self, tokens: Tensor) -> Contexts:
        """Reads on in every text, each at its own pace.

        Args:
            tokens: (B, n) int64; -1 behind the last one of a text that goes on by fewer than n.
                The first token of all is no text, but what begins one.

        Returns:
            The contexts behind these tokens, text by text; a context's row is the number of tokens
            before it.
        """
        first, *others = self._readings
        places = first.lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        encoded = first.read(tokens)
        features = {
            name: reading.read(tokens).features
            for name, reading in zip(self._others, others, strict=True)
        }
        return _contexts(encoded, places, features)

    def forget(self, counts: Tensor) -> None:
        """Takes back the last ``counts[i]`` contexts of text i, (B,) int64, and their tokens."""
        for reading in self._readings:
            reading.forget(counts)
        self.mixture.forget(counts)

    def keep(self, order: Tensor) -> None:
        """Has text i go on where text ``order[i]`` stood, (B',) int64."""
        for reading in self._readings:
            reading.keep(order)
        self.mixture.reorder(order)

    def step(self, tokens: Tensor, state: dict[str, Any]) -> Contexts:
        """Reads the last token of every text, where the model can do no more.

        Args:
            tokens: (B, t) int64, the texts so far, all of the same length.
            state: fairseq's incremental state of the language model; empty where t is 1.
        """
        step = tokens.shape[1] - 1
        if step == 0:
            self._states = {name: {} for name in self._others}
        features = {
            name: lm.step(tokens, self._states[name]).features for name, lm in self._others.items()
        }
        places = torch.full((len(tokens), 1), step, device=tokens.device)
        return _contexts(self.lm.step(tokens, state), places, features)

    def reorder(self, order: Tensor) -> None:
        """The same as ``keep`` for what ``step`` has read, but for the state it was given."""
        for name, lm in self._others.items():
            lm.reorder(self._states[name], order)
        self.mixture.reorder(order)


def _contexts(encoded: Encoded, places: Tensor, others: Mapping[str, Tensor]) -> Contexts:
    """Of the places (B, n) that are in the mask."""
    texts = torch.arange(len(places), device=places.device)[:, None].expand_as(places)
    mask = encoded.mask
    rows, texts = only(places, mask), only(texts, mask)
    return Contexts(encoded.features, encoded.keys, encoded.before, rows, texts, others)
