"""Search in shards: lists chosen once, queries to one copy of each shard, answers merged."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq_knnlm.cluster.connect import ray_library
from fairseq_knnlm.cluster.merging import Found, doubtful, joined, merged, replaced
from fairseq_knnlm.cluster.replicas import Call, Replicas
from fairseq_knnlm.cluster.shard import Asked
from fairseq_knnlm.index.card import IndexCard
from fairseq_knnlm.index.library import faiss, has_lists, innermost

#: Queries that are asked together, and how many such calls are on their way.
AT_A_TIME, AHEAD = 1024, 2
#: A shard is asked for its share of the neighbours, and so many times the square root of that more,
#: since near entries lie together in a text: several times what chance would make of it. For more
#: where a larger part of the queries has to be asked again, which takes a round more; for fewer
#: where a smaller part has to.
MARGIN, SELDOM, TOO_OFTEN, LESS, MORE = 8.0, 0.002, 0.01, 0.95, 1.25


class ShardedIndex:
    """An index whose entries lie in shards; searched as one that is whole.

    Args:
        trained: FAISS's index without entries: its transforms and lists.
        card: what the whole is, with the lists to visit.
        shards: that together hold all entries.
        held: entries of each.
    """

    def __init__(
        self, trained: Any, card: IndexCard, shards: Sequence[Replicas], held: Sequence[int]
    ) -> None:
        self.card = card
        self.shards = shards
        self._whole = trained  # FAISS does not keep it for what lies within
        self._trained = faiss.downcast_index(trained)
        self._inner = innermost(trained)
        self._held = held
        self._margins = np.full(len(shards), MARGIN)
        #: Queries of which a shard was asked again, since it might have had more neighbours.
        self.asked_again = 0

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest entries.

        Args:
            queries: (N, D) float32.
            k: neighbours a query.

        Returns:
            distances (N, k) float32, squared L2 or inner product, best first; ids (N, k) int64,
            -1 where fewer than k were found. Both on the queries' device.

        Raises:
            KnnlmError: where a shard has died and does not come back.
        """
        found = joined(list(self._answers(self._prepared(queries), k)))
        distances, ids = torch.from_numpy(found.distances), torch.from_numpy(found.rows).long()
        return distances.to(queries.device), ids.to(queries.device)

    def begin(self, queries: Tensor, k: int, similarity: str = "") -> Callable[[], Found]:
        """Asks for the k nearest entries, with their values and, where asked for, exact distances.

        Args:
            queries: (N, D) float32.
            k: neighbours a query.
            similarity: ``"l2"`` or ``"dot"`` has shards recompute distances on their keys.

        Returns:
            What waits for what was found, and returns it.

        Raises, when that is called:
            KnnlmError: where a shard has died and does not come back.
            DatastoreError: where keys are missing or damaged.
        """
        asked = self._prepared(queries)._replace(similarity=similarity, values=True)
        if similarity:
            asked = asked._replace(keys=queries.cpu().numpy())
        answers = self._answers(asked, k)
        return lambda: joined(list(answers))

    def check_files(self) -> int:
        """Has shards wait until their keys were compared with their checksums, if they read any.

        Raises:
            DatastoreError: where keys are damaged.
        """
        calls = [shard.ask("check_files") for shard in self.shards]
        return sum(call.answer() for call in calls)

    def _prepared(self, asked: Tensor) -> Asked:
        """What shards are asked. Lists are chosen here, once for all of them."""
        queries = np.ascontiguousarray(asked.cpu().numpy())
        if isinstance(self._trained, faiss.IndexPreTransform):
            chain: Any = self._trained.chain
            for number in range(chain.size()):
                queries = faiss.downcast_VectorTransform(chain.at(number)).apply(queries)
        if not has_lists(self._inner):
            return Asked(queries)
        nearness, lists = self._inner.quantizer.search(queries, self.card.nprobe)
        return Asked(queries, lists.astype(np.int32), nearness)

    def _answers(self, asked: Asked, k: int) -> Iterator[Found]:
        """What is nearest, some queries at a time; while that is merged, shards do the next.

        The first ones are asked at once, before anybody waits for an answer.
        """
        starts = range(0, max(1, len(asked.queries)), AT_A_TIME)
        parts = (asked.some(slice(start, start + AT_A_TIME)) for start in starts)
        calls = ((some, self._ask(some, self._fewer(k))) for some in parts)
        waiting = deque(islice(calls, AHEAD))

        def answers() -> Iterator[Found]:
            while waiting:
                waiting.extend(islice(calls, 1))
                yield self._answer(*waiting.popleft(), k)

        return answers()

    def _ask(self, asked: Asked, counts: Sequence[int]) -> list[Call]:
        reference = ray_library().put(asked)
        return [self._ask_one(number, reference, k) for number, k in enumerate(counts)]

    def _ask_one(self, number: int, reference: Any, k: int) -> Call:
        return self.shards[number].ask("search", reference, min(k, self._held[number]))

    def _answer(self, asked: Asked, calls: Sequence[Call], k: int) -> Found:
        found = [call.answer() for call in calls]
        largest = self.card.metric == "ip"
        best = merged(found, k, largest=largest)
        doubts = doubtful(found, self._held, best, largest=largest)
        if doubts.any():
            queries = np.asarray(doubts.any(axis=0))
            more = self._asked_again(asked, found, doubts, queries, k)
            for part, better in zip(best, merged(more, k, largest=largest), strict=True):
                if part is not None:
                    part[queries] = better
            self.asked_again += int(doubts.sum())
        if len(best.rows):
            often = doubts.mean(axis=1)
            self._margins[often > TOO_OFTEN] *= MORE
            self._margins[often < SELDOM] *= LESS
        return best

    def _asked_again(
        self, asked: Asked, found: Sequence[Found], doubts: np.ndarray, queries: np.ndarray, k: int
    ) -> list[Found]:
        """What shards find of some queries, those in doubt having been asked for all k.

        Args:
            asked: of N queries.
            found: of each shard, at first.
            doubts: (S, N) bool, whom to ask again of what.
            queries: (N,) bool, those of which anybody is asked again.
            k: neighbours a query.
        """
        calls = [
            self._ask_one(number, ray_library().put(asked.some(which)), k)
            for number, which in enumerate(doubts)
            if which.any()
        ]
        answers = iter(calls)
        more = []
        for some, which in zip(found, doubts, strict=True):
            part = some.each(lambda array: array[queries])
            if which.any():
                part = replaced(part, next(answers).answer(), which[queries])
            more.append(part)
        return more

    def _fewer(self, k: int) -> list[int]:
        """Neighbours that each shard is asked for at first."""
        share = k / len(self.shards)
        wanted = np.ceil(share + self._margins * share**0.5)
        return [min(k, int(count)) for count in wanted]
