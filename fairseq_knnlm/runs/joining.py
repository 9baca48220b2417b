"""The shares of one evaluation, joined to what one process would have found.

Figures add up from exact sums, and so do not depend on how many shares there were. All that is no
sum, and no time, must be the same in all shares: then they are of one run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from fairseq_knnlm.calibration.settings import Finite
from fairseq_knnlm.calibration.share import Count, Share
from fairseq_knnlm.calibration.table import read_card_of, read_part
from fairseq_knnlm.calibration.writer import ScoreTableWriter
from fairseq_knnlm.errors import TableError
from fairseq_knnlm.files import parse_json, typed
from fairseq_knnlm.files.plain_json import read_text
from fairseq_knnlm.runs.raw_text import RawText, text_figures
from fairseq_knnlm.runs.receipt import anywhere
from fairseq_knnlm.runs.results import figures, losses, told_sections
from fairseq_knnlm.runs.sections import joined
from fairseq_knnlm.runs.sums import added

#: Of a share, what differs from one to the next.
OWN = {"number", "first_batch", "batches", "base_log_prob", "log_prob", "counts", "sections"}
#: Where a datastore lies may differ, what lies there is known by its fingerprint; and what columns
#: cost was measured by each share: that of the first is as good as any.
APART = {"datastore", "costs"}


class Text(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A ``RawText``, with its bounds."""

    source: str
    words: Count
    bytes: Count
    unknown: Count
    agreement: Finite | None = None


class Measured(msgspec.Struct, frozen=True):
    """Bounds of what is added up or told of results; other fields are compared alone."""

    tokens: Count
    tokens_left_out: Count
    tokens_impossible: Count
    seconds: Finite
    tokens_per_second: Finite
    base_loss: Finite | None
    base_perplexity: Finite | None
    loss: Finite | None
    perplexity: Finite | None
    split: str
    share: Share | None = None
    text: Text | None = None
    sections: dict[str, Any] = {}
    experts: list[str] | dict[str, Any] = []
    mixed: list[str] = []
    mixture: str = ""
    mixture_from: str = ""


@dataclass(frozen=True)
class Part:
    """What a file holds of a share, or of a whole run.

    Attributes:
        path: the file.
        found: its results, or a table's card.
        measured: the same, checked.
    """

    path: Path
    found: dict[str, Any]
    measured: Measured

    @property
    def share(self) -> Share:
        """Which share it is."""
        assert self.measured.share is not None
        return self.measured.share

    @property
    def told(self) -> dict[str, Any]:
        """All that must be the same in every share of a run, by its name."""
        share = msgspec.to_builtins(self.share)
        own = OWN | {"flags"}
        flags = {f"--{name.replace('_', '-')}": x for name, x in self.share.flags.items()}
        fields = {name: x for name, x in share.items() if name not in own}
        # Conditions follow from the rest.
        others = {*_added(self), "share", "conditions"}
        rest = {name: x for name, x in self.found.items() if name not in others}
        cut = {"sections": [len(self.share.sections.tokens), self.measured.sections.get("rows")]}
        told = flags | fields | rest | cut
        told |= {"receipt": anywhere(rest.get("receipt"))}
        return {name: x for name, x in told.items() if name not in APART}


def join_results(paths: Sequence[Path]) -> dict[str, Any]:
    """The results of a whole run, from those of all its shares.

    Args:
        paths: results JSONs, in any order; or that of a whole run alone.

    Raises:
        TableError: where one cannot be read, is missing, is there twice, or is of another run.
    """
    return _joined([_part(path, _read_results) for path in paths])


def join_cards(paths: Sequence[Path]) -> dict[str, Any]:
    """The card of the score table of a whole run, from the tables of all its shares.

    Args:
        paths: score tables, in any order; or that of a whole run alone.

    Raises:
        TableError: as ``join_results``.
    """
    return _joined([_part(path, read_card_of) for path in paths])


def join_tables(paths: Sequence[Path], to: Path) -> dict[str, Any]:
    """Writes the score table of a whole run, from those of all its shares; one is held at a time.

    Args:
        paths: score tables, in any order.
        to: the file to make, replaced whole at the end.

    Returns:
        Its card.

    Raises:
        TableError: as ``join_results``, or where columns differ.
    """
    card = join_cards(paths)
    writer = ScoreTableWriter(to)
    kinds: dict[str, Any] = {}
    for path in paths:
        columns = read_part(path).columns
        found = {name: (column.dtype, column.shape[1:]) for name, column in columns.items()}
        kinds = kinds or found
        _refuse_others(paths[0], path, kinds, found)
        writer.write(columns)
    written = {name: x for name, x in card.items() if name not in ("format", "version")}
    writer.publish(written)
    return card


def _part(path: Path, read: Callable[[Path], dict[str, Any]]) -> Part:
    found = read(path)
    try:
        fields = {name: x for name, x in found.items() if name in Measured.__struct_fields__}
        return Part(path, found, typed(fields, Measured))
    except ValueError as error:
        raise _unreadable(path, error) from None


def _read_results(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(read_text(path))
        if not isinstance(found, dict):
            raise ValueError("JSON of another kind")
    except ValueError as error:
        raise _unreadable(path, error) from None
    return found


def _unreadable(path: Path, error: ValueError) -> TableError:
    return TableError(
        f"{path} cannot be read",
        expected="results of a share, as --results-json FILE writes them",
        found=error,
        do="run that share again",
    )


def _joined(parts: Sequence[Part]) -> dict[str, Any]:
    if len(parts) == 1 and parts[0].measured.share is None:
        return {name: x for name, x in parts[0].found.items() if name != "fingerprint"}
    _check_shares(parts)
    parts = sorted(parts, key=lambda part: part.share.number)
    _check_whole(parts)
    whole = [part.measured for part in parts]
    shares = [part.share for part in parts]
    own = {"share", "fingerprint"}
    found = {name: x for name, x in parts[0].found.items() if name not in own}
    base, mixed = (
        added(some)
        for some in ([one.base_log_prob for one in shares], [one.log_prob for one in shares])
    )
    sections = joined([share.sections for share in shares])
    counted = losses(
        tokens=sum(one.tokens for one in whole),
        base_log_prob=base,
        log_prob=mixed,
        seconds=sum(one.seconds for one in whole),
        impossible=sum(one.tokens_impossible for one in whole),
        left_out=sum(one.tokens_left_out for one in whole),
        sections=sections,
    ) | figures(_summed([share.counts for share in shares]))
    if (text := whole[0].text) is not None:
        counted |= text_figures(RawText(**msgspec.structs.asdict(text)), base, mixed)
    counted["sections"] = whole[0].sections | told_sections(sections)
    # A table's card has some of the results.
    return found | {name: x for name, x in counted.items() if name in found}


def _added(part: Part) -> set[str]:
    """Fields of results that are made anew of sums."""
    losing = losses(tokens=0, base_log_prob=0, log_prob=0, seconds=0)
    return {*losing, *figures(part.share.counts), "sections", "fingerprint"}


def _summed(counts: Iterable[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    total: dict[str, dict[str, float]] = {}
    for one in counts:
        for kind, some in one.items():
            into = total.setdefault(kind, {})
            for name, count in some.items():
                into[name] = into.get(name, 0) + count
    return total


def _check_shares(parts: Sequence[Part]) -> None:
    """Refuses a whole run among shares, those of other runs, and what is there twice or missing."""
    for part in parts:
        if part.measured.share is None:
            raise TableError(
                f"{part.path} is of a whole run",
                expected="files of shares, which runs with --num-shards write; or one file alone",
                found=f"{len(parts)} files",
                do="leave it out",
            )
    first = parts[0]
    for part in parts[1:]:
        _refuse_others(first.path, part.path, first.told, part.told)
    by_number: dict[int, Path] = {}
    for part in parts:
        if (other := by_number.get(part.share.number)) is not None:
            raise TableError(
                f"share {part.share.number} of {part.share.of} is there twice",
                expected="each share once",
                found=f"{other} and {part.path}",
                do="leave one of them out",
            )
        by_number[part.share.number] = part.path
    missing = [number for number in range(first.share.of) if number not in by_number]
    if missing:
        numbers = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        raise TableError(
            f"{len(missing)} of {first.share.of} shares are missing",
            expected=f"each of 0 to {first.share.of - 1}, as --shard-id named them",
            found=f"no share {numbers}",
            do="run these too, or name their files",
        )


def _check_whole(parts: Sequence[Part]) -> None:
    """Refuses shares of other batches, such as of another ``--max-tokens``."""
    reached = 0
    for part in parts:
        share = part.share
        if share.first_batch != reached:
            batches = ({"first batch": number} for number in (reached, share.first_batch))
            _refuse_others(parts[0].path, part.path, *batches)
        reached += share.batches
    tokens = sum(part.measured.tokens for part in parts)
    share = parts[0].share
    if (reached, tokens) != (share.of_batches, share.of_tokens):
        raise TableError(
            "the shares do not add up to the whole run",
            expected=f"{share.of_tokens:,} tokens in {share.of_batches:,} batches",
            found=f"{tokens:,} tokens in {reached:,} batches",
            do="run all shares again, with the same flags",
        )


def _refuse_others(
    first: Path, second: Path, then: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """Refuses a second file of which something differs from the first."""
    for name in sorted(then.keys() | now.keys()):
        one, other = then.get(name), now.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            parts = ({f"{name} {part}": x for part, x in each.items()} for each in (one, other))
            _refuse_others(first, second, *parts)
        elif one != other:
            raise TableError(
                f"{first} and {second} are of different runs",
                expected=f"{name} {_short(one)}, as in {first}",
                found=f"{name} {_short(other)}",
                do="join the shares of one run: the same flags, but for --shard-id and the files "
                "that are written",
            )


def _short(value: Any) -> str:
    words = "none" if value is None else str(value)
    return words if len(words) <= 100 else f"{words[:100]}..."
