"""What the parts of a mixture cost in time, as the card of a score table tells it.

An expert shares work between its columns: the scores of a cache's longest window serve its shorter
ones, one search serves all temperatures. So its columns are told in groups of those that count the
same entries, and the time of any few of them is

    the most that one of their groups needs before its first column
    + for each group the first column, and the further ones.

The features of an expert are one more such group, of one column.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any

import msgspec

from fairseq_knnlm.calibration.settings import Name
from fairseq_knnlm.mixture.components import LM, Component

#: A token: more than a day would be a mistake.
Seconds = Annotated[float, msgspec.Meta(ge=0, le=86_400)]
Place = Annotated[int, msgspec.Meta(ge=0, le=10**6)]


class Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Columns of an expert that count the same entries; seconds a token.

    Attributes:
        columns: their places among the settings of the expert; none of features.
        shared: what must be done before the first, and is done once for all groups.
        first: one of them.
        further: each more.
    """

    columns: list[Place]
    shared: Seconds
    first: Seconds
    further: Seconds


class ExpertCosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of an expert.

    Attributes:
        groups: of its columns, each in one of them.
        features: all that it names.
    """

    groups: list[Group]
    features: Group

    def seconds(self, columns: Collection[int], *, features: bool) -> float:
        """A token.

        Args:
            columns: places of those that are asked for; one at least where it is asked at all.
            features: whether its features are.
        """
        used = [(group, len({*columns} & {*group.columns})) for group in self.groups]
        used = [(group, count) for group, count in used if count]
        if features:
            used.append((self.features, 1))
        own = sum(group.first + (count - 1) * group.further for group, count in used)
        return max((group.shared for group, _ in used), default=0.0) + own


class Costs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of all that can be mixed; seconds a token.

    Attributes:
        lm: the language model alone.
        lm_features: of its features, which take a softmax over the vocabulary; 0 where there are
            none.
        mixing: of a gate by all features, and of the sum over as many columns as it may have.
        experts: by their names.
    """

    lm: Annotated[float, msgspec.Meta(gt=0, le=86_400)]
    lm_features: Seconds
    mixing: Seconds
    experts: dict[Name, ExpertCosts]

    def check(self, settings: Mapping[str, Sequence[Any]]) -> None:
        """Refuses costs of other columns.

        Args:
            settings: of each expert, a column each.

        Raises:
            ValueError: naming the expert.
        """
        if self.experts.keys() != settings.keys():
            raise ValueError(f"of {', '.join(self.experts) or 'no expert'} - at `$.costs.experts`")
        for name, one in self.experts.items():
            places = sorted(place for group in one.groups for place in group.columns)
            if places != list(range(len(settings[name]))):
                raise ValueError(f"not each column once - at `$.costs.experts.{name}.groups`")


def owners(features: Collection[str], experts: Collection[str]) -> dict[str, str]:
    """Of each feature the expert whose it is: whose name, or longest name, it begins with.

    Args:
        features: their names.
        experts: their names; the language model's ``lm`` is known.
    """

    def of(feature: str) -> Iterator[str]:
        return (name for name in ("lm", *experts) if feature.startswith(f"{name}_"))

    return {feature: max(of(feature), key=len, default="") for feature in features}


class Clock:
    """Tells what mixtures of a score table cost.

    Args:
        costs: of its columns.
        settings: of each expert, a column each.
    """

    def __init__(self, costs: Costs, settings: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        self.costs = costs
        self._places = {
            name: {_key(setting): place for place, setting in enumerate(some)}
            for name, some in settings.items()
        }

    def seconds(self, components: Collection[Component], features: Collection[str] = ()) -> float:
        """A token, of the language model and of what mixes these components.

        Args:
            components: the language model among them.
            features: names of what their weights go by.
        """
        columns: dict[str, set[int]] = {}
        for one in components:
            if one != LM:
                columns.setdefault(one.expert, set()).add(self.place(one))
        asked = self.owners(features)
        experts = sum(
            self.costs.experts[name].seconds(columns.get(name, ()), features=name in asked)
            for name in columns.keys() | asked
        )
        shape = self.costs.lm_features if any(map(_of_lm, features)) else 0.0
        return self.costs.lm + shape + experts + (self.costs.mixing if columns else 0.0)

    def speed(self, components: Collection[Component], features: Collection[str] = ()) -> float:
        """That of the language model alone is 1; a mixture's, in tokens a second, is below."""
        return self.costs.lm / self.seconds(components, features)

    def owners(self, features: Collection[str]) -> set[str]:
        """The experts whose features these are."""
        return {*owners(features, self._places).values()} & self._places.keys()

    def shared(self, component: Component) -> float:
        """Seconds a token of the work before a column that others of its expert share."""
        place = self.place(component)
        groups = self.costs.experts[component.expert].groups
        return next(group.shared for group in groups if place in group.columns)

    def place(self, component: Component) -> int:
        """Of its column among those of its expert."""
        return self._places[component.expert][_key(component.setting)]


def _of_lm(feature: str) -> bool:
    return feature.startswith("lm_")


def _key(setting: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(setting.items()))
