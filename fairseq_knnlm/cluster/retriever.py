"""From queries to neighbours in one datastore that lies in shards."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fairseq_knnlm.cluster.search import ShardedIndex
from fairseq_knnlm.files import Checking
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

    def _check_keys(self) -> list[Checking]:
        return []  # by those who read them

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
        queries, recomputes = self._projected(queries), self.similarity != "do_not_recomp_l2"
        found = self.index.entries(queries, k, self.similarity if recomputes else "")
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
