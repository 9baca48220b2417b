"""Documents of datastores, by the commands that people type: found when saving, or added later."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import BLOCKS, Lab, must, run
from tiny_world import PLUGIN

from fairseq_knnlm.datastore import first_line, open_datastore, outline, read_documents
from fairseq_knnlm.errors import ConfigError

#: Three documents; a heading begins with ``w1 w2``, and those of sections with ``w1 w1``.
TEXT = """\

w1 w2 w1
w5 w6 w7

w1 w1 w3 w1
w8 w9


w1 w2 w4
w3 w4 w5 w6 w7 w8 w9 w8 w7 w6 w5 w4 w3 w2 w1
w5 w1 w2 w5

w1 w2
"""
HEADING = "w1 w[^1]"


def beginnings(lines: list[str]) -> list[int]:
    """Rows of lines in ``TEXT``, each line and its end counted."""
    rows, row = {}, 0
    for line in TEXT.split("\n")[:-1]:
        rows[line] = row
        row += len(line.split()) + 1
    return [rows[line] for line in lines]


#: Rows at which documents begin, the first where the text does.
AFTER_EMPTY = [0, *beginnings(["w1 w1 w3 w1", "w1 w2 w4", "w1 w2"])]
AT_HEADINGS = [0, *beginnings(["w1 w2 w4", "w1 w2"])]


@dataclass(frozen=True)
class Written:
    """The text, binarised with the dictionary of the language model."""

    lab: Lab
    data: Path
    folder: Path

    def words(self, *flags: object) -> list[object]:
        """What follows the command that saves."""
        path = self.lab.checkpoint()
        return [self.data, "--path", path, *BLOCKS, "--sample-break-mode", "none", "--cpu", *flags]


@pytest.fixture(scope="module")
def written(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("documents")
    (folder / "text").write_text(TEXT)
    must(
        *("fairseq-preprocess", "--only-source", "--srcdict", lab.data / "dict.txt"),
        *("--trainpref", folder / "text", "--destdir", folder / "bin"),
    )
    return Written(lab, folder / "bin", folder)


@pytest.fixture(scope="module")
def saved(written: Written) -> Path:
    """Saved by ``fairseq-eval-lm``."""
    folder = written.folder / "saved"
    flags = ["--gen-subset", "train", "--save-knnlm-dstore", "--dstore-mmap", folder]
    must("fairseq-eval-lm", *written.words(*PLUGIN, *flags))
    return folder


@pytest.fixture
def store(saved: Path, tmp_path: Path) -> Path:
    """The same as it was before there were documents."""
    shutil.copytree(saved, tmp_path / "store")
    (tmp_path / "store/documents.npz").unlink()
    return tmp_path / "store"


def starts(store: Path) -> list[int]:
    documents = read_documents(outline(store))
    assert documents is not None
    return [int(start) for start in documents.starts]


def test_saving_finds_them_after_empty_lines(written: Written, saved: Path) -> None:
    assert starts(saved) == AFTER_EMPTY
    store, documents = open_datastore(saved), read_documents(outline(saved))
    assert documents is not None
    symbols = ["<s>", "<pad>", "</s>", "<unk>"]
    symbols += [line.split()[0] for line in (written.data / "dict.txt").open()]
    names = [
        " ".join(symbols[token] for token in first_line(store, documents, number))
        for number in range(4)
    ]
    assert names == ["w1 w2 w1", "w1 w1 w3 w1", "w1 w2 w4", "w1 w2"]


def test_the_command_saves_them_at_lines_that_match(written: Written, tmp_path: Path) -> None:
    path = tmp_path / "store"
    must("fairseq-knnlm", "save", *written.words("--dstore", path, "--document-boundary", HEADING))
    assert starts(path) == AT_HEADINGS
    said = must("fairseq-knnlm", "info", "--dstore", path)
    assert f"documents    3, each from a line that matches {HEADING!r} on" in said


def test_streaming_saves_them(lab: Lab, written: Written, tmp_path: Path) -> None:
    """Into an index that needs more keys than a short text has: the train split, 300 lines."""
    path = tmp_path / "store"
    flags = ["--save-knnlm-dstore", "--no-save-keys", "--dstore-mmap", path, "--recipe"]
    lab.evaluate("train", *flags, "IVF16,Flat", "--document-boundary", "w")
    lines = Path(lab.folder / "train.txt").read_text().splitlines()
    lengths = [len(line.split()) + 1 for line in lines]
    assert starts(path) == [0, *np.cumsum(lengths)[:-1]]


def test_an_expression_that_matches_nothing_is_named(
    written: Written, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = ["--save-knnlm-dstore", "--dstore-mmap", tmp_path / "store"]
    with caplog.at_level(logging.WARNING):
        written.lab.evaluate("valid", *flags, "--document-boundary", "= [^=]")
    assert "--document-boundary '= [^=]' matches no line" in caplog.text
    assert starts(tmp_path / "store") == [0]


def test_verify_adds_them_to_an_older_datastore(written: Written, store: Path) -> None:
    assert "documents    none; find them" in must("fairseq-knnlm", "info", "--dstore", store)
    before = {file.name: file.read_bytes() for file in store.iterdir()}
    said = must("fairseq-knnlm", "verify", "--dstore", store, "--documents")
    assert "documents.npz: documents of this datastore: 4, with empty lines between them" in said
    assert starts(store) == AFTER_EMPTY
    words = ["--documents", "--document-boundary", HEADING, "--data"]
    said = must("fairseq-knnlm", "verify", "--dstore", store, *words, written.data)
    assert f"3, each from a line that matches {HEADING!r} on" in said
    assert starts(store) == AT_HEADINGS
    left = {file.name: file.read_bytes() for file in store.iterdir()}
    assert {name: left[name] for name in before} == before
    assert set(left) == {*before, "documents.npz"}


def test_compressing_takes_them_along_where_rows_stay(store: Path, tmp_path: Path) -> None:
    must("fairseq-knnlm", "verify", "--dstore", store, "--documents")
    smaller, merged = tmp_path / "smaller", tmp_path / "merged"
    must("fairseq-knnlm", "compress", "--dstore", store, "--out", smaller, "--pca", 8)
    assert starts(smaller) == AFTER_EMPTY
    must("fairseq-knnlm", "build-index", "--dstore", store)
    must("fairseq-knnlm", "compress", "--dstore", store, "--out", merged, "--merge", 4)
    assert not (merged / "documents.npz").exists()
    assert "none, since entries were merged" in must("fairseq-knnlm", "info", "--dstore", merged)
    ran = run("fairseq-knnlm", "verify", "--dstore", merged, "--documents")
    assert ran.code == 1
    assert ran.out.count("error: ") == 1
    assert "has no text, and so no documents" in ran.out
    assert not (merged / "documents.npz").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [("a 1\n", "of another dictionary"), ("no count\n", "cannot be read")],
)
def test_another_dictionary_is_refused(store: Path, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "dict.txt").write_text(text)
    before = {file.name: file.read_bytes() for file in store.iterdir()}
    flags = ["--documents", "--document-boundary", HEADING, "--data", tmp_path]
    ran = run("fairseq-knnlm", "verify", "--dstore", store, *flags)
    assert ran.code == 1
    assert ran.out.count("error: ") == 1
    assert words in ran.out
    assert {file.name: file.read_bytes() for file in store.iterdir()} == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--save-knnlm-dstore", "--document-boundary", "[a"], "is no regular expression"),
        (["--save-knnlm-dstore", "--document-boundary="], "--document-boundary is empty"),
        (["--document-boundary", "a"], "--document-boundary needs --save-knnlm-dstore"),
    ],
)
def test_an_expression_is_refused_before_work_starts(
    lab: Lab, tmp_path: Path, flags: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        lab.evaluate("valid", *flags, "--dstore-mmap", tmp_path / "store")
    assert not list(tmp_path.iterdir())


def test_the_command_says_it_in_one_message(written: Written, tmp_path: Path) -> None:
    flags = ["--dstore", tmp_path / "store", "--document-boundary", "[a"]
    ran = run("fairseq-knnlm", "save", *written.words(*flags))
    assert ran.code == 1
    assert ran.out.count("error: ") == 1
    assert "--document-boundary is no regular expression" in ran.out
    assert "unterminated character set" in ran.out
    assert not list(tmp_path.iterdir())
