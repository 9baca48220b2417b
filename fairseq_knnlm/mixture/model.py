"""The mixture as a language model: it predicts what its experts predict, each with its weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from fairseq_knnlm.experts.contract import Distribution, Expert, Prediction
from fairseq_knnlm.experts.knn import KnnPrediction
from fairseq_knnlm.lm.contexts import Contexts
from fairseq_knnlm.mixture.components import LM, Component, searches
from fairseq_knnlm.mixture.mix import effective, mix
from fairseq_knnlm.mixture.mixers import ALONE, Mixer, Skip
from fairseq_knnlm.mixture.shares import Found, Shares, by_expert, entries_found, over


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
        """By the expert's name, the neighbours of those that search."""


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
        """By the expert's name, the neighbours of those that search."""
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
        lm = self.predictions[LM.expert].log_probs(0)
        assert isinstance(lm, Tensor)
        if list(self.mixer.components) == [LM]:
            return lm
        columns = [
            lm if one == LM else self._of_all(one, lm.shape[1]) for one in self.mixer.components
        ]
        return self._mix(torch.stack(columns, dim=1))

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

    def _of_all(self, component: Component, vocabulary: int) -> Tensor:
        found = self.predictions[component.expert].log_probs(self._place(component))
        return found if isinstance(found, Tensor) else found.over(vocabulary)

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
        size = min([len(contexts) or 1, *(one.at_a_time for one in self.experts)])
        size = size if watch is None else min(size, watch.at_a_time)
        parts = []
        for start in range(0, max(len(contexts), 1), size):
            part = slice(start, start + size)
            prediction = self.predict(contexts[part])
            parts.append(prediction.score(tokens[part]))
            if watch is not None:
                watch(contexts[part], tokens[part], prediction)
            self.observe(tokens[part])
        return _joined(parts)


@dataclass(frozen=True)
class Skipped:
    """A prediction in which some contexts were searched for, and the others were not.

    Attributes:
        rest: of everyone who does not search, for all N contexts.
        searched: who searches, for n of them.
        rows: (n,) int64, which these are.
        whole: (n) of everyone.
    """

    rest: Weighed
    searched: Mapping[str, Prediction]
    rows: Tensor
    whole: Weighed

    @property
    def features(self) -> Mapping[str, Tensor]:
        """Those of everyone who does not search."""
        return self.rest.features

    def score(self, tokens: Tensor) -> Scores:
        """Of one token (N,) each."""
        scores, rows = self.rest.score(tokens), self.rows
        columns = {name: column[rows] for name, column in scores.columns.items()}
        columns |= {name: one.log_prob(tokens[rows]) for name, one in self.searched.items()}
        mixed = scores.log_probs.index_copy(0, rows, self.whole.mixed(columns))
        return Scores(mixed, scores.columns, scores.features)

    def log_probs(self) -> Tensor:
        """log p of every token: (N, V) float32, natural log."""
        return self.rest.log_probs().index_copy(0, self.rows, self.whole.log_probs())

    def shares(self, tokens: Tensor) -> Shares:
        """Who made up the probability of one token (N,) each, and how much of it."""
        some, every = self.whole.shares(tokens[self.rows]), self.rest.shares(tokens)
        names = list(dict.fromkeys([*every.experts, *some.experts]))
        some, every = over(some, names), over(every, names)
        return Shares(
            names,
            every.weights.index_copy(0, self.rows, some.weights),
            every.log_probs.index_copy(0, self.rows, some.log_probs),
        )

    def found(self) -> dict[str, Found]:
        """By the expert's name, the neighbours of those that search."""
        some = self.whole.found()
        return {name: replace(one, rows=self.rows[one.rows]) for name, one in some.items()}


class Picked:
    """A prediction of some of its contexts.

    Args:
        whole: of N contexts.
        rows: (n,) int64 among the N.
        size: N.
    """

    def __init__(self, whole: Prediction, rows: Tensor, size: int) -> None:
        self._whole = whole
        self._rows = rows
        self._size = size
        self.features = {name: feature[rows] for name, feature in whole.features.items()}

    def log_prob(self, tokens: Tensor) -> Tensor:
        """(n, S), of tokens (n,)."""
        every = tokens.new_zeros(self._size).index_copy_(0, self._rows, tokens)
        return self._whole.log_prob(every)[self._rows]

    def log_probs(self, setting: int) -> Tensor | Distribution:
        """(n, V), or of a few tokens."""
        found = self._whole.log_probs(setting)
        if isinstance(found, Tensor):
            return found[self._rows]
        return Distribution(*(part[self._rows] for part in found))


class SkippingMixtureLM(MixtureLM):
    """Asks the other experts first, and the datastore only where that promises to help.

    He et al. (2021) call this adaptive retrieval. A context that is searched for is predicted as by
    ``MixtureLM``; one that is not, by a mixture that never knew of the datastore.

    Args:
        lm: the language model.
        experts: the others.
        mixer: weighs components of them all.
        rest: weighs components of those that do not search.
        skip: tells which searches are worth their while.
        share: of the searches to be skipped, 0 to 1, as far as the text is like what ``skip`` was
            fitted on.

    Attributes:
        tokens: how many contexts there were.
        searched: how many of them were searched for.
    """

    def __init__(
        self,
        lm: Expert,
        experts: Sequence[Expert],
        mixer: Mixer,
        rest: Mixer,
        skip: Skip,
        share: float,
    ) -> None:
        super().__init__(lm, experts, mixer)
        self.searching = [one for one in experts if searches(one.name)]
        self.rest = MixtureLM(lm, [one for one in experts if one not in self.searching], rest)
        self.skip = skip
        self.threshold = skip.threshold(share)
        self.tokens = self.searched = 0
        self._rows = torch.empty(0, dtype=torch.int64)

    def predict(self, contexts: Contexts) -> MixturePrediction:
        """What follows N contexts."""
        others = {one.name: one.predict(contexts) for one in self.rest.everyone}
        rest = self.rest.weighed(others)
        scores = self.skip.scores(rest.features).to(contexts.rows.device)
        rows = self._rows = (scores >= self.threshold).nonzero().squeeze(1)
        self.tokens += len(contexts)
        self.searched += len(rows)
        if not len(rows):
            return rest
        some = contexts[rows]
        searched = {one.name: one.predict(some) for one in self.searching}
        picked: dict[str, Prediction] = {
            name: Picked(one, rows, len(contexts)) for name, one in others.items()
        }
        return Skipped(rest, searched, rows, self.weighed(picked | searched))

    def observe(self, tokens: Tensor) -> None:
        """Tells what came after the contexts of the last prediction, (N,) int64."""
        self.rest.observe(tokens)
        if len(self._rows):
            for one in self.searching:
                one.observe(tokens[self._rows])


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
