"""Raw text cut in parts, against the tokenizers given all of it at once; and what is counted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from tokenizers_at_hand import (
    ENGLISH,
    EXACT,
    byte_level,
    odd_texts,
    processor,
    sentencepiece_model,
    with_bytes,
)

from fairseq_knnlm.errors import ConfigError, KnnlmError
from fairseq_knnlm.runs import text_files
from fairseq_knnlm.runs.encoding import END, Cutting, cut_part, cut_parts, whole_items
from fairseq_knnlm.runs.text_files import (
    BLANK,
    documents_of,
    lines_of,
    named_splits,
    parts_of,
    read_part,
)
from fairseq_knnlm.runs.tokenizer import SENTENCEPIECE, TRANSFORMERS, Ids, Pieces, Tokenizer

HF = {"byte level": byte_level, "bytes": with_bytes}


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "PART", 400)
    monkeypatch.setattr(text_files, "AROUND", 64)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def items(tokenizer: Tokenizer, path: Path, separator: str | None = None) -> Iterator[list[int]]:
    cuts = (
        (part, cut_part(tokenizer, separator, part))
        for part in parts_of(path, tokenizer, separator)
    )
    for _, _, some in whole_items(cuts):
        yield from (item.tolist() for item in some)


def test_lines_are_those_that_python_reads(tmp_path: Path) -> None:
    for text in ("", "\n", "a", "a\n", "a\n\nb", "a\r\nb\rc\n\r\n", "a\u2028b\x0cc\n", "\n\n"):
        with write(tmp_path / "text", text).open(encoding="utf-8") as file:
            assert lines_of(text) == [line.removesuffix("\n") for line in file]


@pytest.mark.parametrize(
    ("separator", "text", "found"),
    [
        (None, "a\n\nb\n", ["a\n\nb\n"]),
        (BLANK, "a\nb\n\n\nc\n", ["a\nb", "c"]),
        (BLANK, "\n\na\r\n\r\nb", ["a", "b"]),
        (BLANK, "a\n \nb", ["a\n \nb"]),
        ("---", "a\n\nb\n---\nc\n---\n", ["a\n\nb", "c"]),
        ("---", "----\n--\n", ["----\n--"]),
        ("---", "---\n---\n", []),
    ],
)
def test_documents(separator: str | None, text: str, found: list[str]) -> None:
    assert documents_of(text, separator) == found


def test_which_split_a_text_is_of(tmp_path: Path) -> None:
    folder = tmp_path / "valid"
    folder.mkdir()
    b, a = (write(folder / name, name) for name in ("b.txt", "a.txt"))
    write(folder / ".hidden", "")
    train = write(tmp_path / "train.txt", "a")
    other = write(tmp_path / "wiki.test.tokens", "a")
    words = [str(train), str(folder), f"test={other}", f"train={a}"]
    assert named_splits(words) == {"train": [train, a], "valid": [a, b], "test": [other]}
    (tmp_path / "empty").mkdir()
    for word, says in {
        str(tmp_path / "gone.txt"): "no such file",
        str(tmp_path / "empty"): "a folder without files",
        f"train={tmp_path}": "a folder",
        "/dev/null": "a device or pipe",
        str(write(tmp_path / "dict.txt", "a")): "SPLIT=FILE",
        str(write(tmp_path / "a b.txt", "a")): "SPLIT=FILE",
    }.items():
        with pytest.raises(ConfigError, match=says):
            named_splits([word])


def test_what_is_no_utf_8_is_told_with_its_place(tmp_path: Path, small_parts: None) -> None:
    """In whichever part it lies."""
    good = "caf\u00e9\n" * 300
    path = write(tmp_path / "text", good.encode() + b"one caf\xe9 more\n" + good.encode())
    tokenizer: Any = type("ByLines", (), {"lines": True})
    with pytest.raises(ConfigError) as caught:
        for part in parts_of(path, tokenizer, None):
            read_part(part)
    assert f"(0xe9) at byte {len(good.encode()) + 7:,}, in line 301" in str(caught.value)


@pytest.mark.usefixtures("small_parts")
def test_lines_in_parts_are_the_lines(tmp_path: Path) -> None:
    model = processor(**EXACT)
    lines = [text.replace("\r", "") for text in odd_texts(200)]
    path = write(tmp_path / "text", "\n".join(lines))
    expected = [[*model.encode(line), END] for line in lines]
    assert list(items(Pieces(model), path)) == expected
    assert len(list(parts_of(path, Pieces(model), None))) > 20


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("kind", HF)
def test_a_document_in_parts_is_the_document(tmp_path: Path, kind: str) -> None:
    """The same ids as where the library is given all of it."""
    raw = HF[kind]()
    tokenizer = Ids(raw, {"</s>": 0})
    text = "".join(
        f"{line}\n" + "\n" * (number % 3) + "  indented\n" * (number % 2)
        for number, line in enumerate([*odd_texts(150, ("\n", "\r\n")), *ENGLISH])
    )
    path = write(tmp_path / "text", text)
    whole = raw.encode(text, add_special_tokens=False).ids
    assert list(items(tokenizer, path)) == [[*whole, END]]
    assert len(list(parts_of(path, tokenizer, None))) > 20


@pytest.mark.usefixtures("small_parts")
def test_where_no_cut_leaves_tokens_as_they_are_there_is_none(tmp_path: Path) -> None:
    """Of a tokenizer whose tokens reach over ends of lines."""
    library = pytest.importorskip("tokenizers")
    raw = library.Tokenizer(library.models.BPE())
    raw.decoder = library.decoders.Fuse()
    trainer = library.trainers.BpeTrainer(vocab_size=60, show_progress=False)
    text = "the cat\n" * 300
    raw.train_from_iterator([text], trainer)
    path = write(tmp_path / "text", text)
    assert [(part.start, part.stop) for part in parts_of(path, Ids(raw, {}), None)] == [(0, 2400)]
    assert list(items(Ids(raw, {}), path)) == [[*raw.encode(text).ids, END]]


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("separator", [BLANK, "<|endoftext|>"])
def test_documents_between_separators(tmp_path: Path, separator: str) -> None:
    raw = byte_level()
    between = "" if separator == BLANK else separator
    documents = [f"{line}\nand {number}" for number, line in enumerate(ENGLISH * 20)]
    path = write(tmp_path / "text", f"\n{between}\n".join(documents) + "\n")
    expected = [[*raw.encode(one).ids, END] for one in documents]
    tokenizer = Ids(raw, {"</s>": 0})
    assert list(items(tokenizer, path, separator)) == expected
    assert len(list(parts_of(path, tokenizer, separator))) > 5


def test_counts_by_hand(tmp_path: Path) -> None:
    text = "The caf\u00e9  was\n\n== ==\nhere .\n"
    tokenizer = Pieces(processor())
    (part,) = parts_of(write(tmp_path / "text", text), tokenizer, None)
    cut = cut_part(tokenizer, None, part)
    assert (cut.words, cut.bytes, cut.changed) == (7, len(text.encode()), 1)  # two spaces
    assert (len(cut.items), int((cut.ids == END).sum())) == (4, 4)
    cut = cut_part(tokenizer, "== ==", part)
    assert (cut.words, cut.bytes) == (5, len(text.encode()) - 5)
    documents = Ids(byte_level(), {"</s>": 0})
    cut = cut_part(documents, "== ==", part)
    assert (cut.words, cut.bytes) == (5, len("The caf\u00e9  was\n".encode()) + len(b"here ."))
    assert (len(cut.items), cut.changed) == (2, 0)


def cutting(folder: Path) -> Cutting:
    return Cutting(SENTENCEPIECE, write(folder / "model", sentencepiece_model()), {}, None)


@pytest.mark.slow
@pytest.mark.usefixtures("small_parts")
def test_several_processes_do_what_one_does(tmp_path: Path) -> None:
    how = cutting(tmp_path)
    path = write(tmp_path / "text", "\n".join(odd_texts(100)))
    parts = list(parts_of(path, how.opened(), None))
    told: list[Any] = []
    one, several = (list(cut_parts(how, parts, workers, told.append)) for workers in (1, 3))
    assert sum(told) == 2 * path.stat().st_size
    for (part, cut), (again, other) in zip(one, several, strict=True):
        assert part == again
        assert np.array_equal(cut.ids, other.ids) and np.array_equal(cut.items, other.items)
        assert (cut.words, cut.bytes, cut.changed) == (other.words, other.bytes, other.changed)


@pytest.mark.slow
@pytest.mark.usefixtures("small_parts")
def test_what_a_process_refuses_is_said_as_by_one(tmp_path: Path) -> None:
    how = cutting(tmp_path)
    path = write(tmp_path / "text", b"good\n" * 500 + b"caf\xe9\n")
    parts = list(parts_of(path, how.opened(), None))
    said = []
    for workers in (1, 2):
        with pytest.raises(KnnlmError, match="is not in UTF-8") as caught:
            list(cut_parts(how, parts, workers, lambda _: None))
        said.append(str(caught.value))
    assert said[0] == said[1]


@pytest.mark.slow
def test_processes_end_with_the_one_that_asks(tmp_path: Path) -> None:
    """Even where that is killed."""
    program = f"""
import os, sys, time
from pathlib import Path
from fairseq_knnlm.runs.encoding import Cutting, cut_parts
from fairseq_knnlm.runs.text_files import Part
if __name__ == "__main__":
    path = Path({str(write(tmp_path / "text", "the cat" + chr(10)))!r})
    how = Cutting({SENTENCEPIECE!r}, Path({str(cutting(tmp_path).path)!r}), {{}}, None)
    for _ in cut_parts(how, [Part(path, 0, 8)] * 1000, 2, lambda _: None):
        print("going on", flush=True)
        time.sleep(0.1)
"""
    script = write(tmp_path / "program.py", program)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    asking = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=env)
    assert asking.stdout is not None and asking.stdout.readline()
    children = Path(f"/proc/{asking.pid}/task/{asking.pid}/children")
    if not children.exists():
        pytest.skip("this system does not say whose children there are")
    others = [int(word) for word in children.read_text().split()]
    assert len(others) >= 2
    asking.send_signal(signal.SIGKILL)
    asking.wait()
    asking.stdout.close()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{one}/exe").exists() for one in others):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_two_kinds_are_opened_by_their_names(tmp_path: Path) -> None:
    raw = byte_level()
    raw.save(str(tmp_path / "tokenizer.json"))
    opened = Cutting(TRANSFORMERS, tmp_path / "tokenizer.json", {"</s>": 0}, None).opened()
    assert (opened.lines, opened.symbols[0]) == (False, "</s>")
    assert cutting(tmp_path).opened().lines
