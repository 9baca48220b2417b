"""Finds and reads ``calibration.json``, of which there is one for each set of datastores.

Takes no torch: what a mixture is and what it gained can be told anywhere, at once.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fairseq_knnlm.calibration.record import FORMAT, VERSION, Record, Strict, check_record
from fairseq_knnlm.errors import TableError
from fairseq_knnlm.files import MOST_JSON, human_bytes, read_sealed, typed

REMEDY = "fit it again with `fairseq-knnlm tune`, or pass --lmbda and --knn-temp"
#: What is said of a calibration that serves though it is not of the datastore as it is now.
FITTED_BEFORE = "fitted before the datastore was changed: tune again for the best figures"


class _GatesBeside(Strict):
    """Of version 2: the gates were in a file of their own."""

    file: str
    sha256: str


def calibration_path(path: Path, datastores: Sequence[str]) -> Path:
    """The file of a set of datastores: ``path`` for one alone, else a name made of the others.

    Args:
        path: ``calibration.json`` of the first.
        datastores: fingerprints of all.
    """
    if len(datastores) < 2:
        return path
    others = hashlib.sha256(":".join(datastores[1:]).encode()).hexdigest()[:16]
    return path.with_name(f"{path.stem}-{others}{path.suffix}")


def read_record(
    path: Path, datastores: Sequence[str], before: Sequence[Sequence[str]] = ()
) -> Record | None:
    """Reads what was fitted for a set of datastores, None where nothing was fitted for any.

    Args:
        path: ``calibration.json`` of the first.
        datastores: fingerprints of those in use.
        before: of each, those that it had before it was changed, the last one last. What was fitted
            then is found where nothing was since.

    Raises:
        TableError: where it is damaged, or where there are those of other sets only.
    """
    found = find_record(path, datastores, before)
    return None if found is None else found[1]


def find_record(
    path: Path, datastores: Sequence[str], before: Sequence[Sequence[str]] = ()
) -> tuple[Path, Record] | None:
    """The same, with the file that it is in."""
    # Before version 3 there was one file for all sets.
    for file in dict.fromkeys([calibration_path(path, datastores), path]):
        if file.is_file():
            record = _opened(file)
            if record.datastores == list(datastores):
                return file, record
    histories = [[*old, new] for old, new in zip(before, datastores, strict=False)]
    if (found := _of_before(path, histories)) is not None:
        return found
    if not (others := calibrated_sets(path)):
        return None
    raise TableError(
        "the calibration was fitted for another datastore, or for another set of them",
        expected=f"datastore {short(datastores)}",
        found="; ".join(others),
        do=REMEDY,
    )


def _of_before(path: Path, histories: Sequence[Sequence[str]]) -> tuple[Path, Record] | None:
    """The latest of what was fitted for datastores that had these fingerprints, one by one."""
    found: dict[tuple[int, ...], tuple[Path, Record]] = {}
    for file in _files(path):
        try:
            record = _opened(file)
        except TableError:
            continue  # which is said where nothing else is found
        pairs = list(zip(histories, record.datastores, strict=False))
        if len(record.datastores) == len(histories) and all(one in all_ for all_, one in pairs):
            found[tuple(all_.index(one) for all_, one in pairs)] = file, record
    return found[max(found)] if found else None


def calibrated_sets(path: Path, but: Sequence[str] = ()) -> list[str]:
    """In words, what sets of datastores there are calibrations of, a line each.

    Args:
        path: ``calibration.json`` of the first datastore.
        but: fingerprints of a set that is not to be named.
    """
    found = []
    for file in _files(path):
        try:
            record = _opened(file)
        except TableError:
            found.append(f"{file.name}, which is damaged")
            continue
        if record.datastores != list(but):
            names = f"{':'.join(record.names)}, " if record.names else ""
            found.append(f"datastore {short(record.datastores)} ({names}in {file.name})")
    return found


def short(fingerprints: Sequence[str]) -> str:
    """Their beginnings, for words."""
    return ", ".join(f"{fingerprint[:12]}..." for fingerprint in fingerprints)


def damaged(path: Path, found: Exception) -> TableError:
    """What is said of a file that holds no calibration."""
    return TableError(
        f"{path} is damaged or out of date", expected="a calibration", found=found, do=REMEDY
    )


def _files(path: Path) -> Iterator[Path]:
    name = re.compile(rf"{re.escape(path.stem)}(-[0-9a-f]{{16}})?{re.escape(path.suffix)}")
    if path.parent.is_dir():
        yield from sorted(one for one in path.parent.iterdir() if name.fullmatch(one.name))


def _opened(path: Path) -> Record:
    """The record of whatever datastores."""

    def renewed(fields: dict[str, Any]) -> dict[str, Any]:
        return _of_version_2(path, fields) if isinstance(fields.get("gates"), dict) else fields

    try:
        record, _ = read_sealed(path, FORMAT, range(2, VERSION + 1), Record, renewed)
        check_record(record)
    except (ValueError, OSError) as error:
        raise damaged(path, error) from None
    return record


def _of_version_2(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of version 3: what was reported then had been chosen by."""
    try:
        seal = typed(fields["gates"], _GatesBeside)
    except ValueError as error:
        raise ValueError(f"gates: {error}") from None
    file = path.with_suffix(".safetensors")
    if not file.is_file():
        raise ValueError(f"no {file.name} beside it")
    if file.stat().st_size > MOST_JSON:
        raise ValueError(f"a {file.name} of more than {human_bytes(MOST_JSON)}")
    packed = file.read_bytes()
    if hashlib.sha256(packed).hexdigest() != seal.sha256:
        raise ValueError(f"an altered {file.name} (its checksum differs)")
    stacks, skips, on = (fields.get(name) for name in ("stacks", "skips", "fitted_on"))
    if not isinstance(stacks, list) or not isinstance(on, dict):
        raise ValueError("no stacks, or not on what they were fitted")
    owners = [*stacks, *(skips if isinstance(skips, list) else [])]
    for owner in owners:
        if isinstance(owner, dict) and isinstance(owner.get("mixer"), dict):
            owner["mixer"]["abstain"] = "share"
    for stack in stacks:
        if isinstance(stack, dict):
            stack["choice_perplexity"] = stack.get("perplexity")
    return {
        "skips": [],
        **fields,
        "names": [],
        "fitted_on": {**on, "chosen_on": on.get("held_out"), "context": {}},
        "gates": base64.b64encode(packed).decode("ascii"),
    }
