"""From queries to neighbours in one datastore on this machine, whatever index answers them."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fairseq_knnlm.datastore import Datastore, key_files
from fairseq_knnlm.errors import DatastoreError, IndexFileError, ModelError
from fairseq_knnlm.files import Checks, check_mapped
from fairseq_knnlm.index.card import IndexCard
from fairseq_knnlm.index.distances import GATHER_BYTES, as_keys, as_tensor, distances_to_rows
from fairseq_knnlm.retrieval.neighbours import Neighbours


class Searches(Protocol):
    """Finds the nearest entries: a FAISS index, or exact search."""

    card: IndexCard

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Distances (N, k) and ids (N, k) of queries (N, D)."""


class LocalRetriever:
    """Answers queries from an index, with the index's own distances or exact ones.

    Args:
        index: where the nearest ids come from.
        store: the values, and the keys where distances are recomputed.
        similarity: ``"l2"`` or ``"dot"`` recompute on the stored keys; ``"do_not_recomp_l2"``
            takes what the index says.
    """

    elsewhere = False

    def __init__(self, index: Searches, store: Datastore, similarity: str) -> None:
        self.index = index
        self.store = store
        self.similarity = similarity
        self._values = as_tensor(store.values)
        self._breaks: Tensor | None = None
        self._weights = None if store.weights is None else as_tensor(store.weights)
        self._projection = None if store.projection is None else as_tensor(store.projection)
        recomputes = similarity != "do_not_recomp_l2"
        self._keys = as_keys(store.full_keys()) if recomputes else None
        self._checks = self._check_keys() if recomputes else Checks({})

    def _check_keys(self) -> Checks:
        """Has the files of the keys read and compared, beside everything else."""
        return Checks(key_files(self.store))

    def check_files(self) -> int:
        """Waits until every key of the files that are read was compared with its checksum.

        Returns:
            How many chunks of the files were left for this when they were opened.

        Raises:
            DatastoreError: where keys are damaged.
        """
        return self._checks.wait()

    @property
    def vocabulary(self) -> int:
        """Types of the dictionary, V."""
        return self.store.manifest.origin.vocabulary

    def token_counts(self) -> Tensor:
        """(V,) int64, how often each token is a value."""
        counts = np.bincount(self.store.values, minlength=self.vocabulary)
        return torch.from_numpy(counts)

    @property
    def recomputes(self) -> bool:
        """Whether distances are computed on the keys, and not the index's own."""
        return self.similarity != "do_not_recomp_l2"

    @property
    def measures_l2(self) -> bool:
        """Whether the distances are squared L2, or the index's approximation of it."""
        return self.similarity == "l2" if self.recomputes else self.index.card.metric == "l2"

    @property
    def distances(self) -> str:
        """What the distances are, in words for a report."""
        if self.similarity != "do_not_recomp_l2":
            what = "squared L2" if self.similarity == "l2" else "inner product"
            return f"exact {what}, recomputed on {self.store.manifest.key_dtype} keys"
        kind = "exact" if self.index.card.exact else "approximate"
        what = "squared L2" if self.index.card.metric == "l2" else "inner product"
        return f"{kind} {what}, from the index"

    def search(self, queries: Tensor, k: int) -> Neighbours:
        """The k nearest entries.

        Args:
            queries: (N, D), any float type, any device; D is the language model's width.
            k: neighbours a query.

        Raises:
            DatastoreError: where keys or values that were found are none, or a file shrank.
            IndexFileError: where the index names entries that the datastore does not have.
            ModelError: where a query is not finite.
        """
        queries = self._projected(queries)
        found, ids = self.index.search(queries, k)
        self._check_ids(ids)
        if self.similarity == "do_not_recomp_l2":
            return self.entries(ids, found if self.index.card.metric == "l2" else found.neg_())
        return self.entries(ids, self._recompute(queries, ids.clamp_min(0)))

    def ahead(self, queries: Tensor, k: int) -> None:
        """Nothing: while this process searches it does nothing else."""

    def entries(self, ids: Tensor, distances: Tensor, values: Tensor | None = None) -> Neighbours:
        """Entries as neighbours.

        Args:
            ids: (N, K) int64, rows of the datastore; -1 where missing.
            distances: (N, K) float32, anything where missing; written to.
            values: (N, K) token ids, where they are known already.
        """
        valid = ids >= 0
        rows = ids
        if bool(valid.all()):
            sound = _all_finite(distances)
        else:
            rows = ids.clamp_min(0)
            distances.masked_fill_(~valid, torch.inf)
            sound = torch.equal(distances.isfinite(), valid)
        if not sound:
            raise DatastoreError(
                f"the index of {self.store.path} gives distances that are no numbers",
                expected="finite distances",
                found="NaN or infinity",
                do="check the datastore with `fairseq-knnlm verify`, and build the index again",
            )
        values = self._values_of(rows) if values is None else self._checked(values)
        return Neighbours(ids, distances, values, valid, self._log_weights_of(rows))

    def distances_to(self, queries: Tensor, ids: Tensor) -> Tensor:
        """Recomputed distances to a few entries, (N, K) float32, infinite where missing.

        Args:
            queries: (N, D), as for ``search``.
            ids: (N, K) int64, rows of the datastore; -1 where missing, which costs nothing.
        """
        queries = self._projected(queries)
        distances = torch.full(ids.shape, torch.inf, device=ids.device)
        for pairs in (ids >= 0).nonzero().split(GATHER_BYTES // (queries.shape[1] * 4)):
            asking, columns = pairs.unbind(dim=1)
            wanted = ids[asking, columns][:, None]
            distances[asking, columns] = self._recompute(queries[asking], wanted)[:, 0]
        return distances

    def _projected(self, queries: Tensor) -> Tensor:
        """Queries as the datastore's keys are."""
        queries = queries.detach().float()
        if not _all_finite(queries):
            raise ModelError(
                "the language model gives keys that are NaN or infinite",
                expected="finite keys to search with",
                found="others, as where float16 overflows or a checkpoint is damaged",
                do="leave --fp16 out, or check the checkpoint",
            )
        if self._projection is None:
            return queries
        self._projection = self._projection.to(queries.device)
        return queries @ self._projection

    def tokens_before(self, ids: Tensor, steps: int) -> Tensor:
        """The values ``steps`` rows before entries: the tokens that stand there in the text.

        Args:
            ids: rows of the datastore, any shape; below 0 where missing.
            steps: 1 for the token just before an entry's value; 0 for that value itself.

        Returns:
            Token ids of the same shape; -1 where there are none: before the text begins, or where
            what stood before an entry was merged away.
        """
        if self.store.manifest.merged:
            return torch.full_like(ids, -1)
        rows = ids - steps
        tokens = self._values_of(rows.clamp_min(0)).masked_fill(rows < 0, -1)
        if steps and self._has_breaks:
            tokens.masked_fill_(rows < self._first_rows(ids), -1)
        return tokens

    def goes_on(self, ids: Tensor) -> Tensor:
        """Whether the row after an entry follows it in its text; of the same shape, bool.

        Args:
            ids: rows of the datastore, any shape; below 0 where missing, which nothing follows.
        """
        found = (ids >= 0) & (ids + 1 < len(self.store))
        return found & (self._first_rows(ids + 1) <= ids) if self._has_breaks else found

    @property
    def _has_breaks(self) -> bool:
        """Whether the datastore holds several texts, and not one from its first row to its last."""
        return len(self.store.breaks) > 1

    def _first_rows(self, ids: Tensor) -> Tensor:
        """The row at which the text begins that each entry is from; 0 for a missing one."""
        if self._breaks is None or self._breaks.device != ids.device:
            self._breaks = torch.from_numpy(self.store.breaks).to(ids.device)
        texts = torch.searchsorted(self._breaks, ids.clamp_min(0), right=True) - 1
        return self._breaks[texts]

    def _check_ids(self, ids: Tensor) -> None:
        low, high = map(int, ids.aminmax()) if ids.numel() else (0, 0)
        if low < -1 or high >= len(self.store):
            raise IndexFileError(
                "the index names entries that the datastore does not have",
                expected=f"entries from 0 to {len(self.store) - 1:,}, or -1 for none",
                found=f"from {low:,} to {high:,}",
                do="build the index of this datastore again",
            )

    def _values_of(self, rows: Tensor) -> Tensor:
        """The tokens at these rows, from a copy of the values on the rows' device."""
        check_mapped(self.store.values, f"values of {self.store.path}")
        if self._values.device != rows.device:
            self._values = self._values.to(rows.device)
        values = self._values.index_select(0, rows.reshape(-1)).view(rows.shape)
        # uint16 travels as int16, with which torch can do more.
        if values.dtype == torch.int16:
            values = values.int().bitwise_and_(0xFFFF)
        return self._checked(values)

    def _checked(self, values: Tensor) -> Tensor:
        low, high = map(int, values.aminmax()) if values.numel() else (0, 0)
        if low < 0 or high >= self.store.manifest.origin.vocabulary:
            raise DatastoreError(
                f"values of {self.store.path} are no tokens of the dictionary",
                expected=f"from 0 to {self.store.manifest.origin.vocabulary - 1:,}",
                found=f"from {low:,} to {high:,}",
                do="check it with `fairseq-knnlm verify`, and save the datastore again",
            )
        return values

    def _log_weights_of(self, rows: Tensor) -> Tensor | None:
        if self._weights is None or self.store.weights is None:
            return None
        check_mapped(self.store.weights, f"weights of {self.store.path}")
        self._weights = self._weights.to(rows.device)
        return self._weights.index_select(0, rows.reshape(-1)).view(rows.shape).log()

    def _recompute(self, queries: Tensor, rows: Tensor) -> Tensor:
        """Distances of each query to its rows, (N, K) float32, on the keys as stored."""
        assert self._keys is not None
        self._checks.check()
        check_mapped(self.store.full_keys(), f"keys of {self.store.path}")
        return self._sound(distances_to_rows(self._keys, queries, rows, self.similarity))

    def _sound(self, found: Tensor) -> Tensor:
        """Recomputed distances, which are finite where the keys are."""
        if not _all_finite(found):
            raise DatastoreError(
                f"keys of {self.store.path} are NaN or infinite, or too large",
                expected="finite keys, and distances that float32 can hold",
                found="a neighbour whose recomputed distance is none",
                do="check it with `fairseq-knnlm verify`, and save the datastore again",
            )
        return found


def _all_finite(numbers: Tensor) -> bool:
    """Whether there is no NaN and no infinity among them, in one pass and no memory."""
    if not numbers.numel():
        return True
    low, high = numbers.aminmax()
    return math.isfinite(low) and math.isfinite(high)
