"""What experts have in common that live on the text itself, and so must read it in its order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.experts.contract import Expert, reordered
from fairseq_knnlm.lm.contexts import Contexts


class Latest(Protocol):
    """What is kept of a text: its latest positions, the last of them at the end."""

    @property
    def row(self) -> int:
        """Of the last position; -1 before all text."""

    def ending(self: K, tokens: Tensor) -> K:
        """The same, now that it is known what followed the last positions."""

    def without(self: K, count: int) -> K:
        """The same without the last ``count`` positions; what followed the rest is not known."""


K = TypeVar("K", bound=Latest)


class OnText(Generic[K]):
    """An expert, or part of one, that keeps the latest positions of each text.

    What followed the last of them is not known when they are kept: it is told (``observe``), or
    stands before the next context.
    """

    name: str

    def __init__(self) -> None:
        self._texts: dict[int, K] = {}
        self._asked: list[tuple[int, Tensor]] = []

    def observe(self, tokens: Tensor) -> None:
        """Takes in what followed."""
        for text, order in self._asked:
            self._texts[text] = self._texts[text].ending(tokens[order])
        self._asked = []

    def reorder(self, order: Tensor) -> None:
        """Text i goes on where text ``order[i]`` stood."""
        self._asked = []
        self._texts = reordered(self._texts, order)

    def forget(self, counts: Tensor) -> None:
        """Takes back the last ``counts[i]`` contexts of text i."""
        self._asked = []
        for text, count in enumerate(counts.tolist()):
            if count and text in self._texts:
                self._texts[text] = self._texts[text].without(count)

    def follow(self, other: Expert) -> None:
        """Goes on in the texts from where another stands, which looks back no less."""
        assert isinstance(other, type(self))
        self._asked, self._texts = [], dict(other._texts)

    def _new(self, contexts: Contexts) -> Iterator[tuple[int, Tensor]]:
        """Each text of some contexts, which are now read, and their places (n,) in its order."""
        self._asked = []
        for text, places in contexts.by_text().items():
            order = places[contexts.rows[places].argsort()]
            order = order[contexts.rows[order] >= 0]  # an added beginning of sentence is no text
            if len(order):
                yield text, order

    def _earlier(self, text: int, contexts: Contexts, order: Tensor) -> K | None:
        """What is known of a text before these contexts of it; None where it begins.

        Raises:
            ConfigError: where the first of them lies before one that was already read.
        """
        known, first = self._texts.get(text), int(contexts.rows[order[0]])
        if known is None or (contexts.texts is not None and first == 0):
            return None
        if first <= known.row:
            raise ConfigError(
                f"the expert {self.name} needs the text in its order",
                expected=f"tokens after row {known.row:,}",
                found=f"row {first:,}",
                do="report this: the loader gave blocks out of order",
            )
        return known.ending(contexts.before[order[:1], 0]) if first == known.row + 1 else known

    def _keep(self, text: int, latest: K, order: Tensor) -> None:
        """From now on this is kept of a text: it ends with these contexts, in their order."""
        self._texts[text] = latest
        self._asked.append((text, order))


def followed(contexts: Contexts, order: Tensor) -> Tensor:
    """(n,) the token after each of some contexts in the order of their text; -1 where none knows.

    It is the next one that does, if it stands there.
    """
    rows, before = contexts.rows[order], contexts.before[order, 0]
    tokens = torch.full_like(before, -1)
    known = rows[1:] == rows[:-1] + 1
    tokens[:-1][known] = before[1:][known]
    return tokens


def documents_ended(tokens: Tensor, eos: int, earlier: Tensor | None = None) -> Tensor:
    """(n,) int64, how many documents ended before each of some tokens: an empty line ends one.

    Args:
        tokens: (n,), of a text.
        eos: the token that ends a line; two in a row are an empty line.
        earlier: the tokens before them, of which the last two matter; left out, there are none.
    """
    last = tokens[:0] if earlier is None else earlier[-2:]
    last = torch.nn.functional.pad(last, (2 - len(last), 0), value=-1)
    ends = torch.cat([last, tokens]) == eos
    return (ends[:-2] & ends[1:-1]).cumsum(dim=0)


def ending(tokens: Tensor, told: Tensor) -> Tensor:
    """Tokens (M,), the last of which are those that were told (n,), as far as they go back."""
    count = min(len(tokens), len(told))
    return torch.cat([tokens[: len(tokens) - count], told[len(told) - count :]])
