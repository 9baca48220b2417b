"""Mixers: each gives every expert a weight, for all tokens or for each one by its features.

The weights of a token are positive and sum to one, so the mixture stays a distribution. What is
fitted leaves the language model ``LEAST_LM`` at least, so that nothing it can say costs infinity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fairseq_knnlm.errors import TableError
from fairseq_knnlm.mixture.components import LM, Abstain, Component, searches

#: Features are cut off at this many standard deviations.
FAR = 6.0
#: Rows of features that are computed with at a time: all of them may take much memory.
ROWS_AT_A_TIME = 2**12
#: The language model's weight in what is fitted is no less. Without it one new token, which no
#: memory knows of, would make the loss infinite, however well they all did on valid; with it that
#: token costs 13.3 bits more than it costs the model, and every other one 0.00014 more at most.
LEAST_LM = 1e-4


class Mixer(Protocol):
    """Weighs components."""

    @property
    def kind(self) -> str:
        """``fixed``, ``blend``, ``bins`` or ``gate``."""

    @property
    def components(self) -> Sequence[Component]:
        """What is mixed, the language model first."""

    @property
    def features(self) -> Sequence[str]:
        """Names of what the weights depend on."""

    @property
    def abstain(self) -> Abstain:
        """Where the weight of an expert that abstains goes."""

    def log_weights(self, features: Mapping[str, Tensor]) -> Tensor:
        """(N, E) or (E,) float32, natural log; exp sums to 1 a row."""


@dataclass(frozen=True)
class Fixed:
    """The same weights for every token (Khandelwal et al., 2020, where they are lambda).

    Attributes:
        components: E of them.
        weights: E numbers, which sum to 1.
        kind: ``fixed`` with one setting an expert, ``blend`` with several.
        abstain: where the weight of an expert that abstains goes.
    """

    components: Sequence[Component]
    weights: Sequence[float]
    features: Sequence[str] = ()
    kind: str = "fixed"
    abstain: Abstain = "share"

    def log_weights(self, features: Mapping[str, Tensor]) -> Tensor:
        """(E,) float32, natural log."""
        return torch.tensor(self.weights, dtype=torch.float64).log().float()


@dataclass(frozen=True)
class Bins:
    """Weights by how far the nearest neighbour is (Drozdov et al., 2022).

    Attributes:
        components: E of them.
        edges: B - 1 ascending distances between the bins.
        weights: B rows of E numbers, which sum to 1.
        features: the one feature whose first column is binned.
        abstain: where the weight of an expert that abstains goes.
    """

    components: Sequence[Component]
    edges: Sequence[float]
    weights: Sequence[Sequence[float]]
    features: Sequence[str] = ("knn_distances",)
    kind: str = "bins"
    abstain: Abstain = "share"

    def log_weights(self, features: Mapping[str, Tensor]) -> Tensor:
        """(N, E) float32, natural log; a token without neighbours is in the last bin."""
        column = first_column(features[self.features[0]])
        distance = column.nan_to_num(nan=torch.inf)
        rows = torch.tensor(self.weights, dtype=torch.float64).log().float().to(column.device)
        return rows[torch.bucketize(distance, torch.tensor(self.edges, device=column.device))]


def first_column(feature: Tensor) -> Tensor:
    """(N,) of a feature of shape (N,) or (N, M)."""
    return feature if feature.dim() == 1 else feature[:, 0]


#: The language model, unmixed.
ALONE = Fixed((LM,), (1.0,))


class Dropout(nn.Module):
    """Leaves out a share of a layer's units in training, which share is drawn anew for each row.

    On a CPU drawing takes longer than all the rest of a small network. So it is done once, for more
    rows than a batch has; each batch then begins at a row of those that is drawn.

    Args:
        share: of the units, 0 to 1.

    Attributes:
        drawn: the generator that draws; None for the process's own.
    """

    #: More rows than a batch has.
    ROWS = 2**13

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.drawn: torch.Generator | None = None
        self._kept = torch.empty(0, 0)

    def forward(self, x: Tensor) -> Tensor:
        """(N, H) to the same, what is kept so much larger that the mean stays what it was."""
        if not self.training or not self.share:
            return x
        rows, units = len(x) + self.ROWS, x.shape[1]
        if len(self._kept) < rows:
            kept = torch.rand(rows, units, device=x.device, generator=self.drawn) >= self.share
            self._kept = kept.to(x.dtype) / (1 - self.share)
        start = int(torch.randint(self.ROWS, (), generator=self.drawn))
        return x * self._kept[start : start + len(x)]

    def train(self, mode: bool = True) -> Dropout:
        """Begins or ends training; what was drawn is not kept longer than that."""
        self._kept = torch.empty(0, 0)
        return super().train(mode)


class Gate(nn.Module):
    """A small network over the features: a learned weight for each component and token.

    Args:
        components: E of them.
        features: names, in the order of the network's inputs.
        inputs: numbers that the features amount to.
        hidden: widths of the hidden layers.
        dropout: share of hidden units left out in training.
        abstain: where the weight of an expert that abstains goes.
    """

    kind = "gate"
    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        components: Sequence[Component],
        features: Sequence[str],
        inputs: int,
        hidden: Sequence[int] = (64, 64),
        dropout: float = 0.1,
        abstain: Abstain = "share",
    ) -> None:
        super().__init__()
        self.abstain = abstain
        self.components = components
        self.features = features
        self.hidden = tuple(hidden)
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(inputs, width), nn.ReLU(), Dropout(dropout)]
            inputs = width
        last = nn.Linear(inputs, len(components))
        nn.init.zeros_(last.weight)  # begin with equal weights, whatever the features
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last)

    def standardize(self, inputs: Tensor) -> None:
        """Takes mean and standard deviation from a sample of inputs, (N, F); NaN is left out."""
        parts = inputs.split(ROWS_AT_A_TIME)
        count = _summed(part.isfinite() for part in parts).clamp_min(1)
        mean = _summed(part.nan_to_num(0.0, 0.0, 0.0) for part in parts) / count
        # What is infinite is so without the mean, too.
        apart = ((part - mean).nan_to_num_(0.0, 0.0, 0.0) for part in parts)
        variance = _summed(part.square_() for part in apart) / count
        self.mean.copy_(mean)
        self.scale.copy_(1 / variance.sqrt().clamp_min(1e-6))

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, F) features, as ``gathered``, to (N, E) log weights, without a floor.

        At a floor there is no gradient to learn by, nor are searches told apart by their scores.
        """
        return self.layers(self.standardized(inputs)).log_softmax(dim=1)

    def standardized(self, inputs: Tensor) -> Tensor:
        """(N, F) features to what the network is given of them, likewise."""
        found = torch.empty_like(inputs)
        parts = inputs.split(ROWS_AT_A_TIME), found.split(ROWS_AT_A_TIME)
        for part, place in zip(*parts, strict=True):
            # What is not known is taken for average.
            known = ((part - self.mean) * self.scale).nan_to_num_(0.0, FAR, -FAR)
            torch.clamp(known, -FAR, FAR, out=place)
        return found

    @contextmanager
    def drawing(self, drawn: torch.Generator) -> Iterator[None]:
        """Whatever is left out in training while the block runs is drawn by a generator."""
        dropouts = [layer for layer in self.layers if isinstance(layer, Dropout)]
        for dropout in dropouts:
            dropout.drawn = drawn
        try:
            yield
        finally:
            for dropout in dropouts:
                dropout.drawn = None

    @torch.no_grad()
    def log_weights(self, features: Mapping[str, Tensor]) -> Tensor:
        """(N, E) float32, natural log."""
        return floored(self.of(features))

    @torch.no_grad()
    def of(self, features: Mapping[str, Tensor]) -> Tensor:
        """The same without a floor."""
        return self(gathered(features, self.features).to(self.mean.device))


def _summed(parts: Iterable[Tensor]) -> Tensor:
    """(F,) sums over the rows of all parts, (N, F) each."""
    return torch.stack([part.sum(dim=0) for part in parts]).sum(dim=0)


def floored(log_weights: Tensor) -> Tensor:
    """Log weights (N, E) in which the first, the language model's, is ``LEAST_LM`` at least.

    Where it is less, the others give the difference, each in proportion to its weight.
    """
    lm = log_weights[:, :1]
    low = lm < math.log(LEAST_LM)
    scale = math.log1p(-LEAST_LM) - torch.log1p(-lm.exp())
    raised = torch.cat([lm * 0 + math.log(LEAST_LM), log_weights[:, 1:] + scale], dim=1)
    return raised.where(low, log_weights)


@dataclass(frozen=True)
class Skip:
    """Tells before a search whether it is worth its while (He et al., 2021, adaptive retrieval).

    Attributes:
        gate: weighs the same experts by features that need no search.
        quantiles: 101 ascending numbers: 0, 1, ... 100% of the scores lie below.
    """

    gate: Gate
    quantiles: Sequence[float]

    @property
    def experts(self) -> list[str]:
        """Whom it was fitted with, besides the language model."""
        return [component.expert for component in self.gate.components[1:]]

    @property
    def rest(self) -> list[str]:
        """Those of them who do not search."""
        return [name for name in self.experts if not searches(name)]

    def scores(self, features: Mapping[str, Tensor]) -> Tensor:
        """(N,) float32, log-odds (natural) of the weight that the gate gives to neighbours."""
        log_weights = self.gate.of(features)
        ours = torch.tensor([searches(component.expert) for component in self.gate.components])
        return log_weights[:, ours].logsumexp(dim=1) - log_weights[:, ~ours].logsumexp(dim=1)

    def threshold(self, share: float) -> float:
        """The score below which a share of the tokens lies, 0 to 1; all do for 1, none for 0."""
        if not 0 < share < 1:
            return math.copysign(math.inf, share - 0.5)
        return float(np.interp(share, np.linspace(0, 1, len(self.quantiles)), self.quantiles))


def gathered(features: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """The named features side by side, (N, F) float32."""
    if missing := [name for name in names if name not in features]:
        raise TableError(
            "a mixture goes by features that none of its experts has",
            expected=", ".join(sorted(features)),
            found=", ".join(missing),
            do="fit it again with `fairseq-knnlm tune`",
        )
    columns = [features[name] for name in names]
    columns = [column.reshape(len(column), -1) for column in columns]
    widths = [column.shape[1] for column in columns]
    found = columns[0].new_empty((len(columns[0]), sum(widths)), dtype=torch.float32)
    for column, place in zip(columns, found.split(widths, dim=1), strict=True):
        place.copy_(column)
    return found
