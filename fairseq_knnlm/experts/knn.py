"""Experts: each gives a log-probability for every scored token.

The language model is the first. The others stand here, but for the continuous cache (``cache``).
An expert may speak in several settings at once, such as several temperatures; each is a column. A
mixer weighs the columns (``mixers``). An expert may also name features, numbers that a mixer can
go by: they depend on the context, never on the token to be predicted.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fairseq_knnlm.experts.kneser_ney import NGramModel
from fairseq_knnlm.lm.transformer import CONTEXT, Scored, TargetLM
from fairseq_knnlm.mixture.mix import knn_log_probs
from fairseq_knnlm.retrieval.local import Neighbours, Retriever

#: Temperatures in a score table: 0.25 to 512 in steps of the square root of 2.
TEMPERATURES = tuple(2.0 ** (step / 2) for step in range(-4, 19))
#: Queries searched at a time: enough for FAISS to share work between them, and few enough for
#: memory to be used again in the place of new memory, which costs more than the arithmetic on it.
QUERIES_AT_A_TIME = 1024
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


@dataclass(frozen=True)
class Passage:
    """Scored tokens of a batch, and where they stand.

    Attributes:
        scored: targets, their contexts and keys.
        rows: (N,) int64, the token's place in the text; -1 where it does not count.
        sample: fairseq's batch, for an expert that is a model itself.
        texts: (N,) int64, ascending: the text that each token is of, where every sentence of a
            batch is one of its own; None where all batches are one text.
    """

    scored: Scored
    rows: Tensor
    sample: dict[str, Any] = field(default_factory=dict)
    texts: Tensor | None = None

    def at(self, places: Tensor) -> Passage:
        """Some of the tokens, without fairseq's batch."""
        texts = None if self.texts is None else self.texts[places]
        return Passage(self.scored.at(places), self.rows[places], texts=texts)

    def apart(self) -> list[Passage]:
        """Its texts, one by one."""
        assert self.texts is not None
        lengths = self.texts.unique_consecutive(return_counts=True)[1].tolist()
        places = torch.arange(len(self.rows), device=self.rows.device)
        return [self.at(some) for some in places.split(lengths)]


@dataclass(frozen=True)
class Opinion:
    """What an expert says of a batch.

    Attributes:
        log_probs: (N, S) float32, natural log, of each target, a column a setting; NaN where the
            expert has nothing to go by.
        features: by name, (N,) or (N, M): what a mixer may go by.
    """

    log_probs: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)

    def at(self, places: Tensor) -> Opinion:
        """Of some of the tokens."""
        some = {name: feature[places] for name, feature in self.features.items()}
        return Opinion(self.log_probs[places], some)


class Expert(Protocol):
    """Says how likely every target is."""

    @property
    def name(self) -> str:
        """Short, one of its kind; its features begin with it."""

    @property
    def settings(self) -> Sequence[Mapping[str, Any]]:
        """What each column of its opinion is."""

    def opinion(self, passage: Passage) -> Opinion:
        """log p of each target in every setting."""


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


class KnnExpert:
    """p_kNN of the target, from the k nearest entries of a datastore.

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
        self.columns = list(settings)
        self.settings = [vars(setting) for setting in settings]
        self.features = features
        self.name = name
        self.search_seconds = 0.0
        self.asked = self.recalled = 0
        if features:
            size = retriever.store.manifest.origin.vocabulary
            counts = np.bincount(retriever.store.values, minlength=size)
            self._counts = torch.from_numpy(counts).float().log1p()

    def opinion(self, passage: Passage) -> Opinion:
        """log p_kNN of each target, given its key."""
        scored = passage.scored
        assert scored.keys is not None
        pieces = (scored.keys, scored.targets, scored.context, passage.rows)
        step = max(1, min(QUERIES_AT_A_TIME, NEIGHBOURS_AT_A_TIME // self.k))
        some = zip(*(piece.split(step) for piece in pieces), strict=True)
        return joined([self._opinion(*part) for part in some])

    def near(self, keys: Tensor, targets: Tensor, rows: Tensor) -> Neighbours:
        """The candidates; targets and rows are for those that go by earlier tokens.

        Args:
            keys: (N, D) queries.
            targets: (N,) int64, the tokens to be predicted: each says something of later ones.
            rows: (N,) int64, their places in the text.
        """
        return self.retriever.search(keys, self.k)

    def _opinion(self, keys: Tensor, targets: Tensor, context: Tensor, rows: Tensor) -> Opinion:
        started = time.perf_counter()
        near = self.near(keys, targets, rows)
        self.search_seconds += time.perf_counter() - started
        if self.features or any(setting.k for setting in self.columns):
            near = near.nearest_first()
        wanted = max(setting.suffix for setting in self.columns)
        shared = self._shared(near, context, max(SUFFIXES) if self.features else wanted)
        matches = near.values == targets[:, None]
        self.asked += len(keys)
        self.recalled += self._recalled(near, matches, keys)
        log_probs = self._log_probs(near, matches, shared)
        return Opinion(log_probs, self._features(near, shared, context) if self.features else {})

    def _recalled(self, near: Neighbours, matches: Tensor, keys: Tensor) -> int:
        """How many queries have their own target at no distance."""
        if not self.retriever.measures_l2:
            return 0
        limits = SAME * keys.float().square().sum(dim=1)
        rows = (near.distances.amin(dim=1) <= limits).nonzero().squeeze(1)
        same = near.distances[rows] <= limits[rows, None]
        return int((same & matches[rows]).any(dim=1).sum())

    def _shared(self, near: Neighbours, context: Tensor, suffix: int) -> list[Tensor]:
        """(N, K) bool for 0, 1, ... ``suffix`` tokens: the neighbour's last ones are the same."""
        shared = [near.valid]
        for steps in range(1, suffix + 1):
            before = self.retriever.tokens_before(near.ids, steps)
            ours = context[:, steps - 1, None]
            shared.append(shared[-1] & (before == ours) & (ours >= 0))
        return shared

    def _log_probs(self, near: Neighbours, matches: Tensor, shared: list[Tensor]) -> Tensor:
        """(N, S): settings that differ in their temperature alone share the work."""

        def group(place: int) -> tuple[int, int]:
            return self.columns[place].suffix, self.columns[place].k

        columns: dict[int, Tensor] = {}
        for (suffix, fewer), places in groupby(sorted(range(len(self.columns)), key=group), group):
            k = fewer or near.ids.shape[1]
            here = list(places)
            temperatures = [self.columns[place].temperature for place in here]
            found = knn_log_probs(
                near.distances[:, :k],
                matches[:, :k],
                shared[suffix][:, :k],
                temperatures,
                None if near.log_weights is None else near.log_weights[:, :k],
            )
            columns.update(zip(here, found.unbind(1), strict=True))
        return torch.stack([columns[place] for place in range(len(self.columns))], dim=1)

    def _features(
        self, near: Neighbours, shared: list[Tensor], context: Tensor
    ) -> dict[str, Tensor]:
        distances = near.distances.masked_fill(~near.valid, torch.nan)
        ranks = [rank - 1 for rank in DISTANCE_RANKS if rank <= self.k]
        # What is missing counts for nothing, and its token for no type of its own.
        values = near.values.where(near.valid, near.values[:, :1])
        ordered, places = values.sort(dim=1)
        entropy, top = _shape(near, ordered, places)
        counts = torch.stack([share.sum(dim=1).float() for share in shared], dim=1)
        return {
            f"{self.name}_distances": distances[:, ranks],
            f"{self.name}_entropy": entropy,
            f"{self.name}_top": top,
            f"{self.name}_distinct": _distinct(values, ordered),
            f"{self.name}_shared": counts.log1p(),
            f"{self.name}_frequency": self._frequency(context[:, 0]),
        }

    def _frequency(self, tokens: Tensor) -> Tensor:
        """log(1 + how often a token is a value of the datastore)."""
        self._counts = self._counts.to(tokens.device)
        return self._counts[tokens.clamp_min(0)].where(tokens >= 0, torch.nan)


def _shape(near: Neighbours, ordered: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy (natural) and log of the largest probability of p_kNN, each (N, len(SPREADS)).

    Args:
        near: N queries' neighbours.
        ordered: (N, K) their values in ascending order.
        places: (N, K) where these stood.
    """
    first = torch.ones_like(near.valid)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
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


def _distinct(values: Tensor, ordered: Tensor) -> Tensor:
    """log of the number of distinct tokens among the nearest, (N, ranks).

    Args:
        values: (N, K), the nearest's first.
        ordered: the same in ascending order.
    """
    columns = []
    for rank in DISTINCT_RANKS:
        some = ordered if rank >= values.shape[1] else values[:, :rank].sort(dim=1).values
        columns.append(1 + (some[:, 1:] != some[:, :-1]).sum(dim=1))
    return torch.stack(columns, dim=1).float().log()


class NGramExpert:
    """An n-gram model of the datastore's text: what usually follows the last few tokens.

    Args:
        model: counts, of order at most ``CONTEXT`` + 1.
        features: name features too.
    """

    name = "ngram"

    def __init__(self, model: NGramModel, *, features: bool = False) -> None:
        assert model.order <= CONTEXT + 1
        self.model = model
        self.settings = [{"order": model.order}]
        self.features = features

    def opinion(self, passage: Passage) -> Opinion:
        """log p of each target, given the tokens before it."""
        scored = passage.scored
        text = torch.cat([scored.context.flip(1), scored.targets[:, None]], dim=1)
        found = self.model.score(text.cpu().numpy(), skip=CONTEXT)

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array[:, 0]).float().to(scored.targets.device)

        features = {}
        if self.features:
            features = {
                "ngram_length": tensor(found.lengths),
                "ngram_count": tensor(found.counts),
                "ngram_types": tensor(found.types),
            }
        return Opinion(tensor(found.log_probs)[:, None], features)


class ShapeExpert:
    """The shape of the language model's own distribution: features, and no opinion.

    It takes a softmax over the whole vocabulary, which nothing else here does.

    Args:
        lm: the language model.
    """

    name = "lm_shape"
    settings: Sequence[dict[str, Any]] = ()

    def __init__(self, lm: TargetLM) -> None:
        self.lm = lm

    def opinion(self, passage: Passage) -> Opinion:
        """Entropy and log of the largest probability, natural."""
        entropy, top = self.lm.shape(passage.scored)
        return Opinion(entropy.new_empty((len(entropy), 0)), {"lm_entropy": entropy, "lm_top": top})


class KeyExpert:
    """The query itself, as features of a gate that is asked before the search; no opinion.

    He et al. (2021) let their retrieval adaptor go by it.
    """

    name = "lm_key"
    settings: Sequence[dict[str, Any]] = ()

    def opinion(self, passage: Passage) -> Opinion:
        """The keys, (N, D) float16."""
        keys = passage.scored.keys
        assert keys is not None
        return Opinion(keys.new_empty((len(keys), 0)), {"lm_key": keys.half()})


class ModelExpert:
    """A second language model over the same dictionary.

    Args:
        lm: the model.
    """

    name = "lm2"
    settings: Sequence[dict[str, Any]] = ({},)

    def __init__(self, lm: TargetLM) -> None:
        self.lm = lm

    def opinion(self, passage: Passage) -> Opinion:
        """log p of each target, by the second model."""
        return Opinion(self.lm.target_log_probs(self.lm.score(passage.sample))[:, None])


def joined(parts: Sequence[Opinion]) -> Opinion:
    """Opinions of consecutive tokens, as one."""

    names = parts[0].features
    return Opinion(
        torch.cat([part.log_probs for part in parts]),
        {name: torch.cat([part.features[name] for part in parts]) for name in names},
    )
