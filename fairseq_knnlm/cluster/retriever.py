"""From queries to neighbours in one datastore that lies in shards."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fairseq_knnlm.cluster.merging import Found
from fairseq_knnlm.cluster.search import ShardedIndex
from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.files import Checks
from fairseq_knnlm.retrieval.local import LocalRetriever
from fairseq_knnlm.retrieval.neighbours import Neighbours


class ShardedRetriever(LocalRetriever):
    """Answers queries from shards, which tell values and recompute distances themselves.

    This process reads keys only where somebody asks for distances to a few entries of his own.

    Args:
        index: of the datastore, in shards.
        store, similarity: as for ``LocalRetriever``.
    """

    index: ShardedIndex
    elsewhere = True

    def __init__(self, index: ShardedIndex, store: Datastore, similarity: str) -> None:
        super().__init__(index, store, similarity)
        #: Queries that were asked ahead, and what waits for their answers; the oldest first.
        self._ahead: deque[tuple[Tensor, int, Callable[[], Found]]] = deque()

    def _check_keys(self) -> Checks:
        return Checks({})  # by those who read them

    def check_files(self) -> int:
        """As ``LocalRetriever.check_files`` does, of what shards read."""
        return self.index.check_files()

    def search(self, queries: Tensor, k: int) -> Neighbours:
        """The k nearest entries.

        Args:
            queries, k: as for ``LocalRetriever.search``.

        Raises:
            KnnlmError: where a shard has died and does not come back; else as that does.
        """
        queries = self._projected(queries)
        found = self._begun(queries, k)()
        assert found.values is not None
        tokens = found.values.astype(np.int32) if found.values.itemsize < 4 else found.values
        ids = torch.from_numpy(found.rows).to(queries.device).long()
        values = torch.from_numpy(tokens).to(queries.device)
        self._check_ids(ids)
        if found.exact is not None:
            distances = self._sound(torch.from_numpy(found.exact).to(queries.device))
        else:
            distances = torch.from_numpy(found.distances).to(queries.device)
            if self.index.card.metric == "ip":
                distances.neg_()
        return self.entries(ids, distances, values)

    def ahead(self, queries: Tensor, k: int) -> None:
        """Has shards look for queries that ``search`` will be asked of soon, in the same order."""
        queries = self._projected(queries)
        self._ahead.append((queries, k, self._begin(queries, k)))

    def _begun(self, queries: Tensor, k: int) -> Callable[[], Found]:
        """What was begun for these queries, or begins now."""
        if self._ahead:
            asked, count, found = self._ahead.popleft()
            if count == k and torch.equal(asked, queries):
                return found
            self._ahead.clear()  # somebody asks for others, or in another order
        return self._begin(queries, k)

    def _begin(self, queries: Tensor, k: int) -> Callable[[], Found]:
        recomputes = self.similarity != "do_not_recomp_l2"
        return self.index.begin(queries, k, self.similarity if recomputes else "")
