"""``fairseq-knnlm explain``: what it shows of a file, and what it refuses at once."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from cli_calls import Capture, refuse, said_and_wrong, say, small_store
from explained import RUN, text, token

from fairseq_knnlm.cli.explained import MOST_TEXTS, Summary, colour, gain, visible
from fairseq_knnlm.explanation.record import Explained
from fairseq_knnlm.explanation.record_file import Record, read_record, write_record

HOSTILE = "\x1b[31m\a\u202eno\tmark\r"


@pytest.fixture
def record(tmp_path: Path) -> Path:
    path = tmp_path / "out.jsonl"
    write_record(path, Record(RUN, [text("a"), text("b", given=1)]))
    return path


@pytest.fixture
def reads(tmp_path: Path) -> list[object]:
    """Data, checkpoint and datastore, of which nothing is read."""
    data, model = tmp_path / "data-bin", tmp_path / "model.pt"
    data.mkdir()
    for file in (data / "dict.txt", data / "test.idx", data / "test.bin", model):
        file.write_text("text")
    return ["--dstore", small_store(tmp_path).path, data, "--path", model]


def test_the_figures_are_of_what_was_written() -> None:
    """By hand: of the second text the first token was given. 0.5, 0.1, 0.25 and 0.1, 0.25 alone."""
    summary = Summary.of([text("a"), text("b", given=1)])
    assert (summary.texts, summary.tokens) == (2, 5)
    assert [round(bits, 6) for bits, _, _ in summary.helped] == [2, 2]
    assert [number for _, number, _ in summary.helped] == [2, 5]
    assert [round(bits, 6) for bits, _, _ in summary.hurt] == [-1, -1]


def test_a_file_is_shown(record: Path, capsys: Capture) -> None:
    said = say(capsys, "explain", "--sources", record)
    loss = (1 + 2 * 3.321928 + 2 * 2) / 5
    mixed = (1 + 2 * 1.321928 + 2 * 3) / 5
    assert f"| language model alone |      5 |        {loss:.3f} |" in said
    assert f"| with memory          |      5 |        {mixed:.3f} |" in said
    assert "mixture: knn: lambda 0.5\nknn: store, 400 entries, Flat\na:\n" in said
    assert "|     2 |  cat |  0.1 |     0.4 | +2.00 |" in said
    assert "saw the [cat] sit" in said
    assert "\nb:\n" in said


def test_a_token_is_shown(record: Path, capsys: Capture) -> None:
    """Its number counts on through the texts."""
    said = say(capsys, "explain", "--sources", record, "--token", 5)
    assert said.startswith("token 5: cat (cat), probability 0.1 alone, 0.4 with memory\n")
    assert "| knn    |  0.500 |         0.7 | +2.00 |" in said
    assert "store: the neighbours give their likeliest token 50% of their probability" in said
    for word in ("75.0%", "1.5", "The cats", "saw the [cat]"):
        assert word in said
    assert "there" in refuse(capsys, "explain", "--sources", record, "--token", 7)


def test_a_file_is_written_again(record: Path, tmp_path: Path, capsys: Capture) -> None:
    """As a page and as JSON."""
    page, copy = tmp_path / "page.html", tmp_path / "copy.jsonl"
    say(capsys, "explain", "--sources", record, "--html", page, "--json", copy)
    assert copy.read_bytes() == record.read_bytes()
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_more_texts_than_are_shown(record: Path, capsys: Capture) -> None:
    write_record(record, Record(RUN, [text("a")] * (MOST_TEXTS + 3)))
    assert "\n3 more texts are not shown here\n" in say(capsys, "explain", "--sources", record)


def test_no_chance_is_told(record: Path, capsys: Capture) -> None:
    """A token that the mixture gives no probability."""
    none = msgspec.structs.replace(token("no", 0.5, 0.25), mixture=None, lm=None)
    write_record(record, Record(RUN, [Explained("a", 1, [none])]))
    said = say(capsys, "explain", "--sources", record)
    assert "inf |        inf |" in said
    assert "no   |  0 |       0 |" in said


def test_text_does_nothing_to_a_terminal(record: Path, capsys: Capture) -> None:
    """Text of a datastore is anybody's."""
    source = msgspec.structs.replace(
        text("a").tokens[1].sources[0],
        **dict.fromkeys(("value", "before", "after", "document"), HOSTILE),
    )
    hostile = msgspec.structs.replace(token(HOSTILE, 0.1, 0.4, source), symbol=HOSTILE)
    run = msgspec.structs.replace(RUN, mixture=HOSTILE)
    write_record(record, Record(run, [Explained(HOSTILE, 1, [hostile])]))
    for flags in ([], ["--token", 1]):
        said = say(capsys, "explain", "--sources", record, *flags)
        assert not set(said) & set("\x1b\a\u202e\t\r")
        assert "no" in said


def test_text_in_one_line() -> None:
    assert visible("a\n\tb\u3000é…") == "a⏎ b é…"


def test_colours_by_bits() -> None:
    assert [colour(bits) for bits in (0, 0.2, -0.2)] == [""] * 3
    assert len({colour(bits) for bits in (0.3, 1, 2, 4, -0.3, -1, -2, -4)}) == 8
    assert gain(text("a").tokens[1]) == pytest.approx(2)


def test_one_thing_is_explained(record: Path, reads: list[object], capsys: Capture) -> None:
    for flags in ([], ["--text", "a", "--rows", "0:1"], ["--text", "a", "--sources", record]):
        said = refuse(capsys, "explain", *reads, *flags)
        assert "explain explains one thing" in said
        assert (" and ".join(map(str, flags[::2])) or "none of them") in said


@pytest.mark.parametrize(
    "rows", ["5", "5:", ":5", "5:5", "6:5", "-1:5", "a:b", "0:200000", "1:2:3"]
)
def test_rows_that_name_none(reads: list[object], capsys: Capture, rows: str) -> None:
    said = refuse(capsys, "explain", *reads, f"--rows={rows}")
    assert "--rows names tokens of a split" in said
    assert repr(rows) in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--text", " \n"], "--text is empty"),
        (["--text", "a", "--gen-subset", "test"], "--gen-subset does nothing with --text"),
        (["--rows", "0:9", "--token", 10], "--token"),
        (["--text", "a", "--token", 0], "--token"),
        (["--text", "a", "--sources-per-token", -1], "--sources-per-token"),
        (["--rows", "0:9", "--gen-subset", "none"], "the data has no split none"),
        (["--text", "a", "--html", "/dev/null"], "--html cannot be written"),
        (["--text", "a", "--json", "."], "--json cannot be written"),
        (["--text", "a", "--json", "same", "--html", "same"], "name the same file"),
    ],
)
def test_what_is_refused_at_once(
    reads: list[object], capsys: Capture, flags: list[object], words: str
) -> None:
    assert words in refuse(capsys, "explain", *reads, *flags)


@pytest.mark.parametrize(("missing", "words"), [(2, "DATA"), (0, "--dstore"), (3, "--path")])
def test_what_is_needed(reads: list[object], capsys: Capture, missing: int, words: str) -> None:
    given = reads[:missing] + reads[missing + (1 if missing == 2 else 2) :]
    said = refuse(capsys, "explain", *given, "--text", "a")
    assert f"explain needs {words}" in said


def test_a_page_is_not_written_over_what_is_read(
    record: Path, reads: list[object], capsys: Capture
) -> None:
    before = record.read_bytes()
    said = refuse(capsys, "explain", "--sources", record, "--json", record)
    assert "--json would write over what is read" in said
    store = reads[1]
    assert isinstance(store, Path)
    said = refuse(capsys, "explain", *reads, "--text", "a", "--json", store / "manifest.json")
    assert "a part of the datastore" in said
    assert record.read_bytes() == before


def test_what_does_nothing_with_a_file(record: Path, reads: list[object], capsys: Capture) -> None:
    for flags in (reads[:2], reads[2:3], reads[3:], ["--sources-per-token", 3]):
        said = refuse(capsys, "explain", "--sources", record, *flags)
        assert "does nothing with --sources" in said


def test_a_damaged_file_is_told_before_anything_is_shown(record: Path, capsys: Capture) -> None:
    record.write_bytes(record.read_bytes()[:-9])
    said = refuse(capsys, "explain", "--sources", record)
    assert "line 3: cut off" in said
    assert "cut off" in refuse(capsys, "explain", "--sources", record, "--token", 1)


def test_a_page_without_texts(record: Path, tmp_path: Path, capsys: Capture) -> None:
    write_record(record, Record(read_record(record).run, []))
    _, wrong = said_and_wrong(
        capsys, 1, "explain", "--sources", record, "--html", tmp_path / "page.html"
    )
    assert "there is no text that a page can show" in wrong
