"""Pointers: the neighbours of a token lead to those of the next (Alon et al., 2022, RetoMaton).

Row i + 1 of a datastore follows row i in its text, unless that ends there. Where a candidate's
value turned out to be the token that was read, the row after it is a pointer: a candidate for the
next token, at no search.
So a way that the text once took is followed for as long as this one goes the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fairseq_knnlm.experts.contract import Expert, reordered
from fairseq_knnlm.experts.knn import KnnExpert, KnnSetting
from fairseq_knnlm.lm.contexts import Contexts
from fairseq_knnlm.retrieval.local import LocalRetriever
from fairseq_knnlm.retrieval.neighbours import Neighbours

#: Rows after which pointers are forgotten. Runs of so many rows are independent of each other, so
#: those of a batch are gone through side by side, a step of each at a time.
RUN = 64
#: At most k / 4 pointers are kept. Few tokens have as many; a cap of k gains next to nothing.
PART_OF_K = 4


class PointerExpert(KnnExpert):
    """p_kNN over the neighbours and the pointers, or over the pointers alone where they suffice.

    A token's pointers depend on earlier tokens of its run alone. Where the row before it was not
    scored just before, it has none. Of more than k / 4 those come first that were pointers
    already, then the successors of the nearest neighbours.

    Args:
        retriever: with distances recomputed as squared L2, so that all of them compare; its
            datastore holds the text in its order, unmerged.
        k: neighbours a search.
        settings: temperatures and the like, a column each.
        least: search only where there are fewer pointers than this; None to search every token.
        features: name features too.
        name: ``knn``, with a number from the second datastore on.

    Attributes:
        queries: tokens so far.
        searches: those of them that were searched.
    """

    looks_back = RUN - 1

    def __init__(
        self,
        retriever: LocalRetriever,
        k: int,
        settings: Sequence[KnnSetting],
        *,
        least: int | None = None,
        features: bool = False,
        name: str = "knn",
    ) -> None:
        assert retriever.similarity == "l2" and not retriever.store.manifest.merged
        super().__init__(retriever, k, settings, features=features, name=name)
        self.memory = retriever
        self.least = least
        self.most = max(1, k // PART_OF_K)
        self._texts: dict[int, tuple[int, Tensor]] = {}

    def start_counting(self) -> None:
        super().start_counting()
        self.queries = self.searches = 0

    def reorder(self, order: Tensor) -> None:
        """Text i goes on where text ``order[i]`` stood."""
        self._texts = reordered(self._texts, order)

    def follow(self, other: Expert) -> None:
        """Goes on from where others' pointers lead."""
        assert isinstance(other, PointerExpert)
        self._texts = dict(other._texts)

    def ahead(self, contexts: Contexts) -> None:
        """The same, where every token is searched."""
        if self.least is None:
            super().ahead(contexts)

    def near(self, contexts: Contexts) -> Neighbours:
        """The neighbours found, and beside them the pointers; (N, k + P) with P at most k / 4."""
        keys, rows, read = contexts.keys, contexts.rows, contexts.before[:, 0]
        assert keys is not None
        ids = rows.new_full((len(keys), self.k), -1)
        distances = torch.full(ids.shape, torch.inf, device=ids.device)
        pointers = rows.new_full((len(keys), self.most), -1)
        if self.least is None:
            ids, distances = self._search(keys)
        by_text = contexts.by_text()
        begins = torch.cat([_begins(rows[places]) for places in by_text.values()])
        for text, places in by_text.items():
            self._go_on(text, places, rows, read, pointers)
        for places in _steps(begins):
            going_on = places[~begins[places]]
            candidates = torch.cat([pointers[going_on - 1], ids[going_on - 1]], dim=1)
            pointers[going_on] = self._successors(candidates, read[going_on])
            if self.least is not None:
                asking = places[(pointers[places] >= 0).sum(dim=1) < self.least]
                ids[asking], distances[asking] = self._search(keys[asking])
            pointers[places] = _without(pointers[places], ids[places])
        for text, places in by_text.items():
            last = places[-1]
            self._texts[text] = int(rows[last]), torch.cat([pointers[last], ids[last]])
        self.queries += len(keys)
        pointers = _trimmed(pointers)
        their_distances = self.memory.distances_to(keys, pointers)
        return self.memory.entries(
            torch.cat([ids, pointers], dim=1), torch.cat([distances, their_distances], dim=1)
        )

    def _go_on(
        self, text: int, places: Tensor, rows: Tensor, read: Tensor, pointers: Tensor
    ) -> None:
        """Sets the pointers of a text's first context, where it goes on from the last one seen."""
        first = int(places[0])
        if text not in self._texts:
            return
        row, candidates = self._texts[text]
        if int(rows[first]) == row + 1 and int(rows[first]) % RUN:
            pointers[first] = self._successors(candidates[None], read[first : first + 1])[0]

    def _search(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and distances of the k nearest, each (N, k)."""
        self.searches += len(keys)
        found = self.memory.search(keys, self.k)
        return found.ids, found.distances

    def _successors(self, candidates: Tensor, tokens: Tensor) -> Tensor:
        """(S, most) int64: rows after those candidates (S, C) whose values are the tokens (S,)."""
        values = self.memory.tokens_before(candidates, 0)
        followed = (values == tokens[:, None]) & self.memory.goes_on(candidates)
        queries, columns = followed.nonzero(as_tuple=True)
        places = followed.cumsum(dim=1)[queries, columns] - 1
        kept = places < self.most
        found = candidates.new_full((len(candidates), self.most), -1)
        found[queries[kept], places[kept]] = candidates[queries, columns][kept] + 1
        return found


def _begins(rows: Tensor) -> Tensor:
    """(N,) bool: contexts of a text that do not go on from the one before them here."""
    begins = rows % RUN == 0
    begins[0] = True
    begins[1:] |= rows[1:] != rows[:-1] + 1
    return begins


def _steps(begins: Tensor) -> Iterator[Tensor]:
    """Places of the first contexts of all runs, then of the second ones, and so on."""
    places = torch.arange(len(begins), device=begins.device)
    offsets = places - places.where(begins, 0).cummax(dim=0).values
    for step in range(int(offsets.max()) + 1):
        yield places[offsets == step]


def _without(pointers: Tensor, ids: Tensor) -> Tensor:
    """Pointers (S, P), -1 in the place of those that are among the ids (S, K)."""
    ordered = ids.sort(dim=1).values
    places = torch.searchsorted(ordered, pointers).clamp_max(ids.shape[1] - 1)
    return pointers.masked_fill(ordered.gather(1, places) == pointers, -1)


def _trimmed(pointers: Tensor) -> Tensor:
    """The same without columns that hold none."""
    width = int((pointers >= 0).sum(dim=1).max())
    return pointers.sort(dim=1, descending=True).values[:, :width]
