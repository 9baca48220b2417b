"""The kinds of experts: a line for each, and more from outside the package.

A package of somebody else's adds one with ``register``, before ``fairseq_knnlm.tasks`` is imported,
where the flags of all kinds become flags of fairseq.
"""

from __future__ import annotations

import re

from fairseq_knnlm.experts import cache, lm, neighbours, ngram, suffix
from fairseq_knnlm.experts.kind import Kind

#: The one that is asked where nothing else is said.
DEFAULT = "knn"

_KINDS: dict[str, Kind] = {}


def register(kind: Kind) -> None:
    """Adds a kind.

    Raises:
        ValueError: where another has its name or one of its flags.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*", kind.name) or kind.name == "lm":
        raise ValueError(f"{kind.name!r} is no name of an expert: small letters and digits")
    for other in kinds():
        if other.name == kind.name:
            raise ValueError(f"there is an expert {kind.name} already")
        if both := set(other.flags()) & set(kind.flags()):
            raise ValueError(f"{other.name} has the flag {min(both)} already")
    _KINDS[kind.name] = kind


def kinds() -> tuple[Kind, ...]:
    """All kinds."""
    return tuple(_KINDS.values())


def find_kind(expert: str) -> Kind | None:
    """The kind of an expert: of ``knn2`` that of ``knn``, of ``lm2`` its own; None of no other."""
    if (kind := _KINDS.get(expert)) is not None:
        return kind
    kind = _KINDS.get(expert.rstrip("0123456789"))
    return kind if kind is not None and kind.numbered else None


def kind_of(expert: str) -> Kind:
    """The same, where there must be one.

    Raises:
        KeyError: where there is none.
    """
    kind = find_kind(expert)
    if kind is None:
        raise KeyError(expert)
    return kind


for _kind in (neighbours.KIND, cache.KIND, ngram.KIND, suffix.KIND, lm.KIND):
    register(_kind)
