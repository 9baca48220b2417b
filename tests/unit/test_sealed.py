"""JSON that tells its kind and version, and that it was altered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import msgspec
import pytest

from fairseq_knnlm.files import (
    fingerprint,
    parse_json,
    read_sealed,
    write_json,
    write_sealed,
)

KIND = "test of sealed files"


def test_sealed_round_trip(tmp_path: Path) -> None:
    content = {"rows": 3, "nested": {"é": [1.5, None, "x"]}, "empty": {}}
    seal = write_sealed(tmp_path / "a.json", KIND, 2, content)
    assert read_sealed(tmp_path / "a.json", KIND, 2, dict) == (content, seal)
    # a newer reader opens older files
    assert read_sealed(tmp_path / "a.json", KIND, 3, dict) == (content, seal)
    plain = json.loads((tmp_path / "a.json").read_text())
    assert plain == {"format": KIND, "version": 2, **content, "fingerprint": seal}


def test_the_seal_depends_on_kind_version_and_content(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    seals = {
        write_sealed(file, kind, version, content)
        for kind in (KIND, "other")
        for version in (1, 2)
        for content in ({"a": 1}, {"a": 2}, {"b": 1})
    }
    assert len(seals) == 12


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ('"rows": 3', '"rows": 4', "altered"),
        ('"rows": 3', '"rows": 3, "more": 1', "altered"),
        ('"fingerprint"', '"fingerprinz"', "altered"),
        ('"version": 1', '"version": 2', "newer"),
        ('"version": 1', '"version": "1"', "newer"),
        (KIND, "something else", "another kind"),
        ("{", "[", "no JSON"),
        ("}", "", "no JSON"),
    ],
)
def test_a_broken_seal_is_told(tmp_path: Path, before: str, after: str, says: str) -> None:
    file = tmp_path / "a.json"
    write_sealed(file, KIND, 1, {"rows": 3})
    assert before in file.read_text()
    file.write_text(file.read_text().replace(before, after, 1))
    with pytest.raises(ValueError, match=says):
        read_sealed(file, KIND, 1, dict)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"\xff\xfe\x00", b"{}"])
def test_what_was_never_sealed_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match="JSON"):
        read_sealed(tmp_path / "a.json", KIND, 1, dict)


def test_fingerprint_ignores_the_order_of_keys_and_nothing_else() -> None:
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": [1, 2]}) != fingerprint({"a": [2, 1]})
    assert fingerprint({"a": 1}) != fingerprint({"a": "1"})


class Card(msgspec.Struct, forbid_unknown_fields=True):
    rows: Annotated[int, msgspec.Meta(ge=1)]
    name: str = ""
    parts: tuple[str, ...] = ()


CARD = {"rows": 3, "name": "", "parts": ["a"]}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({**CARD, "more": 4}, "more"),
        ({"name": "a", "parts": []}, "rows"),
        ({"rows": 3, "parts": []}, "name"),
        ({**CARD, "rows": "3"}, "rows"),
        ({**CARD, "rows": 3.0}, "rows"),
        ({**CARD, "rows": 0}, "rows"),
        ({**CARD, "rows": None}, "rows"),
        ({**CARD, "name": 1}, "name"),
    ],
)
def test_a_sealed_file_with_other_fields(tmp_path: Path, fields: dict, says: str) -> None:
    """Written by somebody else, with a seal that fits: the field is named."""
    path = tmp_path / "card.json"
    write_sealed(path, "kind", 1, fields)
    with pytest.raises(ValueError, match=says):
        read_sealed(path, "kind", 1, Card)


def test_a_sealed_file_with_the_right_fields(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    write_sealed(path, "kind", 1, CARD)
    assert read_sealed(path, "kind", 1, Card)[0] == Card(3, "", ("a",))
    # an older version can be renewed, or refused
    renewed = read_sealed(path, "kind", 2, Card, lambda fields: {**fields, "name": "old"})
    assert renewed[0] == Card(3, "old", ("a",))
    with pytest.raises(ValueError, match="older"):
        read_sealed(path, "kind", range(2, 4), Card)


def test_a_version_is_a_number(tmp_path: Path) -> None:
    write_sealed(tmp_path / "a.json", "kind", True, CARD)
    with pytest.raises(ValueError, match="version True"):
        read_sealed(tmp_path / "a.json", "kind", 1, Card)


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": -Infinity}', "[" * 200_000, '{"a": 1}}'])
def test_json_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"JSON|brackets"):
        parse_json(text)


def test_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())
