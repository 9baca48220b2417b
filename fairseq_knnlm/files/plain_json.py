"""JSON as the standard has it, written whole and read with bounds and types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from fairseq_knnlm.files.publishing import publish
from fairseq_knnlm.files.sizes import human_bytes

T = TypeVar("T")
#: Bytes of JSON that are read at most; a manifest of a trillion entries has less.
MOST_JSON = 256 * 2**20


def write_json(path: Path, content: dict[str, Any] | list[Any]) -> None:
    """Writes ``content`` as indented JSON, atomically.

    Raises:
        ValueError: where a number is NaN or infinite, which JSON does not have.
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with publish(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path: Path) -> str:
    """The text of a file that should hold JSON.

    Raises:
        ValueError: where there is no file, or it is too long or no text.
    """
    if not path.is_file():
        raise ValueError("no file")
    if path.stat().st_size > MOST_JSON:
        raise ValueError(f"more than {human_bytes(MOST_JSON)}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"no JSON (not even UTF-8: {error.reason})") from None


def parse_json(text: str) -> Any:
    """Plain objects of JSON text, as the standard has it: no NaN, no infinity.

    Raises:
        ValueError: saying why it is none.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant}, which is no number of JSON's")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("brackets nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"no JSON ({error})") from None


def typed(fields: Any, shape: type[T]) -> T:
    """Plain objects of JSON as ``shape``, a type that msgspec knows, checked.

    Raises:
        ValueError: naming the field that is missing, unknown, of another type or out of bounds.
    """
    try:
        return msgspec.convert(fields, shape, strict=True)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ValueError(str(error)) from None
