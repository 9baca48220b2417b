"""The perplexity that a search leads to, with lambda and temperature fitted for it."""

import math
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from material import Asked, Material
from rivals import Searching
from tqdm import tqdm

from fairseq_knnlm.calibration.fitting import best_lambda, mixture_loss
from fairseq_knnlm.experts.knn import vote
from fairseq_knnlm.files import publish

#: 0.25 to 512, four to an octave.
TEMPERATURES = tuple(2.0 ** (step / 4) for step in range(-8, 37))
#: Queries at a time.
BATCH = 512


@dataclass(frozen=True)
class Fitted:
    """A mixture fitted on the valid sample.

    Attributes:
        valid: perplexity there.
        test: perplexity on the test sample.
    """

    lmbda: float
    temperature: float
    valid: float
    test: float


class Perplexities:
    """Perplexities by the name of the search, each found once.

    Args:
        material: queries of valid and test.
        searches: who answers them.
    """

    def __init__(self, material: Material, searches: Searching) -> None:
        self.material = material
        self.searches = searches

    @cached_property
    def samples(self) -> dict[str, Asked]:
        return {split: self.material.asked(split) for split in ("valid", "test")}

    @property
    def base(self) -> dict[str, float]:
        """Of the language model alone, on each sample."""
        return {s: math.exp(-float(asked.lm.mean())) for s, asked in self.samples.items()}

    @cache  # noqa: B019  (there is one, and it lives as long as the program)
    def of(self, name: str) -> Fitted:
        """With lambda and temperature fitted on valid."""
        valid, test = (self._columns(name, split) for split in ("valid", "test"))
        lm, best = self.samples["valid"].lm, (math.inf, 0.0, 0)
        for number, expert in enumerate(valid.T):
            lmbda = best_lambda(lm, expert)
            best = min(best, (mixture_loss(lm, expert, lmbda), lmbda, number))
        loss, lmbda, number = best
        tested = mixture_loss(self.samples["test"].lm, test[:, number], lmbda)
        return Fitted(lmbda, TEMPERATURES[number], math.exp(loss), math.exp(tested))

    def compare(self, name: str, other: str) -> dict[str, Any]:
        """What ``name`` leads to and what ``other`` does, and the excess on test as a share."""
        ours, theirs = self.of(name), self.of(other)
        return {
            name: asdict(ours),
            other: asdict(theirs),
            "base": self.base,
            "over": other,
            "excess": ours.test / theirs.test - 1,
        }

    def _columns(self, name: str, split: str) -> np.ndarray:
        """log p_kNN of the sampled tokens at each temperature, (Q, M) float32."""
        if name != "exact":
            return self._searched(name, split)
        choice = self.material.choice
        number = f"k{choice.k}-q{choice.queries}-s{choice.seed}"
        file = self.material.folder / f"exact-{split}-{number}.npy"
        if not file.is_file():  # exact search is slow
            with publish(file) as temporary, temporary.open("wb") as sink:
                np.save(sink, self._searched(name, split))
        return np.load(file)

    def _searched(self, name: str, split: str) -> np.ndarray:
        asked, search, columns = self.samples[split], self.searches.of(name), []
        with tqdm(total=len(asked.keys), desc=f"{name}, {split}", unit=" queries") as bar:
            for keys, tokens in zip(
                asked.keys.split(BATCH), asked.tokens.split(BATCH), strict=True
            ):
                near = search(keys, self.searches.k)
                columns.append(vote(near, TEMPERATURES).log_prob(tokens))
                bar.update(len(keys))
        return torch.cat(columns).numpy()
