"""The card of a score table: what made it, and the bounds of all that it says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from fairseq_knnlm.calibration.costs import Costs
from fairseq_knnlm.calibration.settings import Finite, Name, check_setting
from fairseq_knnlm.calibration.share import Count, Share
from fairseq_knnlm.errors import TableError
from fairseq_knnlm.files import Fingerprint, parse_json, typed
from fairseq_knnlm.mixture.components import searches

FORMAT = "fairseq-knnlm score table"
VERSION = 2
#: Of the table of a share, which nothing can be fitted on or measured by before it is joined.
SHARE_VERSION = 3

Part = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Weighed(msgspec.Struct, frozen=True):
    """A component of a fixed mixture, as results tell it: with its settings beside these."""

    expert: Name
    weight: Part


class Blocks(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the text was cut, and what it was read in."""

    tokens_per_sample: Count | None = None
    context_window: Count | None = None
    sample_break_mode: str | None = None
    stride: Count | None = None
    precision: Annotated[str, msgspec.Meta(max_length=64)] | None = None


class Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds of what a score table says of itself (``docs/format.md``)."""

    split: str
    model: Annotated[str, msgspec.Meta(max_length=64)]
    experts: dict[Name, list[dict[str, Any]]]  # as ``check_setting`` has them
    features: list[Name]
    datastores: list[Fingerprint] = []
    described: dict[Name, dict[str, str | bool | Count | Finite | None]] = {}
    distance_ranks: list[Annotated[int, msgspec.Meta(ge=1, le=2**48)]] = []
    # What the run came to, as in the results JSON.
    tokens: Count = 0
    tokens_left_out: Count = 0
    tokens_impossible: Count = 0
    tokens_recalled: Count = 0
    base_loss: Finite | None = None
    base_perplexity: Finite | None = None
    loss: Finite | None = None
    perplexity: Finite | None = None
    seconds: Finite = 0.0
    tokens_per_second: Finite = 0.0
    context: Blocks | None = None
    mixed: list[Name] = []
    mixer: str = ""
    mixture: str = ""
    mixture_from: str = ""
    weights: list[dict[str, Any]] = []  # each a ``Weighed``
    k: Count = 0
    search_seconds: Finite = 0.0
    index: str = ""
    distances: str = ""
    pointers: str = ""
    searches_saved: Finite = 0.0
    searches_skipped: Part = 0.0
    datastore: str = ""
    entries: Count = 0
    versions: dict[str, str] = {}
    share: Share | None = None
    costs: Costs | None = None


def version_of(card: Mapping[str, Any]) -> int:
    """The version of a table with this card."""
    return SHARE_VERSION if card.get("share") else VERSION


def read_card(path: Path, text: str) -> dict[str, Any]:
    """The card, checked; still a dictionary, as it is written into results.

    Args:
        path: the table's, for words.
        text: the card, as JSON.

    Raises:
        TableError: where it is of another version.
        ValueError: where it is none, naming the field that is not as it should be.
    """
    card = parse_json(text)
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise ValueError("a file of another kind")
    version = card.get("version")
    if version != version_of(card):
        raise TableError(
            f"{path} is a score table of another version of fairseq-knnlm",
            expected=f"version {version_of(card)}",
            found=f"version {version}",
            do="write it again, with --score-table or `fairseq-knnlm tune --data`",
        )
    fields = {key: card[key] for key in card if key not in ("format", "version")}
    checked = typed(fields, Card)
    if checked.costs is not None:
        checked.costs.check(checked.experts)
    for number, component in enumerate(checked.weights):
        weighed = typed(component, Weighed)
        rest = {key: component[key] for key in component.keys() - {"expert", "weight"}}
        _check_setting(weighed.expert, rest, f"$.weights[{number}]")
    for name, settings in checked.experts.items():
        for number, setting in enumerate(settings):
            _check_setting(name, setting, f"$.experts.{name}[{number}]")
        if not settings:
            raise ValueError(f"an expert without settings, {name} - at `$.experts`")
        if name not in checked.described:
            raise ValueError(f"nothing of the expert {name} - at `$.described`")
        if searches(name) and not checked.k:
            raise ValueError("no number of neighbours - at `$.k`")
    return card


def _check_setting(expert: str, setting: dict[str, Any], where: str) -> None:
    try:
        check_setting(expert, setting)
    except ValueError as error:
        raise ValueError(f"{error} of `{where}`") from None
