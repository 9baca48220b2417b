"""JSON objects that tell their kind and version, and show any later change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from fairseq_knnlm.files.plain_json import parse_json, read_text, typed, write_json

T = TypeVar("T")
#: What ``fingerprint`` returns, as the type of a field.
Fingerprint = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


def write_sealed(path: Path, kind: str, version: int, content: dict[str, Any]) -> str:
    """Writes a JSON object that tells its kind and version and shows any later change.

    Returns:
        The seal: a fingerprint over kind, version and content.
    """
    sealed = seal(kind, version, content)
    write_json(path, sealed)
    return str(sealed["fingerprint"])


def seal(kind: str, version: int, content: dict[str, Any]) -> dict[str, Any]:
    """A JSON object that tells its kind and version and shows any later change."""
    sealed = {"format": kind, "version": version, **content}
    return {**sealed, "fingerprint": fingerprint(sealed)}


def read_sealed(
    path: Path,
    kind: str,
    versions: range | int,
    shape: type[T],
    renewed: Callable[[dict[str, Any]], dict[str, Any]] = lambda fields: fields,
) -> tuple[T, str]:
    """Reads what ``write_sealed`` wrote.

    Args:
        path: the file.
        kind: its format.
        versions: those that can be read; a number n for all from 1 to n.
        shape: a ``msgspec.Struct`` of the fields, with their bounds; others than these are refused.
        renewed: makes the fields of an older version those of ``shape``.

    Returns:
        The fields, checked, and the seal.

    Raises:
        ValueError: saying what was found, where it is no JSON object of that kind, of another
            version, altered, or has a field that is missing, unknown, of another type or out of
            its bounds.
    """
    return unseal(read_text(path), kind, versions, shape, renewed)


def unseal(
    text: str,
    kind: str,
    versions: range | int,
    shape: type[T],
    renewed: Callable[[dict[str, Any]], dict[str, Any]] = lambda fields: fields,
) -> tuple[T, str]:
    """The fields and the seal of what ``seal`` made, from JSON text; as ``read_sealed``."""
    content = parse_json(text)
    if not isinstance(content, dict) or content.get("format") != kind:
        raise ValueError("JSON of another kind")
    versions = range(1, versions + 1) if isinstance(versions, int) else versions
    version = content.get("version")
    if type(version) is not int or version >= versions.stop:  # True is an int, too
        raise ValueError(f"version {version!r}, written by a newer fairseq-knnlm")
    if version < versions.start:
        raise ValueError(f"version {version}, written by an older fairseq-knnlm")
    found = content.pop("fingerprint", None)
    if found != fingerprint(content):
        raise ValueError("an altered file (its fingerprint differs)")
    fields = {key: content[key] for key in content if key not in ("format", "version")}
    fields = renewed(fields)
    made = typed(fields, shape)
    _check_complete(fields, msgspec.to_builtins(made))
    return made, found


def _check_complete(given: Any, whole: Any, place: str = "$") -> None:
    """Refuses what was left to a default: a writer of ours leaves no field out."""
    if isinstance(given, list) and isinstance(whole, list):
        for number, pair in enumerate(zip(given, whole, strict=True)):
            _check_complete(*pair, f"{place}[{number}]")
    elif isinstance(given, dict) and isinstance(whole, dict):
        for name, field in whole.items():
            if name not in given:
                raise ValueError(f"Object missing required field `{name}` - at `{place}`")
            _check_complete(given[name], field, f"{place}.{name}")


def fingerprint(content: dict[str, Any]) -> str:
    """SHA-256 (hex) of a JSON object, whatever the order of its keys."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
