"""The mixture as a language model: it predicts what its experts predict, each with its weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fairseq_knnlm.experts.contract import Expert, Prediction, Timeless
from fairseq_knnlm.experts.knn import KnnExpert, KnnPrediction
from fairseq_knnlm.lm.contexts import Contexts
from fairseq_knnlm.mixture.components import LM, Component
from fairseq_knnlm.mixture.mix import abstaining, added, effective, mix
from fairseq_knnlm.mixture.mixers import ALONE, Mixer
from fairseq_knnlm.mixture.shares import Found, Shares, by_expert, entries_found
from fairseq_knnlm.retrieval.neighbours import Neighbours


@dataclass(frozen=True)
class Scores:
    """What became of N tokens.

    Attributes:
        log_probs: (N,) float32, natural log, of the mixture.
        columns: by the expert's name, (N, S) float32, its own in each of its settings.
        features: by name, (N,) or (N, M), those of all experts.
    """

    log_probs: Tensor
    columns: dict[str, Tensor]
    features: dict[str, Tensor]


class MixturePrediction(Protocol):
    """What the mixture says of N contexts."""

    @property
    def features(self) -> Mapping[str, Tensor]:
        """By name, those of all experts."""

    def score(self, tokens: Tensor) -> Scores:
        """Of one token (N,) each."""

    def log_probs(self) -> Tensor:
        """log p of every token: (N, V) float32, natural log."""

    def shares(self, tokens: Tensor) -> Shares:
        """Who made up the probability of one token (N,) each, and how much of it."""

    def found(self) -> dict[str, Found]:
        """By the expert's name, the neighbours of those that search, and what each gave."""

    def near(self) -> dict[str, tuple[Tensor, Neighbours]]:
        """The same without what each gave: (n,) int64 contexts that were searched for, and these.

        Their neighbours are (n, K).
        """


class Watch(Protocol):
    """Is shown contexts, the tokens that came after them, and what was said of them before.

    Attributes:
        at_a_time: contexts that it is shown at a time, at most.
    """

    at_a_time: int

    def __call__(
        self, contexts: Contexts, tokens: Tensor, prediction: MixturePrediction
    ) -> None: ...


@dataclass(frozen=True)
class Weighed:
    """Predictions, and what each of their settings weighs.

    Attributes:
        predictions: by the expert's name, the language model's first.
        mixer: weighs components.
        settings: by the expert's name, its settings in the order of its columns.
        features: by name, those of all experts.
        log_weights: (E,) or (N, E), natural log.
    """

    predictions: Mapping[str, Prediction]
    mixer: Mixer
    settings: Mapping[str, Sequence[Mapping[str, object]]]
    features: Mapping[str, Tensor]
    log_weights: Tensor

    def score(self, tokens: Tensor) -> Scores:
        """Of one token (N,) each."""
        columns = {name: one.log_prob(tokens) for name, one in self.predictions.items()}
        return Scores(self.mixed(columns), columns, dict(self.features))

    def mixed(self, columns: Mapping[str, Tensor]) -> Tensor:
        """(N,) of the mixture, from the columns (N, S) of each expert."""
        if list(self.mixer.components) == [LM]:
            return columns[LM.expert][:, 0]
        return self._mix(self._chosen(columns))

    def shares(self, tokens: Tensor) -> Shares:
        """Who made up the probability of one token (N,) each, and how much of it."""
        names = list(dict.fromkeys(self._experts))
        columns = self._chosen({name: self.predictions[name].log_prob(tokens) for name in names})
        return by_expert(names, self._experts, self._effective(columns), columns)

    def found(self) -> dict[str, Found]:
        """By the expert's name, the neighbours of those that search, and what each gave."""
        found = {}
        for name, prediction in self.predictions.items():
            ours = [place for place, expert in enumerate(self._experts) if expert == name]
            if ours and isinstance(prediction, KnnPrediction):
                settings = [self._place(self.mixer.components[place]) for place in ours]
                said = prediction.log_prob(prediction.near.values[:, 0])[:, settings]
                weights = self.log_weights.to(said.device).exp().expand(len(said), -1)[:, ours]
                found[name] = entries_found(
                    prediction, settings, weights.masked_fill(said.isnan(), 0.0)
                )
        return found

    def log_probs(self) -> Tensor:
        """log p of every token: (N, V) float32, natural log."""
        lm, *others = [
            self.predictions[one.expert].log_probs(self._place(one))
            for one in self.mixer.components
        ]
        assert isinstance(lm, Tensor)
        if not others:
            return lm
        abstains = torch.stack([abstaining(one) for one in (lm, *others)], dim=1)
        said = torch.zeros(abstains.shape, device=lm.device).masked_fill_(abstains, torch.nan)
        weight, *weights = self._effective(said).unbind(dim=1)
        mixed = lm + weight[:, None]
        experts = self._experts[1:]
        for name in dict.fromkeys(experts):
            ours = [place for place, expert in enumerate(experts) if expert == name]
            mixed = added(mixed, [others[one] for one in ours], [weights[one] for one in ours])
        return mixed

    def near(self) -> dict[str, tuple[Tensor, Neighbours]]:
        """The same without what each gave."""
        return {
            name: (torch.arange(len(one.near.ids)), one.near)
            for name, one in self.predictions.items()
            if isinstance(one, KnnPrediction)
        }

    @property
    def _experts(self) -> list[str]:
        """Whose each component is."""
        return [component.expert for component in self.mixer.components]

    def _chosen(self, columns: Mapping[str, Tensor]) -> Tensor:
        """(N, C), of the components, from the columns (N, S) of each expert."""
        chosen = [columns[one.expert][:, self._place(one)] for one in self.mixer.components]
        return torch.stack(chosen, dim=1)

    def _effective(self, columns: Tensor) -> Tensor:
        """(N, C) log weights, natural, with those of who abstains given to others."""
        return effective(columns, self.log_weights.to(columns.device), self.mixer.abstain)

    def _mix(self, log_probs: Tensor) -> Tensor:
        return mix(log_probs, self.log_weights.to(log_probs.device), self.mixer.abstain)

    def _place(self, component: Component) -> int:
        return list(self.settings[component.expert]).index(component.setting)


class MixtureLM:
    """A language model and its experts.

    Args:
        lm: the language model, as an expert of its own, named ``lm``.
        experts: the others.
        mixer: weighs components; each is a setting of one of the experts.
    """

    def __init__(self, lm: Expert, experts: Sequence[Expert] = (), mixer: Mixer = ALONE) -> None:
        self.lm = lm
        self.experts = experts
        self.mixer = mixer
        self._settings = {one.name: [dict(each) for each in one.settings] for one in self.everyone}
        for component in mixer.components:
            assert component.setting in self._settings[component.expert]

    @property
    def everyone(self) -> list[Expert]:
        """The language model and the experts."""
        return [self.lm, *self.experts]

    def predict(self, contexts: Contexts) -> MixturePrediction:
        """What follows N contexts; of several texts or of one that goes on."""
        return self.weighed({one.name: one.predict(contexts) for one in self.everyone})

    def weighed(self, predictions: Mapping[str, Prediction]) -> Weighed:
        """Predictions of everyone, with their weights."""
        features = _features(predictions)
        log_weights = self.mixer.log_weights(features)
        return Weighed(predictions, self.mixer, self._settings, features, log_weights)

    def read(self, contexts: Contexts) -> None:
        """Has those that live on the text know contexts of which nothing is asked."""
        for one in self.everyone:
            if not isinstance(one, Timeless):
                for start in range(0, len(contexts), one.at_a_time):
                    one.predict(contexts[start : start + one.at_a_time])

    @property
    def looks_back(self) -> int | None:
        """Tokens of the text before a context that must have been read; None for all there are."""
        far = [one.looks_back for one in self.everyone]
        return None if None in far else max(one for one in far if one is not None)

    def catch_up(self, contexts: Contexts, tokens: Tensor) -> None:
        """Goes through contexts and what came after each, as ``score`` does, and counts nothing.

        Only those that look back are asked.

        Args:
            contexts: N of them.
            tokens: (N,) int64, what came after each.
        """
        for part in self._parts(len(contexts)):
            for one in self.everyone:
                if one.looks_back != 0:
                    one.predict(contexts[part])
                    one.observe(tokens[part])
        self.start_counting()

    @property
    def searches_elsewhere(self) -> bool:
        """Whether neighbours can be looked for while this process does something else."""
        return any(isinstance(one, KnnExpert) and one.retriever.elsewhere for one in self.experts)

    def ahead(self, contexts: Contexts, watch: Watch | None = None) -> None:
        """Has neighbours looked for, where others do that, of contexts that are scored soon.

        Args:
            contexts, watch: as ``score`` will be given them, in the same order.
        """
        for part in self._parts(len(contexts), watch):
            for one in self.experts:
                if isinstance(one, KnnExpert):
                    one.ahead(contexts[part])

    def start_counting(self) -> None:
        """Whoever counts, counts from here on."""
        for one in self.everyone:
            if isinstance(one, KnnExpert):
                one.start_counting()

    def observe(self, tokens: Tensor) -> None:
        """Tells what came after the contexts of the last prediction, (N,) int64."""
        for one in self.everyone:
            one.observe(tokens)

    def reorder(self, order: Tensor) -> None:
        """From now on text i goes on where text ``order[i]`` stood, (B,) int64."""
        for one in self.everyone:
            one.reorder(order)

    def forget(self, counts: Tensor) -> None:
        """Takes back the last ``counts[i]`` contexts of text i, (B,) int64."""
        for one in self.everyone:
            one.forget(counts)

    def score(self, contexts: Contexts, tokens: Tensor, watch: Watch | None = None) -> Scores:
        """Predicts, is told what came, and says how likely that was; piece by piece.

        Args:
            contexts: N of them.
            tokens: (N,) int64, what came after each.
            watch: is shown each piece: its contexts, tokens and prediction.
        """
        parts = []
        for part in self._parts(len(contexts), watch):
            prediction = self.predict(contexts[part])
            parts.append(prediction.score(tokens[part]))
            if watch is not None:
                watch(contexts[part], tokens[part], prediction)
            self.observe(tokens[part])
        return _joined(parts)

    def _parts(self, count: int, watch: Watch | None = None) -> Iterator[slice]:
        """So many contexts, as they are best asked of; one part at least."""
        size = min([count or 1, *(one.at_a_time for one in self.experts)])
        size = size if watch is None else min(size, watch.at_a_time)
        for start in range(0, max(count, 1), size):
            yield slice(start, start + size)


def _features(predictions: Mapping[str, Prediction]) -> dict[str, Tensor]:
    """By name, those of all experts."""
    return {
        name: feature
        for prediction in predictions.values()
        for name, feature in prediction.features.items()
    }


def _joined(parts: Sequence[Scores]) -> Scores:
    """Scores of consecutive tokens, as one."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    return Scores(
        torch.cat([part.log_probs for part in parts]),
        {name: torch.cat([part.columns[name] for part in parts]) for name in first.columns},
        {name: torch.cat([part.features[name] for part in parts]) for name in first.features},
    )
