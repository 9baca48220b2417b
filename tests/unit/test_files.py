"""Files appear whole or not at all, and tell when they were altered."""

from __future__ import annotations

import hashlib
import itertools
import json
import resource
import stat
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import msgspec
import pytest
from stores import alter

from fairseq_knnlm.errors import BusyError, OutputError
from fairseq_knnlm.files import (
    Claim,
    altered,
    check_outputs,
    checksums,
    fingerprint,
    human_bytes,
    integrity,
    parse_json,
    publish,
    read_sealed,
    reserve,
    write_json,
    write_sealed,
)

KIND = "test of sealed files"


def test_publish_shows_the_file_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with publish(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        inode = temporary.stat().st_ino
    assert path.read_text() == "whole"
    assert path.stat().st_ino == inode  # renamed, not copied
    assert list(path.parent.iterdir()) == [path]


def test_publish_makes_files_that_others_can_read(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with publish(path) as temporary:
        temporary.write_text("shared")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [None, "old"])
def test_a_failed_publish_leaves_what_was_there(
    tmp_path: Path, error: type[BaseException], before: str | None
) -> None:
    path = tmp_path / "file.txt"
    if before is not None:
        path.write_text(before)
    with pytest.raises(error), publish(path) as temporary:
        temporary.write_text("half")
        raise error
    assert [file.read_text() for file in tmp_path.iterdir()] == ([before] if before else [])


def test_publish_replaces(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    write_json(path, [2])
    assert json.loads(path.read_text()) == [2]
    assert list(tmp_path.iterdir()) == [path]


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


@pytest.fixture
def chunked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of 100 chunks of 8 bytes, the last one short."""
    monkeypatch.setattr(integrity, "CHUNK_BYTES", 8)
    file = tmp_path / "bytes"
    file.write_bytes(bytes(number % 251 for number in range(8 * 99 + 3)))
    return file


def test_checksums_are_of_the_chunks(chunked: Path) -> None:
    content = chunked.read_bytes()
    parts = [content[start : start + 8] for start in range(0, len(content), 8)]
    expected = [hashlib.sha256(part).hexdigest()[:16] for part in parts]
    assert len(expected) == 100
    assert checksums(chunked) == expected
    assert checksums(chunked, [99, 0, 7]) == [expected[99], expected[0], expected[7]]


def test_every_alteration_is_found_when_everything_is_read(chunked: Path) -> None:
    expected, content = checksums(chunked), chunked.read_bytes()
    assert not altered(chunked, expected, everything=True)
    for place in range(0, len(content), 29):
        changed = bytearray(content)
        changed[place] ^= 128
        chunked.write_bytes(bytes(changed))
        assert altered(chunked, expected, everything=True)


def test_opening_reads_an_even_sample_with_both_ends(chunked: Path) -> None:
    expected, content = checksums(chunked), chunked.read_bytes()
    noticed = []
    for chunk in range(100):
        changed = bytearray(content)
        changed[8 * chunk] ^= 128
        chunked.write_bytes(bytes(changed))
        if altered(chunked, expected):
            noticed.append(chunk)
    assert len(noticed) == integrity.CHUNKS_ON_OPEN
    assert (noticed[0], noticed[-1]) == (0, 99)
    gaps = {after - before for before, after in itertools.pairwise(noticed)}
    assert gaps <= {3, 4}


def test_a_file_of_few_chunks_is_read_whole(chunked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "CHUNKS_ON_OPEN", 100)
    expected = checksums(chunked)
    alter(chunked)
    assert altered(chunked, expected)


def test_an_empty_file_has_no_chunks(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert checksums(tmp_path / "empty") == []
    assert not altered(tmp_path / "empty", [])


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1536, "1.5 KiB"),
        (5 * 2**20, "5.0 MiB"),
        (2**30, "1.0 GiB"),
        (3000 * 2**40, "3000.0 TiB"),
    ],
)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


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


def hold(path: Path) -> subprocess.Popen:
    """A process that claims ``path``, leaves something half done, and waits to be killed."""
    code = """
import sys, time
from pathlib import Path
from fairseq_knnlm.files import Claim, publish
path = Path(sys.argv[1])
with publish(path) as temporary:
    temporary.write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def test_one_writer_at_a_time_and_nothing_of_a_killed_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    process = hold(path)
    with pytest.raises(BusyError, match="another process"):
        check_outputs({"--out": path})
    process.kill()
    process.wait()
    assert len(list(tmp_path.iterdir())) == 3  # lock and half a file beside it
    check_outputs({"--out": path})
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "before"


def test_a_claim_within_a_claim(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with Claim(path):
        half = tmp_path / ".a.txt.partial-mine"
        half.touch()
        with publish(path) as temporary:
            temporary.write_text("whole")
        assert half.exists()  # its own
    assert path.read_text() == "whole"


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    bad = ["/", ".", "..", tmp_path, tmp_path / "file/below", tmp_path / ("a" * 300), "/dev/null"]
    for path in [*bad, tmp_path / "nowhere", "/proc/nothing", ""]:
        with pytest.raises(OutputError, match="--out"):
            check_outputs({"--out": path, "--other": None})
    with pytest.raises(OutputError, match="--out and --other"):
        check_outputs({"--out": tmp_path / "a", "--other": tmp_path / "." / "a"})
    check_outputs({"--out": tmp_path / "a", "--other": tmp_path / "new" / "b"})
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "new", "nowhere"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with publish(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "real").read_text() == "new"
    assert (tmp_path / "link").is_symlink()


def test_room_is_reserved(tmp_path: Path) -> None:
    reserve(tmp_path / "a", 5000)
    assert (tmp_path / "a").stat().st_size == 5000
    assert (tmp_path / "a").stat().st_blocks > 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match="large"):
            reserve(tmp_path / "b", 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
