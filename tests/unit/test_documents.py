"""Documents in datastores: where they begin, the file that says it, the text around an entry."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from stores import (
    Ranges,
    alter,
    assert_helps,
    lengthen,
    origin,
    truncate,
    write_compressed,
    write_cut,
    write_store,
)

from fairseq_knnlm.datastore import (
    Datastore,
    DatastoreWriter,
    Documents,
    around,
    boundaries,
    first_line,
    outline,
    read_documents,
    write_documents,
)
from fairseq_knnlm.datastore.boundaries import (
    after_empty_lines,
    at_matching_lines,
    check_expression,
)
from fairseq_knnlm.datastore.manifest import write_manifest
from fairseq_knnlm.errors import ConfigError, DatastoreError
from fairseq_knnlm.runs.compress import compress
from fairseq_knnlm.runs.documents import find_documents
from fairseq_knnlm.runs.save import Saving
from fairseq_knnlm.runs.spelling import line_spelling

EOS = 2
WORDS = ["<s>", "<pad>", "</s>", "<unk>", "=", "a", "b", "c"]


def tokens(text: str) -> np.ndarray:
    """The ids of a text in which ``/`` ends a line; ``"a /  / b /"`` has an empty one."""
    ids = {**{word: number for number, word in enumerate(WORDS)}, "/": EOS}
    return np.array([ids[word] for word in text.split()], np.uint16)


def spelled(ids: list[int]) -> str:
    return " ".join(WORDS[each] for each in ids)


@pytest.fixture(params=[1, 2, 3, 5, 1000])
def at_a_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Values that are looked at at a time: boundaries and lines span them."""
    monkeypatch.setattr(boundaries, "VALUES_AT_A_TIME", request.param)
    return int(request.param)


@pytest.mark.usefixtures("at_a_time")
@pytest.mark.parametrize(
    ("text", "starts"),
    [
        ("a / b /", [0]),
        ("a", [0]),
        ("/", [0]),
        ("/ / /", [0]),
        ("a / / b /", [0, 3]),
        ("a / / b / / c /", [0, 3, 6]),
        ("a / / / / b /", [0, 5]),  # several empty lines are as one
        ("a / b / / /", [0]),  # at the end there is nothing after them
        ("/ a / b /", [0]),  # at the beginning they are of the first
        ("/ / / a / / b", [0, 6]),
        ("a b c / / c b", [0, 5]),
        ("a a a / b / / b", [0, 7]),
    ],
)
def test_documents_begin_after_empty_lines(text: str, starts: list[int]) -> None:
    found = after_empty_lines(tokens(text), EOS)
    assert found.starts.tolist() == starts
    assert found.starts.dtype == np.int64
    assert found.boundary is None


@pytest.mark.usefixtures("at_a_time")
@pytest.mark.parametrize(
    ("expression", "text", "starts"),
    [
        ("= [^=]", "= a = / b / = c = / b /", [0, 6]),
        ("= [^=]", "/ = a = / / = = b = = / / c / / = c = / b", [0, 16]),  # as in WikiText
        ("= [^=]", "a b / = c = / b", [0, 3]),  # what stands before the first is one too
        ("= [^=]", "a / b = c / b", [0]),  # at the beginning of a line
        ("a", "b / b /", [0]),  # none
        ("a", "a / a / a", [0, 2, 4]),
        ("a b$", "a b c / a b / a b", [0, 4, 7]),
        ("$", "a / / b / / / c", [0, 2, 5, 6]),  # empty lines are lines
    ],
)
def test_documents_begin_at_lines_that_match(expression: str, text: str, starts: list[int]) -> None:
    found = at_matching_lines(tokens(text), EOS, re.compile(expression), spelled)
    assert found.starts.tolist() == starts
    assert found.boundary == expression


@pytest.mark.usefixtures("at_a_time")
@pytest.mark.parametrize("seed", range(20))
def test_both_ways_agree_with_a_text_read_line_by_line(seed: int) -> None:
    """Random texts, and Python's own splitting of lines."""
    rng = np.random.default_rng(seed)
    values = rng.choice([EOS, EOS, 5, 6], size=40).astype(np.uint16)
    lines = " ".join(WORDS[each] for each in values).split("</s>")
    empty, matching, row = [0], [0], 0
    seen = before = False
    for line in lines:
        words = line.split()
        if words and seen and not before:
            empty.append(row)
        if seen and line.strip().startswith("b"):
            matching.append(row)
        seen, before = seen or bool(words), bool(words)
        row += len(words) + 1
    assert after_empty_lines(values, EOS).starts.tolist() == empty
    found = at_matching_lines(values, EOS, re.compile("b"), spelled)
    assert found.starts.tolist() == matching


def test_a_long_line_is_matched_by_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundaries, "LINE", 3)
    values, seen = tokens("a b c a b c / a b"), []

    def spell(ids: list[int]) -> str:
        seen.append(spelled(ids))
        return seen[-1]

    assert at_matching_lines(values, EOS, re.compile("a b$"), spell).starts.tolist() == [0, 7]
    assert seen == ["a b c", "a b"]


@pytest.mark.parametrize(
    "expression", ["(", "*", "[a", "", "a" * 1001, "\udcff", "(?P<n>a)(?P<n>b)"]
)
def test_an_expression_that_is_none_is_refused(expression: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_expression("--document-boundary", expression)
    message = str(caught.value)
    assert "--document-boundary is no regular expression" in message
    assert "expected: " in message
    message.encode()


def test_entries_are_of_documents() -> None:
    documents = Documents(np.array([0, 3, 7]), rows=9, eos=EOS)
    rows = np.array([[8, 0, 2], [3, 6, -1]])
    assert documents.document_of(rows).tolist() == [[2, 0, 0], [1, 1, -1]]
    assert [documents.extent(number) for number in range(3)] == [(0, 3), (3, 7), (7, 9)]
    with pytest.raises(IndexError, match="row 9 of 9"):
        documents.document_of(np.array([9]))


# The file


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    values = tokens("/ a b c / c / / b a / / / c a /")
    keys = np.random.default_rng(1).normal(size=(len(values), 4)).astype(np.float32)
    return write_store(tmp_path / "store", keys, values, vocabulary=len(WORDS))


@pytest.fixture
def written(store: Datastore) -> Datastore:
    write_documents(store, after_empty_lines(store.values, EOS))
    return store


@pytest.mark.parametrize("boundary", [None, "= [^=]", "ä\\n\"'"])
def test_round_trip(store: Datastore, boundary: str | None) -> None:
    assert read_documents(store) is None
    path = write_documents(store, Documents(np.array([0, 2, 9]), len(store), EOS, boundary))
    assert path == store.path / "documents.npz"
    found = read_documents(outline(store.path))
    assert found is not None
    assert found.starts.tolist() == [0, 2, 9]
    assert (found.rows, found.eos, found.boundary) == (len(store), EOS, boundary)


def test_no_fingerprint_changes(store: Datastore) -> None:
    before = store.fingerprint
    write_documents(store, after_empty_lines(store.values, EOS))
    assert outline(store.path).fingerprint == before


def test_numpy_opens_it_without_pickle(written: Datastore) -> None:
    with np.load(written.documents_path, allow_pickle=False) as archive:
        assert archive["starts"].tolist() == [0, 8, 13]
        assert json.loads(str(archive["card"][0]))["datastore"] == written.fingerprint


def test_those_of_another_datastore_are_refused(written: Datastore, tmp_path: Path) -> None:
    keys = np.zeros((len(written), 4), np.float32)
    other = write_store(tmp_path / "other", keys, written.values, vocabulary=len(WORDS))
    other.documents_path.write_bytes(written.documents_path.read_bytes())
    with pytest.raises(DatastoreError, match=r"documents\.npz is of another datastore") as caught:
        read_documents(other)
    assert_helps(caught, "verify")


def flip_start(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[content.index(np.int64(8).tobytes())] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("spoil", [truncate, alter, lengthen, flip_start])
def test_damage_is_told(written: Datastore, spoil: Callable[[Path], None]) -> None:
    spoil(written.documents_path)
    with pytest.raises(DatastoreError, match=r"documents\.npz is damaged") as caught:
        read_documents(written)
    assert_helps(caught, "verify")


@pytest.mark.parametrize(
    ("starts", "fields", "words"),
    [
        ([], {}, "from 0"),
        ([1, 2], {}, "from 0"),
        ([0, 16], {}, "below 16"),
        ([0, 5, 5], {}, "ascend"),
        ([0, 5, 4], {}, "ascend"),
        ([0], {"rows": 0}, "rows"),
        ([0], {"rows": 15}, "15 rows"),
        ([0], {"eos": -1}, "eos"),
        ([0], {"boundary": 3}, "boundary"),
        ([0], {"boundary": ""}, "boundary"),
        ([0], {"datastore": "x"}, "datastore"),
        ([0], {"colour": 1}, "colour"),
        ([0], {"version": 3}, "version 3"),
        ([0], {"version": True}, "version True"),
        ([0], {"version": 2}, "from 0"),
        ([0], {"format": "fairseq-knnlm n-grams"}, "another kind"),
    ],
)
def test_what_nobody_writes_is_refused(
    written: Datastore, starts: list[int], fields: dict[str, object], words: str
) -> None:
    with np.load(written.documents_path, allow_pickle=False) as archive:
        card = {**json.loads(str(archive["card"][0])), **fields}
    arrays = {"card": np.array([json.dumps(card)]), "starts": np.array(starts, np.int64)}
    np.savez(written.documents_path, allow_pickle=False, **arrays)
    with pytest.raises(DatastoreError, match=r"documents\.npz is damaged") as caught:
        read_documents(written)
    assert words in str(caught.value)


@pytest.mark.parametrize("starts", [np.array([0], np.int32), np.array([[0]]), np.array(["0"])])
def test_other_arrays_are_refused(written: Datastore, starts: np.ndarray) -> None:
    with np.load(written.documents_path, allow_pickle=False) as archive:
        card = archive["card"]
    np.savez(written.documents_path, allow_pickle=False, card=card, starts=starts)
    with pytest.raises(DatastoreError, match=r"starts: .* in the place of \(N,\) int64"):
        read_documents(written)


def test_a_folder_in_its_place_is_told(store: Datastore) -> None:
    store.documents_path.mkdir()
    with pytest.raises(DatastoreError, match=r"documents\.npz is damaged"):
        read_documents(store)


# Blocks


def words_in_blocks(path: Path, cuts: list[int], forgotten: Sequence[Ranges]) -> Datastore:
    """``/ a b c / c / / b a / / / c a /``, cut at these rows."""
    values = tokens("/ a b c / c / / b a / / / c a /")
    return write_cut(path, cuts, forgotten, values=values)


CUT = [[0, 16], [0, 8, 16], [0, 7, 9, 13, 16], [0, 1, 2, 3, 16]]


@pytest.mark.parametrize("cuts", CUT)
def test_documents_of_blocks_are_those_of_the_text(tmp_path: Path, cuts: list[int]) -> None:
    """However it is cut; a block may begin with a document, have it in the middle, or none."""
    store = words_in_blocks(tmp_path / "store", cuts, [()] * 9)
    found = find_documents(store.values, EOS, None, ())
    assert read_documents(store) is None
    write_documents(store, found)
    again = read_documents(outline(store.path))
    assert again is not None
    assert again.starts.tolist() == [0, 8, 13]
    assert (again.rows, again.eos, again.boundary) == (16, EOS, None)
    for block in store.blocks:
        alone = read_documents(outline(block.path))  # a datastore of its own
        assert alone is not None
        starts = {0, *(start - block.first for start in (0, 8, 13))}
        assert set(alone.starts.tolist()) == {n for n in starts if 0 <= n < block.rows}
    (store.blocks[-1].path / "documents.npz").unlink()
    assert read_documents(store) is None


@pytest.mark.parametrize(
    ("cut", "forgotten", "starts"),
    [
        (8, (((0, 2),), ()), [0, 6, 11]),
        (8, (((0, 7),), ()), [0, 1, 6]),  # all of the first document, but for an empty line
        (9, (((0, 8),), ()), [0, 5]),  # that too
        (8, ((), ((0, 4),)), [0, 8, 9]),
        (8, ((), ((0, 5),)), [0, 8]),  # all of the second
        (8, ((), ((0, 4), (5, 6))), [0, 8, 9]),  # the third without its first word
        (8, ((), ((5, 8),)), [0, 8]),  # all of the third
        (8, (((7, 8),), ((0, 1),)), [0, 7, 11]),  # over the edge of two documents
    ],
)
def test_documents_of_what_is_left(
    tmp_path: Path, cut: int, forgotten: Sequence[Ranges], starts: list[int]
) -> None:
    """Those of which nothing is left are gone; the others keep what they have."""
    whole = words_in_blocks(tmp_path / "store", [0, cut, 16], [()] * 2)
    write_documents(whole, after_empty_lines(whole.values, EOS))
    shutil.copytree(whole.path, tmp_path / "fewer")
    stretches = [
        replace(block.stretch, forgotten=gone)
        for block, gone in zip(whole.blocks, forgotten, strict=True)
    ]
    rows = sum(stop - start for one in stretches for start, stop in one.kept)
    write_manifest(
        tmp_path / "fewer" / "manifest.json", replace(whole.manifest, rows=rows, blocks=stretches)
    )
    fewer = outline(tmp_path / "fewer")
    found = read_documents(fewer)
    assert found is not None
    assert (found.starts.tolist(), found.rows) == (starts, len(fewer))
    write_documents(fewer, found)  # which loses nothing
    again = read_documents(fewer)
    assert again is not None
    assert again.starts.tolist() == starts


@pytest.mark.parametrize("boundary", [None, "b"])
def test_documents_of_several_texts(boundary: str | None) -> None:
    """As of each by itself."""
    values, breaks = tokens("/ a b c / c / / b a / / / c a /"), [0, 2, 8, 9, 12]
    found = find_documents(values, EOS, boundary, WORDS, breaks)
    expected = [
        first + start
        for first, text in zip(breaks, np.split(values, breaks[1:]), strict=True)
        for start in find_documents(text, EOS, boundary, WORDS).starts.tolist()
    ]
    assert found.starts.tolist() == expected
    assert set(breaks) <= set(expected)


def test_damage_names_the_block(tmp_path: Path) -> None:
    store = words_in_blocks(tmp_path / "store", [0, 8, 16], [()] * 2)
    write_documents(store, after_empty_lines(store.values, EOS))
    alter(store.blocks[1].path / "documents.npz")
    with pytest.raises(DatastoreError) as caught:
        read_documents(store)
    assert_helps(caught, "000001", f"--dstore {store.path} --documents")


# Text


def test_the_first_line_names_a_document(written: Datastore) -> None:
    documents = read_documents(written)
    assert documents is not None
    names = [spelled(first_line(written, documents, each).tolist()) for each in range(3)]
    assert names == ["a b c", "b a", "c a"]
    assert spelled(first_line(written, documents, 0, most=2).tolist()) == "a b"


def test_a_first_line_ends_with_its_document(store: Datastore) -> None:
    """Also where no line does, and where there is none."""
    documents = Documents(np.array([0, 1, 3, 6]), len(store), EOS)
    names = [spelled(first_line(store, documents, each).tolist()) for each in range(4)]
    assert names == ["", "a b", "c", "b a"]


def test_the_text_around_an_entry(store: Datastore) -> None:
    """``/ a b c / c / / b a / / / c a /``."""

    def text(row: int, before: int, after: int) -> tuple[str, ...]:
        found = around(store, row, before, after)
        assert found is not None
        return tuple(spelled(part.tolist()).replace("</s>", "/") for part in found)

    assert text(3, 2, 2) == ("a b", "/ c")
    assert text(0, 3, 2) == ("", "a b")
    assert text(15, 2, 5) == ("c a", "")
    assert text(1, 9, 0) == ("/", "")
    for row in (-1, 16):
        with pytest.raises(IndexError, match="of 16"):
            around(store, row, 1, 1)


def test_merged_entries_have_no_text(tmp_path: Path) -> None:
    merged = write_compressed(tmp_path / "merged")
    assert around(merged, 5, 2, 2) is None
    with pytest.raises(DatastoreError, match="has no text") as caught:
        write_documents(merged, Documents(np.array([0]), len(merged), EOS))
    assert_helps(caught, "merged")


# Text of lines, and what a run does with it


@pytest.mark.parametrize(
    ("symbols", "text"),
    [
        (["=", "big", "-", "cat"], "= big - cat"),
        (["\u2581=", "\u2581bi", "g", "\u2581cat"], "= big cat"),
        (["\u2581", "=", "\u2581b", "ig"], "= big"),
        (["=", "b@@", "ig", "c@@"], "= big c"),
        (["\u2581=", *[f"w{number}" for number in range(99)]], "\u2581= w0 w1 w2"),  # a word
    ],
)
def test_a_line_is_spelled_as_its_dictionary_says(symbols: list[str], text: str) -> None:
    """Pieces of sentencepiece and of subword-nmt are joined again."""
    assert line_spelling([*WORDS[:4], *symbols])([4, 5, 6, 7]) == text


def test_compressing_refuses_damaged_documents(written: Datastore, tmp_path: Path) -> None:
    alter(written.documents_path)
    with pytest.raises(DatastoreError, match=r"documents\.npz is damaged"):
        compress(written, tmp_path / "out", pca=2)
    assert not (tmp_path / "out").exists()


def test_a_datastore_whose_documents_cannot_be_kept_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    values = tokens("a / / b /")
    writer = DatastoreWriter(tmp_path / "store", len(values), 4, origin(len(WORDS)))
    writer.write(np.arange(len(values)), np.ones((len(values), 4), np.float32), values)
    saving = Saving(writer, lambda values: after_empty_lines(values, EOS))
    monkeypatch.setattr("fairseq_knnlm.runs.documents.write_documents", full)
    assert saving.publish() == f"saved 5 entries in {tmp_path / 'store'}"
    assert "cannot be kept (No space left on device)" in caplog.text
    assert "verify --documents" in caplog.text
    assert read_documents(outline(tmp_path / "store")) is None
