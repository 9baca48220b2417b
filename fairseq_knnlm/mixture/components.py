"""What is mixed: an expert in one of its settings. Without torch, so that tables load at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

#: Where the weight of an expert that abstains (NaN) goes: to all others in proportion to theirs, or
#: to the language model.
Abstain = Literal["share", "lm"]
CONVENTIONS: tuple[Abstain, ...] = ("share", "lm")


@dataclass(frozen=True)
class Component:
    """An expert in one of its settings: one column of its predictions, as a mixer weighs it.

    Attributes:
        expert: its name; ``lm`` for the language model.
        setting: which of its columns.
    """

    expert: str
    setting: dict[str, Any]


LM = Component("lm", {})


def searches(expert: str) -> bool:
    """Whether the expert of that name searches a datastore: knn, knn2, ..."""
    return expert.startswith("knn")
