"""What is known before a token is predicted. No target is among it, so none can be looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

#: Tokens before a position that it knows: what n-grams and matches of words go by.
CONTEXT = 4


@dataclass(frozen=True)
class Encoded:
    """What a language model makes of a batch, at the positions that are asked for.

    Attributes:
        features: (N, C), the decoder's output, from which the model predicts.
        keys: (N, D), the representations that serve as keys; None where not captured.
        before: (N, CONTEXT) int64, the tokens up to each position, the nearest first; -1 where the
            model saw none.
        mask: (B, T) bool, which positions these are; T ends with the batch's blocks, and begins
            where the first such position of any block is.
    """

    features: Tensor
    keys: Tensor | None
    before: Tensor
    mask: Tensor

    @classmethod
    def of(cls, tokens: Tensor, mask: Tensor, features: Tensor, keys: Tensor | None) -> Encoded:
        """The positions of a (B, T) mask, of what a model makes of all.

        Args:
            tokens: (B, T) int64, what it read.
            mask: (B, T) bool.
            features: (B, T, C).
            keys: (B, T, D), or None.
        """
        start, before = first_column(mask), tokens_before(tokens)[mask]
        mask = mask[:, start:]
        keys = None if keys is None else keys[:, start:][mask]
        return cls(features[:, start:][mask], keys, before, mask)

    @classmethod
    def last(cls, tokens: Tensor, features: Tensor, keys: Tensor | None) -> Encoded:
        """The last position of each text.

        Args:
            tokens: (B, t) int64, the texts so far.
            features: (B, C), there.
            keys: (B, D), or None.
        """
        before = tokens_before(tokens[:, -CONTEXT:])[:, -1]
        return cls(features, keys, before, torch.ones_like(tokens[:, -1:], dtype=torch.bool))


@dataclass(frozen=True)
class Contexts:
    """N places in text, each with what stands before it and nothing after.

    Contexts of one text come in its order. What followed a context is known by the next one alone:
    as the token before that.

    Attributes:
        features: (N, C), from which the language model predicts.
        keys: (N, D), queries for a datastore; None where not captured.
        before: (N, CONTEXT) int64, the tokens before, the nearest first; -1 where there are none.
        rows: (N,) int64, the place in the text; -1 where there is none, as at an added beginning of
            sentence.
        texts: (N,) int64, ascending: the text that each is of, where there are several; None where
            all are of one.
        others: by the expert's name, (N, C') features of further language models.
    """

    features: Tensor
    keys: Tensor | None
    before: Tensor
    rows: Tensor
    texts: Tensor | None = None
    others: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, places: Tensor | slice) -> Contexts:
        """Some of them, in ascending order."""
        return Contexts(
            self.features[places],
            None if self.keys is None else self.keys[places],
            self.before[places],
            self.rows[places],
            None if self.texts is None else self.texts[places],
            {name: features[places] for name, features in self.others.items()},
        )

    def by_text(self) -> dict[int, Tensor]:
        """The places (n,) int64 of each text among the N, by the text's number."""
        places = torch.arange(len(self), device=self.rows.device)
        if self.texts is None:
            return {0: places}
        numbers, lengths = self.texts.unique_consecutive(return_counts=True)
        return dict(zip(numbers.tolist(), places.split(lengths.tolist()), strict=True))


def only(values: Tensor, mask: Tensor) -> Tensor:
    """Of values (B, T, ...) those in a mask (B, T): (N, ...). Mostly that is all, and no work."""
    return values.flatten(0, 1) if bool(mask.all()) else values[mask]


def first_column(mask: Tensor) -> int:
    """The first column of a (B, T) mask in which any row is True; 0 where there is none."""
    return int(mask.any(dim=0).int().argmax())


def tokens_before(inputs: Tensor) -> Tensor:
    """(B, T, CONTEXT): the inputs up to each position of (B, T), the nearest first, else -1."""
    # The input at a position is the token before the one that is predicted there.
    return nn.functional.pad(inputs, (CONTEXT - 1, 0), value=-1).unfold(1, CONTEXT, 1).flip(2)
