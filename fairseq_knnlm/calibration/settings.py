"""Settings of experts, as score tables and calibrations name them: plain values by their names.

Those of this package's experts are known, and so are their bounds. An expert from elsewhere names
its settings as it likes: each is a finite number, a boolean or a text, and one that goes by a known
name keeps to that name's bounds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from fairseq_knnlm.files import typed
from fairseq_knnlm.mixture.components import searches

Name = Annotated[str, Meta(pattern=r"^[a-z]\w{0,63}$")]
#: These also keep out 1e999, which JSON reads as infinity, and numbers of a thousand digits.
Finite = Annotated[float, Meta(ge=-1e300, le=1e300)]
Whole = Annotated[int, Meta(ge=-(2**62), le=2**62)]
Value = str | bool | Whole | Finite
#: The tokens before one that experts know at most: ``lm.contexts.CONTEXT``, without its torch.
CONTEXT = 4


class Known(msgspec.Struct, forbid_unknown_fields=True):
    """Bounds of the settings with known names; each expert has some of them."""

    temperature: Annotated[float, Meta(gt=0, le=1e30)] = 1.0
    k: Annotated[int, Meta(ge=0, le=2**48)] = 0
    suffix: Annotated[int, Meta(ge=0, le=CONTEXT)] = 0
    theta: Annotated[float, Meta(ge=0, le=1e30)] = 1.0
    window: Annotated[int, Meta(ge=1, le=2**48)] = 1
    order: Annotated[int, Meta(ge=1, le=16)] = 1
    half_life: Annotated[float, Meta(gt=0, le=1e30)] = 1.0


class _Complete(msgspec.Struct, forbid_unknown_fields=True):
    """All settings of an expert, as a calibration keeps them: no default, and no other."""


class _Knn(_Complete):
    suffix: Annotated[int, Meta(ge=0, le=CONTEXT)]
    k: Annotated[int, Meta(ge=0, le=2**31)]
    temperature: Annotated[float, Meta(gt=0, le=1e300)]


class _Cache(_Complete):
    suffix: Annotated[int, Meta(ge=0, le=CONTEXT)]
    theta: Annotated[float, Meta(ge=0, le=1e300)]
    window: Annotated[int, Meta(ge=1, le=10**8)]


class _NGram(_Complete):
    order: Annotated[int, Meta(ge=1, le=CONTEXT + 1)]


class _History(_Complete):
    suffix: Annotated[int, Meta(ge=0, le=CONTEXT)]
    half_life: Annotated[float, Meta(gt=0, le=1e300)]


class _Suffix(_Complete):
    half_life: Annotated[float, Meta(gt=0, le=1e300)]


class _None(_Complete):
    """Of a language model."""


#: By the expert; ``knn2`` and on are like ``knn``.
COMPLETE: dict[str, type[_Complete]] = {
    "lm": _None,
    "knn": _Knn,
    "cache": _Cache,
    "ngram": _NGram,
    "history": _History,
    "suffix": _Suffix,
    "lm2": _None,
}


def check_name(expert: str) -> None:
    """Refuses what no expert is called.

    Raises:
        ValueError: saying so.
    """
    numbered = re.fullmatch(r"knn([2-9]|[1-9][0-9]{1,3})?", expert)
    if not re.fullmatch(r"[a-z]\w{0,63}", expert) or (searches(expert) and not numbered):
        raise ValueError(f"no expert {expert!r}")


def check_setting(expert: str, setting: Mapping[str, Any], *, complete: bool = False) -> None:
    """Refuses a setting that the expert of that name cannot have.

    Args:
        expert: its name.
        setting: values by name, as JSON has them.
        complete: of an expert of this package, all its settings must be there.

    Raises:
        ValueError: naming the setting that is missing, unknown, of another type or out of bounds.
    """
    kind = "knn" if searches(expert) else expert
    if kind in COMPLETE:
        typed(setting, COMPLETE[kind] if complete else Known)
        return
    known = set(Known.__struct_fields__)
    typed({name: value for name, value in setting.items() if name in known}, Known)
    for name in setting.keys() - known:
        try:
            typed({name: setting[name]}, dict[Name, Value])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
