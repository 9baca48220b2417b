"""Those who search: exact search, the published procedure, and ours."""

import time
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Protocol

import numpy as np
import torch
from common.commands import RunError
from material import EXAMINED, FROM_INDEX, Material, load
from torch import Tensor

from fairseq_knnlm.datastore import Datastore, open_datastore
from fairseq_knnlm.index.search import SearchIndex
from fairseq_knnlm.retrieval.local import LocalRetriever
from fairseq_knnlm.retrieval.neighbours import Neighbours

Search = Callable[[Tensor, int], Neighbours]
#: For an index whose nprobe is known.
UNEXAMINED = 0
#: Share of the true neighbours that the lists visited should hold where distances are exact.
RECALL_FOR_EXACT = 0.95
#: Tokens that the paper's evaluation scores in a batch. The keys of all their neighbours are
#: gathered at once.
AT_A_TIME = 512


class Published:
    """The search of urvashik/knnlm, written out.

    The index finds ids; NumPy, in one thread, gathers their keys from the memory map; torch repeats
    the queries and sums the squared differences (``dist_func`` there); the values come from their
    memory map. Keys are as the datastore has them, in float16; the paper's were float32.
    """

    def __init__(self, index: SearchIndex, store: Datastore) -> None:
        self._index = index.index
        self._keys, self._values = store.keys, store.values
        assert self._keys is not None

    def search(self, queries: Tensor, k: int) -> Neighbours:
        """The k nearest entries of (N, D) float32 queries."""
        _, ids = self._index.search(queries.numpy(), k)
        distances = []
        for asked, rows in zip(queries.split(AT_A_TIME), _split(ids), strict=True):
            keys = torch.from_numpy(self._keys[rows])  # type: ignore[index]
            repeated = asked[:, None].repeat(1, k, 1)
            distances.append(torch.sum((repeated - keys) ** 2, dim=2))
        values = torch.from_numpy(self._values[ids].astype(np.int64))
        valid = torch.from_numpy(ids >= 0)
        exact = torch.cat(distances).masked_fill(~valid, torch.inf)
        return Neighbours(torch.from_numpy(ids), exact, values, valid)


def _split(ids: np.ndarray) -> list[np.ndarray]:
    return np.split(ids, range(AT_A_TIME, len(ids), AT_A_TIME))


class Searching(Protocol):
    """Searches by name."""

    k: int

    def of(self, name: str) -> Search: ...


class Searches:
    """Every way of searching, by name. An index is read or built when it is first asked for.

    Args:
        material: whose indexes.
        k: neighbours a query.
    """

    def __init__(self, material: Material, k: int) -> None:
        self.material = material
        self.k = k

    @cache  # noqa: B019  (there is one, and it lives as long as the program)
    def of(self, name: str) -> Search:
        """``exact``, ``ours``, ``ours_exact``, ``ivfpq``, ``published`` or ``streamed``."""
        store = self.material.store
        if name == "streamed":
            bare = open_datastore(self.material.streamed(), load_keys=False)
            return LocalRetriever(load(bare.index_path, bare, self.k), bare, FROM_INDEX).search
        if name == "exact":
            # Not kept in a file: it is nothing but the keys.
            index = SearchIndex(*self.material.build("Flat", UNEXAMINED))
            return LocalRetriever(index, store, FROM_INDEX).search
        if name == "published":
            return Published(self._paper, store).search
        if name == "ours_exact":
            return LocalRetriever(self._ours_for_exact, store, "l2").search
        index = self._paper if name == "ivfpq" else self._ours
        return LocalRetriever(index, store, FROM_INDEX).search

    @cached_property
    def _ours(self) -> SearchIndex:
        return self.material.index("auto", EXAMINED)

    @cached_property
    def _ours_for_exact(self) -> SearchIndex:
        """Exact distances are worth little where neighbours are missed: more lists are visited."""
        return self.material.index("auto", EXAMINED, recall=RECALL_FOR_EXACT)

    @cached_property
    def _paper(self) -> SearchIndex:
        return self.material.index("paper", UNEXAMINED)

    def rate(self, name: str, batches: Sequence[Tensor]) -> float:
        """Queries a second of one search in batch after batch, once it is under way."""
        search = self.of(name)
        search(batches[0], self.k)  # the rival before it left the caches as it needed them
        started = time.perf_counter()
        for queries in batches:
            search(queries, self.k)
        return sum(map(len, batches)) / (time.perf_counter() - started)

    def check_published(self, queries: Tensor) -> None:
        """Compares the published procedure with the plugin's, on the same index.

        Raises:
            RunError: where they find other neighbours or distances.
        """
        theirs = self.of("published")(queries, self.k)
        ours = LocalRetriever(self._paper, self.material.store, "l2").search(queries, self.k)
        same = torch.equal(theirs.ids, ours.ids) and torch.equal(theirs.values, ours.values.long())
        if not (same and torch.allclose(theirs.distances, ours.distances, rtol=1e-4)):
            raise RunError("the published procedure, as written here, finds something else")
