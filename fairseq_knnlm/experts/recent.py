"""What a cache keeps of a text, its latest positions, and how these are cut into queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fairseq_knnlm.experts.on_text import ending
from fairseq_knnlm.lm.contexts import CONTEXT, Contexts

#: Queries looked up at a time: each goes with a window of scores.
QUERIES_AT_A_TIME = 256
#: What is looked back over, where a text is shorter than the window, grows by so many positions.
STEP = 64


@dataclass(frozen=True)
class Recent:
    """Positions of a text, the latest at the end.

    Attributes:
        keys: (M, D) float32, the language model's features.
        tokens: (M,) int64, what followed; -1 where that is not known yet.
        before: (M, CONTEXT) int64, what came before.
        documents: (M,) int64, the number of the document, ascending; -1 before all text.
        row: of the last position; -1 before all text.
    """

    keys: Tensor
    tokens: Tensor
    before: Tensor
    documents: Tensor
    row: int = -1

    @classmethod
    def nothing(cls, length: int, like: Tensor) -> Recent:
        """``length`` positions before all text, for keys like these."""
        none = torch.full((length,), -1, device=like.device)
        keys = like.new_zeros((length, like.shape[1]))
        return cls(keys, none, none[:, None].expand(-1, CONTEXT), none)

    @classmethod
    def stacked(cls, several: Sequence[Recent]) -> Recent:
        """B of as many positions each, as one with (B, M, ...) in the place of (M, ...)."""
        parts = zip(*(one._parts for one in several), strict=True)
        keys, tokens, before, documents = (
            torch.stack(part) if len(part) > 1 else part[0][None]  # which copies nothing
            for part in parts
        )
        return cls(keys, tokens, before, documents, several[0].row)

    def __len__(self) -> int:
        return len(self.tokens)

    def __add__(self, other: Recent) -> Recent:
        keys, tokens, before, documents = map(
            torch.cat, zip(self._parts, other._parts, strict=True)
        )
        return Recent(keys, tokens, before, documents, other.row)

    def __getitem__(self, part: slice) -> Recent:
        keys, tokens, before, documents = (whole[part] for whole in self._parts)
        return Recent(keys, tokens, before, documents, self.row)

    @property
    def _parts(self) -> tuple[Tensor, ...]:
        return self.keys, self.tokens, self.before, self.documents

    def ending(self, tokens: Tensor) -> Recent:
        """The same, now that it is known what followed the last positions."""
        return replace(self, tokens=ending(self.tokens, tokens))

    def without(self, count: int) -> Recent:
        """The same without the last ``count`` positions; what followed the rest is not known."""
        fewer = replace(self[: len(self) - count], row=self.row - count)
        return fewer.ending(self.tokens.new_full((1,), -1))


@dataclass(frozen=True)
class Piece:
    """Some positions of a text, in its order.

    Attributes:
        places: (n,) int64, of these among all contexts.
        queries: the positions, n.
        text: so many positions before them, and themselves.
    """

    places: Tensor
    queries: Recent
    text: Recent

    @classmethod
    def nothing(cls, contexts: Contexts) -> Piece:
        """No position, of contexts like these."""
        none, before = (Recent.nothing(size, contexts.features.float()) for size in (0, STEP))
        return cls(contexts.rows.new_empty(0), none, before)


@dataclass(frozen=True)
class Read:
    """What was read of a text.

    Attributes:
        places: (n,) int64, of the new positions among all contexts.
        text: what is known of the text before them, and themselves.
    """

    places: Tensor
    text: Recent

    def pieces(self, length: int) -> list[Piece]:
        """All of them, with so many positions before each; there are none before all text."""
        text, wanted = self.text[-length - len(self.places) :], length + len(self.places)
        if len(text) < wanted:
            text = Recent.nothing(wanted - len(text), text.keys) + text
        return [
            Piece(
                self.places[start : start + size],
                text[length + start : length + start + size],
                text[start : start + length + size],
            )
            for start in range(0, len(self.places), QUERIES_AT_A_TIME)
            for size in (min(QUERIES_AT_A_TIME, len(self.places) - start),)
        ]


def alike(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Groups of as many positions each, and not too many together."""
    groups: dict[int, list[list[Piece]]] = {}
    for piece in pieces:
        size = len(piece.places)
        some = groups.setdefault(size, [[]])
        if (len(some[-1]) + 1) * size > QUERIES_AT_A_TIME:
            some.append([])
        some[-1].append(piece)
    return [group for some in groups.values() for group in some]
