"""Records in files: as they were written, and refused where they are damaged or something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from explained import RUN, text
from stores import assert_helps

from fairseq_knnlm.errors import RecordError
from fairseq_knnlm.explanation.record_file import Record, read_record, write_record


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "out.jsonl"
    assert write_record(path, Record(RUN, (text(name) for name in "ab"))) == 2
    return path


def test_what_was_written_is_read(written: Path) -> None:
    record = read_record(written)
    assert record.run == RUN
    for _ in range(2):  # as often as one likes
        assert [found.name for found in record.texts] == ["a", "b"]
    assert list(record.texts) == [text("a"), text("b")]


def test_it_is_one_line_a_text(written: Path) -> None:
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert lines[0]["format"] == "fairseq-knnlm explanation"
    assert [line["name"] for line in lines[1:]] == ["a", "b"]


def test_a_text_that_fails_leaves_what_was_there(written: Path) -> None:
    before = written.read_bytes()

    def texts() -> Any:
        yield text("c")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_record(written, Record(RUN, texts()))
    assert written.read_bytes() == before
    assert [path.name for path in written.parent.glob("out*")] == ["out.jsonl"]


def refused(path: Path, *words: str) -> None:
    with pytest.raises(RecordError) as caught:
        list(read_record(path).texts)
    assert_helps(caught, str(path), *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "line 1"),
        ("no JSON\n", "line 1"),
        ("[]\n", "a file of another kind"),
        ('{"format": "fairseq-knnlm calibration"}\n', "a file of another kind"),
        ("[" * 100_000 + "\n", "line 1"),
        ("\udcff\n", "line 1"),
    ],
)
def test_a_file_of_another_kind(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "other"
    path.write_bytes(content.encode(errors="surrogateescape"))
    refused(path, words)


def test_no_file(tmp_path: Path) -> None:
    refused(tmp_path, "a folder")
    refused(tmp_path / "none", "no file")


def test_a_newer_version(written: Path) -> None:
    written.write_text(written.read_text().replace('"version":1', '"version":2'))
    refused(written, "version 2")


@pytest.mark.parametrize("cut", [3, 40, 200])
def test_a_file_that_is_cut_off(written: Path, cut: int) -> None:
    written.write_bytes(written.read_bytes()[:-cut])
    refused(written, "line 3: cut off")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["given"], 9, "more given tokens than tokens"),
        (["given"], -1, "given"),
        (["name"], 1, "name"),
        (["more"], 1, "more"),
        (["tokens", 0, "lm"], 0.5, "lm"),
        (["tokens", 0, "lm"], "x", "lm"),
        (["tokens", 0, "voices"], [], "without the language model's part"),
        (["tokens", 0, "voices", 0, "weight"], 2.0, "weight"),
        (["tokens", 0, "voices", 0, "bits"], None, "bits"),
        (["tokens", 1, "sources", 0, "memory"], 1, "memory 1 of 1"),
        (["tokens", 1, "sources", 0, "share"], -0.5, "share"),
        (["tokens", 1, "agreement"], [0.5, 0.5], "agreement of more memories"),
        (["tokens", 1, "place"], [0.5], "place"),
    ],
)
def test_what_is_out_of_bounds(
    written: Path, path: list[str | int], value: object, words: str
) -> None:
    lines = written.read_text().splitlines()
    line = json.loads(lines[2])
    *way, last = path
    part = line
    for step in way:
        part = part[step]
    part[last] = value
    lines[2] = json.dumps(line)
    written.write_text("\n".join(lines) + "\n")
    refused(written, "line 3", words)
