"""The sealed JSON of a datastore, read and written as docs/format.md describes it, so that a fault
can be planted under a seal that is right."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def sealed(content: dict[str, Any], *, right: bool = True) -> bytes:
    """A document's text, its seal right or that of before."""
    if right:
        content = {key: value for key, value in content.items() if key != "fingerprint"}
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        content["fingerprint"] = hashlib.sha256(canonical.encode()).hexdigest()
    return json.dumps(content, indent=2).encode()


@dataclass(frozen=True)
class Document:
    """Where a sealed JSON lies in a datastore's folder.

    Attributes:
        name: for the names of cases.
        file: that holds it.
    """

    name: str
    file: str

    def read(self, store: Path) -> dict[str, Any]:
        """The object."""
        return json.loads(self._bytes(store))

    def write(self, store: Path, text: bytes) -> None:
        """Puts other text in its place."""
        path = store / self.file
        if (place := trailer(path)) is None:
            path.write_bytes(text)
            return
        data, (start, end) = path.read_bytes(), place
        magic = data[end + 8 :]
        path.write_bytes(data[:start] + text + len(text).to_bytes(8, "little") + magic)

    def _bytes(self, store: Path) -> bytes:
        path = store / self.file
        place = trailer(path)
        data = path.read_bytes()
        return data if place is None else data[slice(*place)]


def trailer(path: Path) -> tuple[int, int] | None:
    """Where JSON stands at the end of another file: before its length, 8 bytes, and a magic word.

    None where the whole file is JSON.
    """
    data = path.read_bytes()
    if data[:1] == b"{":
        return None
    for magic in range(4, 33):
        end = len(data) - magic - 8
        start = end - int.from_bytes(data[end : end + 8], "little")
        if 0 <= start < end and data[start : start + 1] == b"{" and data[end - 1 : end] in b"}\n":
            return start, end
    raise AssertionError(f"no JSON in {path}")


MANIFEST = Document("manifest", "manifest.json")
CALIBRATION = Document("calibration", "calibration.json")


def card(store: Path) -> Document:
    """The card of a datastore's index: in the index itself, or beside it as it was once."""
    beside = store / "knn.index.json"
    return Document("card", beside.name if beside.is_file() else "knn.index")


@dataclass(frozen=True)
class Change:
    """A change of a JSON object.

    Attributes:
        name: for the names of cases.
        done: in words.
        says: a regular expression that a refusal must hold.
        make: the text of the changed object.
    """

    name: str
    done: str
    says: str
    make: Callable[[dict[str, Any]], bytes]


def of_fields(places: Iterable[str]) -> Iterator[Change]:
    """Every field dropped, and every field of another type, the seal right.

    Args:
        places: of the fields, with points between names: ``origin.model``, ``stacks.0.bits``.
    """
    for where in places:
        path = place(where)
        names = [key for key in path if isinstance(key, str)]
        says = "files" if names[-1].endswith(".npy") else names[-1]
        yield Change(f"{where} dropped", f"{where} left out, sealed anew", says, _dropped(path))
        done = f"{where} of another type, sealed anew"
        yield Change(f"{where} of another type", done, says, _retyped(path))


def place(where: str) -> tuple[str | int, ...]:
    """``"stacks.0.bits"`` as the keys that lead there; a file's name keeps its point."""
    keys = where.replace(".npy", "/npy").split(".")
    return tuple(int(key) if key.isdecimal() else key.replace("/npy", ".npy") for key in keys)


def of_documents() -> Iterator[Change]:
    """What can be wrong with any of them."""

    def raw(text: bytes) -> Callable[[dict[str, Any]], bytes]:
        return lambda _: text

    def updated(**fields: Any) -> Callable[[dict[str, Any]], bytes]:
        return lambda content: sealed({**content, **fields})

    def half(content: dict[str, Any]) -> bytes:
        text = sealed(content)
        return text[: len(text) // 2]

    def deep(content: dict[str, Any]) -> bytes:
        return (
            b'{"format": %s' % json.dumps(content["format"]).encode() + b', "x": ' + b"[" * 200000
        )

    kind = "another kind|no JSON|format"
    yield Change(
        "unknown field", "a field that nobody knows, sealed anew", "colour", updated(colour=1)
    )
    yield Change("another kind", "the format of another kind", kind, updated(format="cake"))
    yield Change(
        "no kind", "no format", kind, lambda x: sealed({k: x[k] for k in x if k != "format"})
    )
    yield Change("newer version", "version 99", "version 99|newer", updated(version=99))
    yield Change("version as text", "version '1'", "version", updated(version="1"))
    yield Change("version below 1", "version -1", "version", updated(version=-1))
    yield Change("version true", "version true", "version", updated(version=True))
    yield Change("empty file", "a file of no bytes", "no JSON|empty|kind", raw(b""))
    yield Change("half a file", "the second half cut off", "no JSON|damaged", half)
    yield Change("a list", "a list in the place of an object", "kind|object", raw(b"[]"))
    yield Change("null", "null in the place of an object", "kind|object", raw(b"null"))
    yield Change("not UTF-8", "bytes that are no UTF-8", "UTF-8|no JSON", raw(b'{"\xff\xfe": 1}'))
    yield Change("200,000 brackets", "200,000 brackets", "deep|no JSON", deep)
    yield Change(
        "wrong seal",
        "a field changed, not sealed anew",
        "altered|fingerprint|unknown",
        lambda content: sealed({**content, "colour": 1}, right=False),
    )
    yield Change(
        "seal as a number",
        "the seal a number",
        "altered|fingerprint",
        lambda content: sealed({**content, "fingerprint": 7}, right=False),
    )


def of_number(where: str) -> Iterator[Change]:
    """What can be wrong with a count."""
    number = place(where)
    for name, value in {"negative": -5, "of 400 digits": 10**400, "10^18": 10**18}.items():
        done = f"{where} {name}, sealed anew"
        yield Change(f"{where} {name}", done, f"{where}|bytes|rows", _replaced(number, value))
    for word in ("NaN", "Infinity"):

        def make(content: dict[str, Any], word: str = word) -> bytes:
            return sealed(changed(content, number, float(word)))

        says = f"{word}|{where}|no JSON"
        yield Change(f"{where} {word}", f"{where} {word}, sealed anew", says, make)


def value_at(content: Any, path: tuple[str | int, ...]) -> Any:
    """What stands in a place."""
    for key in path:
        content = content[key]
    return content


def changed(content: dict[str, Any], path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """A copy with another value in a place."""
    content = copy.deepcopy(content)
    value_at(content, path[:-1])[path[-1]] = value
    return content


def other_type(value: Any) -> Any:
    """A value of another type."""
    return 7 if isinstance(value, str | list | dict) else {"x": 1} if value is None else "seven"


def _replaced(path: tuple[str | int, ...], value: Any) -> Callable[[dict[str, Any]], bytes]:
    return lambda content: sealed(changed(content, path, value))


def _retyped(path: tuple[str | int, ...]) -> Callable[[dict[str, Any]], bytes]:
    return lambda content: sealed(changed(content, path, other_type(value_at(content, path))))


def _dropped(path: tuple[str | int, ...]) -> Callable[[dict[str, Any]], bytes]:
    def make(content: dict[str, Any]) -> bytes:
        content = copy.deepcopy(content)
        del value_at(content, path[:-1])[path[-1]]
        return sealed(content)

    return make
