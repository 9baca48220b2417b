"""A kind of expert: all that the rest must know of one, in one object.

Each expert's file ends with its ``KIND``; ``registry`` lists them. A kind's flags are the fields of
a frozen dataclass, its options, by the same names. What a flag is for stands in the field's
metadata (``flag``), so that commands read, check and report it without knowing the expert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.errors import ConfigError, TableError
from fairseq_knnlm.experts.contract import Expert
from fairseq_knnlm.lm.fingerprints import model_fingerprint

#: Of an expert, where nothing was fitted and no flag gives it.
DEFAULT_WEIGHT = 0.1


def flag(default: Any, help: str, **roles: Any) -> Any:
    """A field of a dataclass of options: a flag by the same name.

    Args:
        default: what it is where it is left out.
        help: what it says of itself.
        roles: what it is for, if anything that all must know:
            ``weight=True``, the weight of the expert;
            ``setting="temperature"``, a field of the kind's setting, for all of its columns;
            ``checkpoint=True``, a further language model, without which the expert cannot be;
            ``counts="neighbours"``, a number of these, 1 or more;
            ``choices=(...)``, where the type does not tell them.
    """
    return dataclasses.field(default=default, metadata={"help": help, **roles})


def spelled(name: str) -> str:
    """A flag as it is typed."""
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class Models:
    """The language models of a run, once they are loaded, and what experts must know of the text.

    Attributes:
        first: the one that the others are mixed with.
        width: D, numbers in a key.
        eos: the id that ends a line.
        others: by the expert's name, those of its ``checkpoint`` flag.
    """

    first: Any
    width: int
    eos: int
    others: Mapping[str, Any]

    @cached_property
    def fingerprints(self) -> Mapping[str, str]:
        """Of the others, computed once.

        Raises:
            ModelError: where weights are not all numbers.
        """
        return {name: model_fingerprint(model) for name, model in self.others.items()}


@dataclass(frozen=True)
class Opened:
    """An expert of a run, as far as it can be had before any model is loaded.

    Attributes:
        name: the kind's, with a number from the second datastore on: ``knn2``.
        kind: of what kind it is.
        options: the kind's flags.
        parts: what ``Kind.open`` gave.
    """

    name: str
    kind: Kind
    options: Any
    parts: Any


class Kind:
    """What the rest must know of a kind of expert. Subclasses say what differs.

    Attributes:
        name: in ``--experts``, in score tables and calibrations; features begin with it.
        options: a frozen dataclass, whose fields are the flags (``flag``).
        setting: a frozen dataclass, what one column is; its defaults are used where nothing else is
            said.
        default_weight: where nothing was fitted and no flag gives it.
        numbered: there is one for each datastore: ``knn``, ``knn2``, ``knn3``.
        needs_datastore: it is none without ``--dstore-filename``.
        optional: its flags may be given where it is not asked; they are then named, not refused.
    """

    name: ClassVar[str]
    options: ClassVar[type]
    setting: ClassVar[type]
    default_weight: ClassVar[float] = DEFAULT_WEIGHT
    numbered: ClassVar[bool] = False
    needs_datastore: ClassVar[bool] = False
    optional: ClassVar[bool] = False

    # What it is, from the flags alone

    def check(self, options: Any, asked: bool) -> None:
        """Refuses flags that cannot be used.

        Args:
            options: the kind's flags.
            asked: whether the expert may come to be asked in this run.

        Raises:
            ConfigError: naming the flag.
        """

    def reads(self, options: Any) -> Mapping[str, list[Path]]:
        """Files that its flags name, by the flag, besides checkpoints."""
        return {}

    def needs_order(self, options: Any) -> bool:
        """Whether it must be given the text in its order."""
        return False

    def check_sentences(self, options: Any) -> None:
        """Refuses flags that make no sense where every sentence is a text of its own.

        Raises:
            ConfigError: naming the flag.
        """

    # Before any model is loaded

    def open(self, options: Any, stores: Sequence[Datastore], number: int) -> Any:
        """Opens what the flags name, and refuses what does not fit together.

        Args:
            options: the kind's flags.
            stores: the datastores of the run, opened.
            number: of the one that this expert is of, from 0; 0 where it is of all or none.

        Returns:
            Whatever the other methods need; it becomes ``Opened.parts``.

        Raises:
            KnnlmError: of the kind that fits what is wrong.
        """

    def idle(self, options: Any, opened: Sequence[Opened]) -> Iterator[str]:
        """In words, a line each, which of its flags do nothing in this run.

        Args:
            options: the kind's flags.
            opened: the experts of this kind in the run; none where it is not asked.
        """
        yield from ()

    # Once the models are loaded

    def grid(self, opened: Opened, models: Models) -> Sequence[Any]:
        """The settings of a score table."""
        return [self.default(opened, models)]

    def default(self, opened: Opened, models: Models) -> Any:
        """The setting that is used where nothing was fitted."""
        return self.setting()

    def make(
        self, opened: Opened, models: Models, settings: Sequence[Any], features: bool
    ) -> Expert:
        """The expert.

        Args:
            opened: what was opened.
            models: the language models.
            settings: distinct ones, a column each.
            features: name features too.

        Raises:
            KnnlmError: of the kind that fits what is wrong.
        """
        raise NotImplementedError

    def described(self, opened: Opened, models: Models) -> dict[str, Any]:
        """What it is in this run: what a calibration holds for."""
        return {}

    # When the text has been read

    def finish(self, opened: Opened) -> None:
        """Refuses what turned out to be damaged while it was used.

        Raises:
            KnnlmError: of the kind that fits.
        """

    def results(self, opened: Sequence[Opened], experts: Sequence[Any]) -> dict[str, Any]:
        """What there is to tell of the run, for the results JSON, besides what was counted.

        Args:
            opened: the experts of this kind, one at least.
            experts: those of them that were made, which may be none.
        """
        return {}

    def counts(self, experts: Sequence[Any]) -> dict[str, float]:
        """What they counted in the run; that of the shares of one adds up.

        Args:
            experts: of this kind, as far as they were made.
        """
        return {}

    def figures(self, counts: Mapping[str, float]) -> dict[str, Any]:
        """What the results JSON tells of what was counted.

        Args:
            counts: as ``counts`` gives them, or their sums over shares.
        """
        return dict(counts)

    def lines(self, found: Mapping[str, Any]) -> Iterator[str]:
        """The same as lines of the report.

        Args:
            found: the results of all.
        """
        yield from ()

    def card(self, opened: Sequence[Opened]) -> dict[str, Any]:
        """What its columns in a score table are, besides their settings."""
        return {}

    # What follows from these

    @property
    def searches(self) -> bool:
        """Whether it searches a datastore, which tables and calibrations know by the name."""
        return self.name.startswith("knn")

    def flags(self, role: str | None = None) -> dict[str, Any]:
        """By the flag's name, what it says of a role; of all flags where none is named."""
        fields = dataclasses.fields(self.options)
        return {
            one.name: one.metadata.get(role)
            for one in fields
            if role is None or one.metadata.get(role) is not None
        }

    @property
    def plain_flags(self) -> list[str]:
        """Flags that are neither a weight nor a setting, which a calibration would give."""
        fitted = {*self.flags("weight"), *self.flags("setting")}
        return [name for name in self.flags() if name not in fitted]

    def names(self, stores: int) -> list[str]:
        """Of the experts of this kind, where there are so many datastores."""
        numbers = range(2, stores + 1) if self.numbered else ()
        return [self.name, *(f"{self.name}{number}" for number in numbers)]

    def checkpoint(self, options: Any) -> str | None:
        """The path of the further language model."""
        return next((getattr(options, name) for name in self.flags("checkpoint")), None)

    def is_equipped(self, options: Any, stores: int) -> bool:
        """Whether flags name all without which the expert cannot be."""
        has_checkpoint = all(getattr(options, name) for name in self.flags("checkpoint"))
        return has_checkpoint and (stores > 0 or not self.needs_datastore)

    def given(self, options: Any) -> list[str]:
        """Flags that give a weight or a setting."""
        fitted = [*self.flags("weight"), *self.flags("setting")]
        return [name for name in self.flags() if name in fitted and _given(options, name)]

    def leaves_open(self, options: Any) -> bool:
        """Whether there is a weight or setting that no flag gives."""
        return len(self.given(options)) < len(self.flags()) - len(self.plain_flags)

    def given_weight(self, options: Any) -> float | None:
        """The weight that a flag gives."""
        return next((getattr(options, name) for name in self.flags("weight")), None)

    def given_settings(self, options: Any) -> dict[str, Any]:
        """What flags give of every column's setting."""
        return {
            setting: getattr(options, name)
            for name, setting in self.flags("setting").items()
            if _given(options, name)
        }

    def read(self, setting: Mapping[str, Any]) -> Any:
        """A setting as it stands in a calibration.

        Raises:
            TableError: where this kind has no such setting.
        """
        try:
            found: Any = msgspec.convert(dict(setting), self.setting)
            if asdict(found) != setting:
                raise ValueError(f"a setting of {', '.join(setting) or 'nothing'}")
        except (msgspec.ValidationError, ValueError) as error:
            raise TableError(
                f"the calibration mixes {self.name} in a setting that it does not have",
                expected=", ".join(one.name for one in dataclasses.fields(self.setting)) or "none",
                found=error,
                do="fit it again with `fairseq-knnlm tune`",
            ) from None
        return found


def _given(options: Any, name: str) -> bool:
    return getattr(options, name) is not None


def check_unmerged(store: Datastore, what: str, remedy: str) -> None:
    """Refuses a datastore that no longer holds every token of its text.

    Args:
        store: the datastore.
        what: that needs them.
        remedy: what to do.

    Raises:
        ConfigError: where entries were merged.
    """
    if store.manifest.merged:
        raise ConfigError(
            f"{store.path} no longer holds its text: entries were merged",
            expected=f"for {what}, a datastore of every token",
            found="a compressed one",
            do=remedy,
        )
