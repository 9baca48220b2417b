"""p_kNN: the nearest entries of a datastore vote for their values (Khandelwal et al., 2020)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fairseq_knnlm.experts.contract import Timeless
from fairseq_knnlm.experts.entries import Entries, Extents, Pairs
from fairseq_knnlm.experts.ordering import in_order
from fairseq_knnlm.experts.sparse import SparsePrediction, SparseSetting
from fairseq_knnlm.lm.contexts import Contexts
from fairseq_knnlm.retrieval.neighbours import Neighbours, Retriever

#: Temperatures in a score table: 0.25 to 512 in steps of the square root of 2.
TEMPERATURES = tuple(2.0 ** (step / 2) for step in range(-4, 19))
#: Neighbours of these queries at a time, which bounds memory where there are many of each.
NEIGHBOURS_AT_A_TIME = 2**21
#: |query - key|^2 / |query|^2 up to which they are the same but for rounding to float16.
SAME = 2.0**-22
#: Neighbours whose distance is a feature.
DISTANCE_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
#: Neighbours in whose tokens distinct ones are counted.
DISTINCT_RANKS = (8, 64, 1024)
#: Fewer neighbours in a score table.
FEWER = (1, 4, 16, 64, 256)
#: Tokens that a neighbour's context can be asked to share with the query's.
SUFFIXES = (1, 2, 3)
#: Parts of the distance between the nearest and the farthest neighbour that serve as temperature
#: where the shape of their distribution is a feature: so it needs no tuning, whatever the scale.
SPREADS = (4.0, 8.0)


@dataclass(frozen=True, order=True)
class KnnSetting:
    """How neighbours become a distribution.

    Attributes:
        suffix: count only neighbours whose last ``suffix`` tokens are those of the context.
        k: how many of the nearest count; 0 for all.
        temperature: T, divides the distances.
    """

    suffix: int = 0
    k: int = 0
    temperature: float = 1.0


def knn_grid(k: int) -> list[KnnSetting]:
    """The settings of a score table, for ``k`` neighbours.

    Octaves are enough for mixing; the temperature that is used alone is wanted finer.
    """
    octaves = TEMPERATURES[::2]
    return [
        *(KnnSetting(temperature=t) for t in TEMPERATURES),
        *(KnnSetting(k=fewer, temperature=t) for fewer in FEWER if fewer < k for t in octaves),
        *(KnnSetting(suffix=suffix, temperature=t) for suffix in SUFFIXES for t in octaves),
    ]


def recalled(near: Neighbours, keys: Tensor, tokens: Tensor) -> int:
    """How many of N contexts have an entry at no distance with the token (N,) that came.

    Where text is in the datastore, each of its tokens finds its own entry.

    Args:
        near: the neighbours of each.
        keys: (N, D), the queries.
    """
    limits = SAME * keys.float().square().sum(dim=1)
    rows = (near.distances.amin(dim=1) <= limits).nonzero().squeeze(1)
    same = near.distances[rows] <= limits[rows, None]
    return int((same & (near.values[rows] == tokens[rows, None])).any(dim=1).sum())


def entries_of(
    near: Neighbours, sharing: Sequence[Pairs] = (), fewer: Sequence[int] = ()
) -> Entries:
    """Neighbours as a prediction has them; scores are relative to the nearest.

    So small differences stay exact where distances are large.

    Args:
        near: K for each of N queries, the nearest first where fewer than all of them can count.
        sharing: for 1, 2, ... tokens: those whose last ones are those of the query.
        fewer: ascending numbers of nearest neighbours that may count alone.
    """
    columns = near.ids.shape[1]
    ends = [min(k, columns) for k in fewer] + [columns]
    extents = Extents([slice(*pair) for pair in pairwise([0, *ends])])
    nearest = near.distances.amin(dim=1, keepdim=True).nan_to_num(posinf=0.0)
    scores, counted = nearest - near.distances, None if near.all_found else near.valid
    return Entries(near.values, scores, counted, sharing, extents, near.log_weights)


def vote(near: Neighbours, temperatures: Sequence[float]) -> SparsePrediction:
    """p_kNN of all neighbours, a setting for each temperature."""
    settings = [SparseSetting(0, 0, 1 / temperature) for temperature in temperatures]
    return SparsePrediction(entries_of(near), settings)


class KnnPrediction(SparsePrediction):
    """p_kNN of N contexts.

    Args:
        near: their neighbours.
        entries: the same, as a prediction has them.
        settings: a column each.
        features: by name, (N,) or (N, M).
    """

    def __init__(
        self,
        near: Neighbours,
        entries: Entries,
        settings: Sequence[SparseSetting],
        features: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(entries, settings, features)
        self.near = near


class KnnExpert(Timeless):
    """p_kNN, from the k nearest entries of a datastore.

    With a suffix, of those entries alone that also share the context's last tokens, word for word:
    a pointer into the text goes on there (Alon et al., 2022, follow such pointers without search).

    Args:
        retriever: answers queries.
        k: neighbours.
        settings: temperatures and the like, a column each.
        features: name features too.
        name: ``knn``, with a number from the second datastore on.

    Attributes:
        search_seconds: spent so far.
        asked: tokens so far.
        recalled: those of them whose own entry seems to be in the datastore: one at no distance,
            with the right token.
    """

    def __init__(
        self,
        retriever: Retriever,
        k: int,
        settings: Sequence[KnnSetting],
        *,
        features: bool = False,
        name: str = "knn",
    ) -> None:
        self.retriever = retriever
        self.k = k
        self.at_a_time = max(1, min(self.at_a_time, NEIGHBOURS_AT_A_TIME // k))
        self.settings = [vars(setting) for setting in settings]
        self.features = features
        self.name = name
        self._fewer = sorted({setting.k for setting in settings if setting.k})
        suffixes = [setting.suffix for setting in settings] + [max(SUFFIXES) if features else 0]
        self._suffix = max(suffixes)
        self._columns = [
            SparseSetting(
                setting.suffix,
                self._fewer.index(setting.k) if setting.k else len(self._fewer),
                1 / setting.temperature,
            )
            for setting in settings
        ]
        self._last: tuple[Neighbours, Tensor] | None = None
        self.start_counting()
        if features:
            self._counts = retriever.token_counts().float().log1p()

    def start_counting(self) -> None:
        """Counts from here on."""
        self.search_seconds = 0.0
        self.asked = self.recalled = 0

    def predict(self, contexts: Contexts) -> KnnPrediction:
        """What follows contexts, given their keys."""
        assert contexts.keys is not None
        started = time.perf_counter()
        near = self.near(contexts)
        self.search_seconds += time.perf_counter() - started
        if self.features or self._fewer:
            near = near.nearest_first()
        entries = entries_of(near, list(self._sharing(near, contexts.before)), self._fewer)
        self.asked += len(contexts)
        if self.retriever.measures_l2:
            self._last = near, contexts.keys
        features = self._features(near, entries, contexts.before) if self.features else None
        return KnnPrediction(near, entries, self._columns, features)

    def ahead(self, contexts: Contexts) -> None:
        """Has the candidates looked for, if others do that, of contexts that come soon."""
        assert contexts.keys is not None
        self.retriever.ahead(contexts.keys, self.k)

    def observe(self, tokens: Tensor) -> None:
        """Counts the tokens whose own entry was found."""
        if self._last is not None:
            self.recalled += recalled(*self._last, tokens)
        self._last = None

    def near(self, contexts: Contexts) -> Neighbours:
        """The candidates."""
        assert contexts.keys is not None
        return self.retriever.search(contexts.keys, self.k)

    def _sharing(self, near: Neighbours, before: Tensor) -> Iterator[Pairs]:
        """For 1, 2, ... tokens: neighbours whose last ones are those (N, M) before the query."""
        if not self._suffix:
            return
        ours = before[:, :1]
        pairs = Pairs.of((self.retriever.tokens_before(near.ids, 1) == ours) & (ours >= 0))
        yield pairs
        for steps in range(2, self._suffix + 1):
            theirs = self.retriever.tokens_before(near.ids[pairs], steps)
            of_query = before[pairs.rows, steps - 1]
            pairs = pairs.among((theirs == of_query) & (of_query >= 0))
            yield pairs

    def _features(self, near: Neighbours, entries: Entries, before: Tensor) -> dict[str, Tensor]:
        ranks = [rank - 1 for rank in DISTANCE_RANKS if rank <= self.k]
        distances = near.distances[:, ranks]
        # What is missing counts for nothing, and its token for no type of its own.
        values = near.values
        if not near.all_found:
            distances = distances.masked_fill(~near.valid[:, ranks], torch.nan)
            values = values.where(near.valid, values[:, :1])
        ordered, places = in_order(values)
        first = torch.ones_like(near.valid)  # of its token
        first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        entropy, top = _shape(near, first, places)
        return {
            f"{self.name}_distances": distances,
            f"{self.name}_entropy": entropy,
            f"{self.name}_top": top,
            f"{self.name}_distinct": _distinct(first, places),
            f"{self.name}_shared": entries.counts().float().log1p(),
            f"{self.name}_frequency": self._frequency(before[:, 0]),
        }

    def _frequency(self, tokens: Tensor) -> Tensor:
        """log(1 + how often a token is a value of the datastore)."""
        self._counts = self._counts.to(tokens.device)
        return self._counts[tokens.clamp_min(0)].where(tokens >= 0, torch.nan)


def _shape(near: Neighbours, first: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy (natural) and log of the largest probability of p_kNN, each (N, len(SPREADS)).

    Args:
        near: N queries' neighbours.
        first: (N, K) bool, of neighbours in the order of their values: the first with its value.
        places: (N, K) where these stood.
    """
    token = first.cumsum(dim=1) - 1  # numbers a query's distinct tokens
    missing = ~near.valid
    nearest, farthest = near.distances[:, :1], near.distances.masked_fill(missing, -torch.inf)
    spread = (farthest.amax(dim=1, keepdim=True) - nearest).clamp_min(1e-6)
    entropies, tops = [], []
    for parts in SPREADS:
        weights = torch.softmax((nearest - near.distances) * (parts / spread), dim=1)
        weights = weights.nan_to_num(nan=0.0).gather(1, places)
        mass = torch.zeros_like(weights).scatter_add_(1, token, weights)
        entropies.append(torch.special.entr(mass).sum(dim=1))
        tops.append(mass.amax(dim=1).clamp_min(1e-9).log())
    return torch.stack(entropies, dim=1), torch.stack(tops, dim=1)


def _distinct(first: Tensor, places: Tensor) -> Tensor:
    """log of the number of distinct tokens among the nearest, (N, ranks).

    Args:
        first, places: as for ``_shape``; of those with the same value the nearest is first.
    """
    counts = [(first & (places < rank)).sum(dim=1) for rank in DISTINCT_RANKS]
    return torch.stack(counts, dim=1).float().log()
