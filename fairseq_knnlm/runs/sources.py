"""From the neighbours of a context to the sources of its token: text, document, picture."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import msgspec
import numpy as np
from torch import Tensor

from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.datastore.documents import Documents, around, first_line, read_documents
from fairseq_knnlm.explanation.picture import places
from fairseq_knnlm.explanation.record import Memory, Place, Source
from fairseq_knnlm.files import check_mapped
from fairseq_knnlm.mixture.shares import Found
from fairseq_knnlm.retrieval.local import LocalRetriever
from fairseq_knnlm.runs.documents import shown_name
from fairseq_knnlm.runs.opening import Memory as OpenedMemory
from fairseq_knnlm.runs.token_spelling import AnySpelling

logger = logging.getLogger(__name__)

#: Tokens that are shown before an entry's own, and after it.
BEFORE, AFTER = 12, 8
#: Of those before it, as many may be left out so that the first one begins a word.
CUT = 4


@dataclass(frozen=True)
class Asked:
    """A context, and the token that came after it.

    Attributes:
        token: its id.
        before: ids of the tokens before it, the last ``BEFORE`` at most.
        query: (D,) float32; None where there are no keys.
    """

    token: int
    before: Sequence[int]
    query: np.ndarray | None


@dataclass(frozen=True)
class Traced:
    """What is known of a token's sources; the attributes are those of ``Token``."""

    sources: Sequence[Source] = ()
    agreement: Sequence[float | None] = ()
    place: Place | None = None


@dataclass(frozen=True)
class Entry:
    """A neighbour that is a source.

    Attributes:
        store: the number of its datastore.
        row: there.
        distance: to the query.
        share: of the neighbours' probability.
        value: id of its token.
    """

    store: int
    row: int
    distance: float
    share: float
    value: int


@dataclass(frozen=True)
class Text:
    """A datastore as text.

    Attributes:
        expert: who asks it.
        store: its values, and its keys where it has some.
        index: what answers, in words.
        documents: where its documents begin, where that is known.
        spelling: of its tokens.
    """

    expert: str
    store: Datastore
    index: str
    documents: Documents | None
    spelling: AnySpelling

    @cached_property
    def _names(self) -> dict[int, str | None]:
        return {}

    def source(self, entry: Entry, asked: Asked) -> Source:
        """An entry of this datastore with its text."""
        spelling, store = self.spelling, self.store
        found = Source(
            entry.store,
            entry.row,
            entry.distance,
            min(entry.share, 1.0),
            "".join(spelling.pieces([entry.value])),
            entry.value == asked.token,
        )
        text = around(store, entry.row, BEFORE + 1, AFTER)
        if text is None:
            return found
        before, after = (part.tolist() for part in text)
        pieces = spelling.pieces([*before, entry.value, *after])
        here = len(before)
        first = _first_word(pieces[:here]) if here > BEFORE else 0
        name, row = self._document(entry.row)
        return msgspec.structs.replace(
            found,
            value=pieces[here],
            before="".join(pieces[first:here]),
            after="".join(pieces[here + 1 :]),
            matched=_matched(before[first:], asked.before),
            document=name,
            document_row=row,
        )

    def _document(self, row: int) -> tuple[str | None, int | None]:
        """The name of the document that a row is from, and where that begins."""
        if self.documents is None:
            return None, None
        number = int(self.documents.document_of(np.array([row]))[0])
        if number not in self._names:
            line = first_line(self.store, self.documents, number)
            name = self.spelling.text(line.tolist())
            self._names[number] = shown_name(name) or None
        return self._names[number], self.documents.extent(number)[0]

    def keys(self, rows: Sequence[int]) -> np.ndarray:
        """(n, D) of entries."""
        keys = self.store.full_keys()
        check_mapped(keys, f"keys of {self.store.path}")
        return np.asarray(keys[list(rows)], np.float32)


def _first_word(pieces: Sequence[str]) -> int:
    """The first piece that begins a word, of the first few behind the first; 1 where none does."""
    pairs = enumerate(pairwise(pieces[: CUT + 1]), start=1)
    begins = (n for n, (one, another) in pairs if one[-1:].isspace() or another.startswith(" "))
    return next(begins, 1)


def _matched(theirs: Sequence[int], ours: Sequence[int]) -> int:
    """How many of the last tokens are the same."""
    pairs = zip(reversed(theirs), reversed(ours), strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(theirs), len(ours)))


class Sources:
    """Finds the sources of tokens among the neighbours of their contexts.

    Args:
        memory: what a run opened; None where there is none.
        spelling: of the tokens.
        most: sources a token.

    Raises:
        DatastoreError: where the beginnings of documents are damaged.
    """

    def __init__(self, memory: OpenedMemory | None, spelling: AnySpelling, most: int) -> None:
        self._most = most
        experts = memory.experts if memory is not None else {}
        parts = {name: expert.parts for name, expert in experts.items()}
        self._texts = [
            _text_of(name, retriever, spelling)
            for name, retriever in parts.items()
            if isinstance(retriever, LocalRetriever)
        ]

    @property
    def memories(self) -> list[Memory]:
        """The datastores, as a record names them."""
        return [
            Memory(
                text.expert,
                text.store.path.name,
                text.store.fingerprint,
                len(text.store),
                text.index,
            )
            for text in self._texts
        ]

    def of(self, found: Mapping[str, Found], asked: Mapping[int, Asked]) -> dict[int, Traced]:
        """The sources of some of N contexts.

        Args:
            found: by the expert's name, the neighbours.
            asked: the contexts, by their place among the N.
        """
        entries: dict[int, list[Entry]] = {place: [] for place in asked}
        agreement: dict[int, list[float | None]] = {
            place: [None] * len(self._texts) for place in asked
        }
        for number, text in enumerate(self._texts):
            if text.expert not in found:
                continue
            for place, neighbours in _of_places(found[text.expert], asked).items():
                entries[place] += neighbours.largest(number, self._most)
                agreement[place][number] = neighbours.agreement()
        return {
            place: self._traced(entries[place], one, agreement[place])
            for place, one in asked.items()
        }

    def _traced(
        self, entries: list[Entry], asked: Asked, agreement: Sequence[float | None]
    ) -> Traced:
        entries = sorted(entries, key=lambda one: -one.share)[: self._most]
        sources = [self._texts[one.store].source(one, asked) for one in entries]
        drawn = self._drawn(entries, asked.query)
        if not drawn:
            return Traced(sources, agreement)
        query, *points = drawn.values()
        placed = dict(zip(list(drawn)[1:], points, strict=True))
        sources = [
            msgspec.structs.replace(source, place=placed.get(number))
            for number, source in enumerate(sources)
        ]
        return Traced(sources, agreement, query)

    def _drawn(self, entries: Sequence[Entry], query: np.ndarray | None) -> dict[int, Place]:
        """By the number of the entry, its place; the query's is the first, as number -1.

        Entries that lie in another space than the first one, where one of their datastores has a
        projection, are left out.
        """
        if query is None or not entries or self._space(entries[0]) is None:
            return {}
        space = self._space(entries[0])
        ours = [number for number, one in enumerate(entries) if self._space(one) == space]
        keys = [self._texts[entries[n].store].keys([entries[n].row]) for n in ours]
        projection = self._texts[entries[0].store].store.projection
        seen = query if projection is None else query @ projection
        points = places(seen, np.concatenate(keys))
        pairs = zip([-1, *ours], points.tolist(), strict=True)
        return {number: (x, y) for number, (x, y) in pairs}

    def _space(self, entry: Entry) -> int | None:
        """Which space its key lies in: -1 for the language model's; None where there is none."""
        store = self._texts[entry.store].store
        if store.keys is None:
            return None
        return -1 if store.projection is None else entry.store


def _text_of(name: str, retriever: LocalRetriever, spelling: AnySpelling) -> Text:
    store = retriever.store
    documents = None
    if store.manifest.merged:
        logger.warning(
            "entries of %s were merged: its sources are shown without the text around them",
            store.path,
        )
    else:
        documents = read_documents(store)
    index = f"{retriever.index.card.describe()}; {retriever.distances}"
    return Text(name, store, index, documents, spelling)


@dataclass(frozen=True)
class _Neighbours:
    """Those of one context that count: (K,) ids, distances, values and shares above 0."""

    ids: np.ndarray
    distances: np.ndarray
    values: np.ndarray
    shares: np.ndarray

    def largest(self, store: int, most: int) -> list[Entry]:
        """Those with the largest shares; of the same ones the nearest, then the earlier row."""
        order = np.lexsort((self.ids, self.distances, -self.shares))[:most]
        columns = (self.ids, self.distances, self.shares, self.values)
        rows = zip(*(column[order].tolist() for column in columns), strict=True)
        return [Entry(store, *row) for row in rows]

    def agreement(self) -> float | None:
        """The part of the probability that their likeliest token has; None where there is none."""
        if not len(self.shares):
            return None
        _, tokens = np.unique(self.values, return_inverse=True)
        sums = np.bincount(tokens, self.shares.astype(np.float64))
        return float(sums.max() / sums.sum())


def _of_places(found: Found, asked: Mapping[int, Asked]) -> dict[int, _Neighbours]:
    """The neighbours of each context that is asked of and was searched for."""
    near = found.near
    parts = [_array(part) for part in (near.ids, near.distances, near.values, found.shares)]
    counts = _array(near.valid) & (parts[-1] > 0)
    return {
        place: _Neighbours(*(part[n][counts[n]] for part in parts))
        for n, place in enumerate(found.rows.tolist())
        if place in asked
    }


def _array(tensor: Tensor) -> np.ndarray:
    found: np.ndarray = tensor.cpu().numpy()
    return found
