"""Checksums tell when a file was altered, and which part of it."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import pytest
from stores import alter

from fairseq_knnlm.files import (
    altered,
    checksums,
    integrity,
)


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


def test_a_file_may_be_removed_while_it_is_compared(chunked: Path) -> None:
    """As where a datastore is changed that is in use; what is mapped stays, too."""
    expected = checksums(chunked)
    left = len(expected) - integrity.CHUNKS_ON_OPEN
    checking = integrity.Checking(chunked, expected)
    chunked.unlink()
    checking.wait()
    assert checking.checked == left
