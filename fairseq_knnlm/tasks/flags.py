"""The flags of the task ``knn_lm``, as one dataclass for fairseq, and back to typed options.

Each flag is written once, as a field of the options that it belongs to.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING
from typing import Any, Literal, Optional, Union, get_args, get_origin, get_type_hints

from fairseq.dataclass import ChoiceEnum
from fairseq.tasks.language_modeling import LanguageModelingConfig
from omegaconf import OmegaConf

from fairseq_knnlm.experts.registry import kinds
from fairseq_knnlm.runs.options import (
    DatastoreOptions,
    GenerationOptions,
    LanguageModelOptions,
    MixingOptions,
    Options,
    ReadingOptions,
    SavingOptions,
    WritingOptions,
)

#: Of a run, by the field of ``Options``; those of experts come from the registry.
OPTIONS: dict[str, type] = {
    "lm": LanguageModelOptions,
    "reading": ReadingOptions,
    "mixing": MixingOptions,
    "datastores": DatastoreOptions,
    "saving": SavingOptions,
    "writing": WritingOptions,
    "generation": GenerationOptions,
}


def _flags_of(options: type) -> Iterator[tuple[str, Any, Any]]:
    """Name, type as fairseq wants it, and field of each flag of a dataclass of options."""
    hints = get_type_hints(options)
    for one in dataclasses.fields(options):
        choices = one.metadata.get("choices") or _choices(hints[one.name])
        kind = ChoiceEnum(list(choices)) if choices else _optional(hints[one.name])
        default = one.default
        assert default is not MISSING
        yield one.name, kind, dataclasses.field(default=default, metadata=one.metadata)


def _choices(hint: Any) -> tuple[str, ...]:
    return get_args(hint) if get_origin(hint) is Literal else ()


def _optional(hint: Any) -> Any:
    """``Optional[int]`` of ``int | None``, which fairseq does not know."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    (kind,) = set(get_args(hint)) - {type(None)}
    return Optional[kind]  # noqa: UP045


def _every_options() -> list[type]:
    return [*OPTIONS.values(), *(kind.options for kind in kinds())]


def every_flag() -> dict[str, Mapping[str, Any]]:
    """The metadata of every flag, by its name."""
    every = _every_options()
    return {one.name: one.metadata for options in every for one in dataclasses.fields(options)}


def _made() -> type:
    """All flags as one dataclass over fairseq's own of language modelling."""
    fields = [found for options in _every_options() for found in _flags_of(options)]
    made = dataclasses.make_dataclass("KnnlmConfig", fields, bases=(LanguageModelingConfig,))
    made.__module__, made.__doc__ = __name__, "The flags of ``knn_lm``."
    return made


KnnlmConfig: Any = _made()


def options_of(cfg: Any) -> Options:
    """The options of a run.

    Args:
        cfg: a ``KnnlmConfig``, or fairseq's object with its fields.
    """
    parts: dict[str, Any] = {name: _read(cfg, options) for name, options in OPTIONS.items()}
    return Options(**parts, experts={kind.name: _read(cfg, kind.options) for kind in kinds()})


def _read(cfg: Any, options: type) -> Any:
    values = {one.name: getattr(cfg, one.name) for one in dataclasses.fields(options)}
    # fairseq's choices are members of an enumeration.
    return options(**{name: getattr(value, "value", value) for name, value in values.items()})


def is_given(cfg: Any, name: str) -> bool:
    """Whether a flag says anything but what it says where it is left out."""
    default = KnnlmConfig.__dataclass_fields__[name].default
    value = getattr(cfg, name)
    return value is not default and str(value) != str(default)


def whole_run(cfg: Any) -> Any | None:
    """fairseq's whole configuration, of which the task's is a part; None where it comes alone."""
    root = cfg._get_root() if OmegaConf.is_config(cfg) else None
    return root if root is not None and "common_eval" in root else None
