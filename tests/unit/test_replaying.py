"""What counts as the same, which sections are drawn, and which batches hold them: by hand."""

from __future__ import annotations

import hashlib
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_calls import Capture, indexed_store
from stores import write_store

from fairseq_knnlm.calibration.sections import Sections
from fairseq_knnlm.cli.replay import Once
from fairseq_knnlm.runs.receipt import SourceFile, SourceIndex, SourceStore, anywhere, source_file
from fairseq_knnlm.runs.receipt_places import Folder
from fairseq_knnlm.runs.replay import Comparison, runs_of, sampled
from fairseq_knnlm.tasks.sections import BatchesWith

BIT = math.log(2)


def sections(tokens: int, base: float, mixed: float) -> Sections:
    """One, of so many bits a token."""
    sums = (np.array([-tokens * bits * BIT]) for bits in (base, mixed))
    return Sections(np.array([tokens]), *sums)


def compared(tokens: int, base: float, mixed: float) -> Comparison:
    """With a section of 5 bits and 4 bits a token."""
    found = Comparison(1e-4)
    found.add(0, [0, tokens], sections(tokens, 5, 4), sections(tokens, base, mixed))
    return found


def test_what_is_the_same() -> None:
    found = compared(4000, 5, 4)
    assert (found.same, found.wrong) == (1, ())
    assert found.summary(64, []) == (
        "1 of 64 sections scored again, 4,000 tokens: the same to the last digit"
    )


@pytest.mark.parametrize(("tokens", "apart"), [(4000, 9e-5), (1000, 9e-5), (100, 9e-4), (1, 0.09)])
def test_what_is_the_same_but_for_rounding(tokens: int, apart: float) -> None:
    """A ten-thousandth of a bit a token; of few tokens a tenth of a bit in all."""
    found = compared(tokens, 5, 4 + apart)
    assert (found.same, found.wrong) == (0, ())
    assert found.farthest == pytest.approx(apart)
    said = found.summary(64, ["torch 1 then, 2 now"])
    assert "but for rounding" in said and said.endswith("(torch 1 then, 2 now)")


def test_last_digits_differ_for_a_reason_only() -> None:
    found = compared(4000, 5, 4.00001)
    assert found.faults(["torch 1 then, 2 now"]) == []
    (fault,) = found.faults([])
    assert fault.startswith("1 of 1 sections by up to 1.0e-05 bits a token, where")
    assert compared(4000, 5, 4).faults([]) == []
    assert len(compared(4000, 5, 6).faults(["torch 1 then, 2 now"])) == 2


@pytest.mark.parametrize(
    ("tokens", "base", "mixed", "says"),
    [
        (4000, 5, 4.0002, "mixture 4.000200 bits, not 4.000000"),
        (4000, 4.999, 4, "base LM 4.999000 bits, not 5.000000"),
        (100, 5, 4.002, "mixture"),
        (4000, 5, math.inf, "mixture inf bits, not 4"),
        (4000, 5, math.nan, "mixture nan bits"),
    ],
)
def test_what_is_not_the_same(tokens: int, base: float, mixed: float, says: str) -> None:
    (wrong,) = compared(tokens, base, mixed).wrong
    assert wrong.startswith(f"section 0 (rows 0 to {tokens:,}): ")
    assert says in wrong


def test_other_tokens_are_not_the_same() -> None:
    found = Comparison(1e-4)
    found.add(0, [0, 8], sections(8, 5, 4), sections(7, 5, 4))
    assert found.wrong == ("section 0 (rows 0 to 8): 7 tokens, in the place of 8",)


def test_what_is_impossible_stays_so() -> None:
    found = Comparison(1e-4)
    found.add(0, [0, 8], sections(8, 5, math.inf), sections(8, 5, math.inf))
    assert (found.same, found.wrong) == (1, ())


def test_sections_are_drawn() -> None:
    assert sampled(64, 1, 0) == list(range(64))
    assert len(sampled(64, 0.01, 0)) == 1
    assert len(sampled(64, 0.5, 0)) == 32
    assert sampled(64, 0.1, 1) == sorted(set(sampled(64, 0.1, 1)))
    assert sampled(64, 0.1, 1) != sampled(64, 0.1, 2)
    assert runs_of([0, 1, 2, 5, 7, 8]) == [range(3), range(5, 6), range(7, 9)]
    assert runs_of([]) == []


class Blocks:
    """A split of blocks of 8 tokens, in these batches."""

    def __init__(self, *batches: list[int]) -> None:
        self.batches = batches

    def size(self, _: int) -> int:
        return 8

    def batch_by_size(self, indices: Any) -> Any:
        return self.batches


def batches(blocks: range, looks_back: int | None, *of: list[int]) -> tuple[list[list[int]], int]:
    part = BatchesWith(Blocks(*of), blocks, looks_back)
    return list(part.batch_by_size(None)), part.before


IN_ORDER = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


@pytest.mark.parametrize(
    ("blocks", "looks_back", "expected", "before"),
    [
        (range(4, 6), 0, [[4, 5]], 0),
        (range(5, 7), 0, [[4, 5], [6, 7]], 0),
        (range(4, 6), 1, [[2, 3], [4, 5]], 1),
        (range(4, 6), 17, [[0, 1], [2, 3], [4, 5]], 2),
        (range(4, 6), None, [[0, 1], [2, 3], [4, 5]], 2),
        (range(2), 99, [[0, 1]], 0),
        (range(10), 5, IN_ORDER, 0),
    ],
)
def test_whole_batches_hold_a_section(
    blocks: range, looks_back: int | None, expected: list[list[int]], before: int
) -> None:
    assert batches(blocks, looks_back, *IN_ORDER) == (expected, before)


def test_of_batches_that_go_by_length_what_is_wanted_alone() -> None:
    scattered = [[9, 0, 4], [1, 8, 5], [7, 2, 6], [3, 10, 11], [12, 13, 14]]
    assert batches(range(4, 6), 0, *scattered) == ([[9, 0, 4], [1, 8, 5]], 0)  # not that many
    longer = [[number] for number in range(30)]
    assert batches(range(4, 6), 0, [4], *longer[6:], [5]) == ([[4], [5]], 0)


def test_a_file_is_known_as_sha256sum_has_it(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"some bytes")
    found = source_file("--path", path)
    assert found == SourceFile("--path", str(path), 10, hashlib.sha256(b"some bytes").hexdigest())
    assert source_file("--path", tmp_path / "y") is None


def test_things_are_looked_for_by_what_they_are(tmp_path: Path, capsys: Capture) -> None:
    store = indexed_store(tmp_path / "deep", capsys)
    write_store(tmp_path / "another", np.ones((5, 8), np.float32), np.arange(5))
    (tmp_path / "same length").write_bytes(b"other bytes")
    (tmp_path / "deep" / "x").write_bytes(b"these bytes")
    (tmp_path / "a link").symlink_to("nowhere")
    folder = Folder(tmp_path)
    digest = hashlib.sha256(b"these bytes").hexdigest()
    assert list(folder.file(SourceFile("", "", 11, digest))) == [tmp_path / "deep" / "x"]
    assert list(folder.file(SourceFile("", "", 11, "0" * 64))) == []
    from fairseq_knnlm.index.card import index_fingerprint

    index = index_fingerprint(store.index_path)
    assert list(folder.store(SourceStore("", store.fingerprint, index))) == [store.path]
    assert list(folder.store(SourceStore("", store.fingerprint, "0" * 64))) == []
    assert list(folder.index(SourceIndex("", index))) == [store.index_path]


def test_each_thing_is_said_once() -> None:
    once = Once()

    def record(text: str, value: int) -> logging.LogRecord:
        return logging.LogRecord("x", logging.WARNING, "", 0, text, (value,), None)

    said = [once.filter(record("k %d", k)) for k in (1, 2, 1, 1)]
    assert said == [True, True, False, False]


def test_places_and_processors_are_no_part_of_what_made_a_figure() -> None:
    one = {"data": "x", "files": [{"path": "a", "sha256": "b"}], "processor": "c", "k": [1]}
    assert anywhere(one) == {"files": [{"sha256": "b"}], "k": [1]}
