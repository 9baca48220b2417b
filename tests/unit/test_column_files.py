"""Words and probabilities as others publish them, and what is refused."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fairseq_knnlm.errors import TableError
from fairseq_knnlm.runs.column_files import ColumnFile, read_column, read_words

WORDS = ["the", "cat", "</s>"]
PROBS = [0.5, 0.25, 1.0]
LOGS = np.log(PROBS)


def saved(path: Path, values: object, dtype: str = "float64") -> Path:
    np.save(path, np.array(values, dtype))
    return path


def read(path: Path, array: str = "", base: float = math.e) -> np.ndarray:
    return read_column(ColumnFile("gpt", path, array), WORDS, base)


def refused(path: Path, array: str = "") -> str:
    with pytest.raises(TableError) as caught:
        read(path, array)
    said = str(caught.value)
    assert str(path) in said
    assert "column gpt" in said
    return said


def write_text(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def archive(path: Path, **arrays: object) -> Path:
    np.savez_compressed(path, **{name: np.array(one) for name, one in arrays.items()})
    return path


MADE: dict[str, Callable[[Path], tuple[Path, str]]] = {
    "probabilities": lambda at: (saved(at / "x.npy", PROBS), ""),
    "logarithms": lambda at: (saved(at / "x.npy", LOGS), ""),
    "float32": lambda at: (saved(at / "x.npy", LOGS, "float32"), ""),
    "float16": lambda at: (saved(at / "x.npy", PROBS, "float16"), ""),
    "numbers": lambda at: (write_text(at / "x.txt", *map(str, PROBS)), ""),
    "words": lambda at: (
        write_text(at / "x.txt", *(f"{w} {p}" for w, p in zip(WORDS, LOGS, strict=True))),
        "",
    ),
    "named": lambda at: (archive(at / "x.npz", other=[0.1] * 3, a=PROBS), "a"),
    "the only one": lambda at: (archive(at / "x.npz", whatever=PROBS), ""),
    "of the column's name": lambda at: (archive(at / "x.npz", other=[0.1] * 3, gpt=LOGS), ""),
}


@pytest.mark.parametrize("kind", MADE)
def test_all_kinds_say_the_same(tmp_path: Path, kind: str) -> None:
    found = read(*MADE[kind](tmp_path))
    np.testing.assert_allclose(found, LOGS, rtol=1e-6)
    assert found.dtype == np.float32


def test_an_uncompressed_archive(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **{"AWD-LSTM": LOGS})
    np.testing.assert_allclose(read(tmp_path / "x.npz", "AWD-LSTM"), LOGS, rtol=1e-6)


@pytest.mark.parametrize("base", [2.0, 10.0])
def test_logarithms_of_another_base(tmp_path: Path, base: float) -> None:
    path = saved(tmp_path / "x.npy", LOGS / math.log(base))
    np.testing.assert_allclose(read(path, base=base), LOGS, rtol=1e-6)


def test_rounding_above_certainty_is_certainty(tmp_path: Path) -> None:
    assert read(saved(tmp_path / "x.npy", [-1, -2, 1e-6]))[2] == 0
    assert read(saved(tmp_path / "x.npy", [0.5, 0.5, 1.000001]))[2] == 0


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([0.5, np.nan, np.nan], "nan for word 2 ('cat'), no number (NaN); 2 such in 3"),
        ([0.5, 0.25, 1.5], "1.5 for word 3 ('</s>'), above 1 among probabilities; 1 such in 3"),
        ([0.5, 0.25, np.inf], "above 1 among probabilities"),
        ([-1.0, 0.25, -3.0], "0.25 for word 2 ('cat'), above 0 among logarithms"),
        ([0.0, 0.25, 0.5], "0 for word 1 ('the'), a probability of 0"),
        ([0.0, 0.0, 0.0], "0 for word 1 ('the'), a probability of 0; 3 such in 3"),
        ([-1.0, -np.inf, -3.0], "-inf for word 2 ('cat'), a probability of 0"),
        ([0.5, 0.25], "expected: 3 numbers, one for each word\n  found:    2"),
        ([0.5] * 4, "found:    4"),
        ([[0.5], [0.5], [0.5]], "(3, 1) numbers of type float64, in the place of (N,) float"),
    ],
)
def test_numbers_that_are_none_of_these_words(tmp_path: Path, values: object, says: str) -> None:
    assert says in refused(saved(tmp_path / "x.npy", values))


def test_whole_numbers_are_no_probabilities(tmp_path: Path) -> None:
    assert "numbers of type int64" in refused(saved(tmp_path / "x.npy", [1, 1, 1], "int64"))


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["the 0.5", "dog 0.25", "</s> 1"], "expected: 'cat', word 2 of the text"),
        (["0.5", "half", "1"], "line 2: 'half'"),
        (["0.5", "", "1"], "line 2: ''"),
        (["a cat 0.5", "0.5", "1"], "line 1: 'a cat 0.5'"),
        (["the 0.5", "cat 0.25"], "found:    2"),
        ([], "found:    0"),
    ],
)
def test_lines_that_are_none_of_these_words(tmp_path: Path, lines: list[str], says: str) -> None:
    assert says in refused(write_text(tmp_path / "x.txt", *lines))


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "absent.npy")
    assert "a folder" in refused(tmp_path)
    cut = saved(tmp_path / "cut.npy", PROBS)
    cut.write_bytes(cut.read_bytes()[:-3])
    assert "21 bytes for an array of (3,) float64, 24 bytes" in refused(cut)
    objects = tmp_path / "objects.npy"
    np.save(objects, np.array([{}, {}, {}], object), allow_pickle=True)
    assert "an array of object" in refused(objects)
    noise = tmp_path / "noise.txt"
    noise.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refused(noise)


def test_archives_that_do_not_have_it(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.npz", a=PROBS, b=PROBS)
    assert "no array c, but a, b" in refused(path, "c")
    assert "no array gpt, but a, b" in refused(path)
    content = bytearray(path.read_bytes())
    content[60] ^= 255
    path.write_bytes(content)
    assert "cannot be read" in refused(path, "a")
    path.write_bytes(path.read_bytes()[:40])
    assert "a damaged archive" in refused(path, "a")


def test_an_array_that_is_longer_than_it_says(tmp_path: Path) -> None:
    held = io.BytesIO()
    np.save(held, np.array(PROBS))
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as into:
        into.writestr("a.npy", held.getvalue() + b"more")
    assert "cannot be read" in refused(path, "a")


def test_words_of_a_text(tmp_path: Path) -> None:
    path = write_text(tmp_path / "words", "the cat", "", "sat")
    assert read_words(path) == ["the", "cat", "sat"]
    assert read_words(path, "</s>") == ["the", "cat", "</s>", "</s>", "sat", "</s>"]


def test_texts_without_words(tmp_path: Path) -> None:
    for path, says in (
        (write_text(tmp_path / "empty", "", ""), "holds no words"),
        (tmp_path / "absent", "no such file"),
        (tmp_path, "a folder"),
    ):
        with pytest.raises(TableError, match=says):
            read_words(path)
    (tmp_path / "noise").write_bytes(b"\xff\xfe")
    with pytest.raises(TableError, match="no UTF-8"):
        read_words(tmp_path / "noise")
