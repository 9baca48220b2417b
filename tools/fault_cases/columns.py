"""Probabilities that others published, and raw text, of another text or none at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fault_cases.stage import BadOutcome, Case, Stage
from fault_cases.typed import Command, Table, flag_cases
from fault_cases.world import knnlm

MUST = "refused with a message that names the column, the flag or the file; nothing is written"
#: Words of the text, and of another that is as long.
WORDS = [f"w{number % 17}" for number in range(400)]
OTHERS = [*WORDS[:250], "another", *WORDS[251:]]
#: ``columns words.txt --column good=good.npy``.
COLUMNS: Table = {
    "one number short": ("--column a=short.npy --out t.npz", "column a .*another length"),
    "one number more": ("--column a=long.npy --out t.npz", "column a .*another length"),
    "no numbers": ("--column a=none.npy --out t.npz", "column a .*another length"),
    "one line short": ("--column a=short.txt --out t.npz", "column a .*another length"),
    "other words": ("--column a=others.txt --out t.npz", "column a .*other words"),
    "above 1": ("--column a=above.npy --out t.npz", "column a .*no probability"),
    "of 0": ("--column a=zero.npy --out t.npz", "column a .*no probability"),
    "NaN": ("--column a=nan.npy --out t.npz", "column a .*no probability"),
    "infinite": ("--column a=inf.npy --out t.npz", "column a .*no probability"),
    "a logarithm above 0": ("--column a=logs-above.npy --out t.npz", "column a .*no probability"),
    "a logarithm of 0": ("--column a=logs-zero.npy --out t.npz", "column a .*no probability"),
    "NaN in a text": ("--column a=nan.txt --out t.npz", "column a .*no probability"),
    "whole numbers": ("--column a=integers.npy --out t.npz", "column a .*cannot be read"),
    "two columns in one": ("--column a=square.npy --out t.npz", "column a .*cannot be read"),
    "objects": ("--column a=objects.npy --out t.npz", "column a .*cannot be read"),
    "a word for a number": ("--column a=words.txt --out t.npz", "column a .*cannot be read"),
    "three words a line": ("--column a=three.txt --out t.npz", "column a .*cannot be read"),
    "no UTF-8": ("--column a=bytes.txt --out t.npz", "column a .*cannot be read"),
    "half an array": ("--column a=half.npy --out t.npz", "column a .*cannot be read"),
    "half an archive": ("--column a=half.npz:a --out t.npz", "column a .*cannot be read"),
    "no such array": ("--column a=both.npz:nobody --out t.npz", "column a .*cannot be read"),
    "one of two arrays": ("--column c=both.npz --out t.npz", "column c .*cannot be read"),
    "an empty file": ("--column a=empty --out t.npz", "column a "),
    "a folder": ("--column a=. --out t.npz", "column a "),
    "a device": ("--column a=/dev/zero --out t.npz", "column a "),
    "no such file": ("--column a=nowhere.npy --out t.npz", "nowhere.npy"),
    "no file": ("--column a= --out t.npz", "--column"),
    "no name": ("--column =good.npy --out t.npz", "--column"),
    "a file alone": ("--column good.npy --out t.npz", "--column"),
    "the same name": ("--column good=good.npy --out t.npz", "two columns"),
    "a name in capitals": ("--column A=good.npy --out t.npz", "--column"),
    "a name of a table's": ("--column lm=good.npy --out t.npz", "--column"),
    "a name of an expert's": ("--column knn=good.npy --out t.npz", "--column"),
    "written over what is read": ("--out good.npy", "good.npy"),
    "written over the words": ("--out words.txt", "words.txt"),
    "written below a file": ("--out good.npy/t.npz", "good.npy"),
    "written over a folder": ("--out .", "--out"),
    "not written": ("", "--out"),
    "logarithms of base 3": ("--log-base 3 --out t.npz", "--log-base"),
    "a training text that is gone": ("--training-text nowhere.txt --out t.npz", "nowhere.txt"),
    "a training text without words": ("--training-text empty --out t.npz", "empty"),
    "a training text that is none": ("--training-text good.npy --out t.npz", "good.npy"),
    "an end of lines too many": ("--line-end END --out t.npz", "another length"),
    "flag nobody knows": ("--colour red --out t.npz", "--colour"),
}
#: ``columns``, and a text.
TEXTS: Table = {
    "no such text": ("nowhere.txt --column a=good.npy --out t.npz", "nowhere.txt"),
    "a text without words": ("empty --column a=good.npy --out t.npz", "empty"),
    "a text that is none": ("good.npy --column a=good.npy --out t.npz", "good.npy"),
    "a folder for a text": (". --column a=good.npy --out t.npz", "error: "),
    "another text": ("others-short.txt --column a=good.npy --out t.npz", "another length"),
    "no column": ("words.txt --out t.npz", "--column"),
}
#: An evaluation of test, with its raw text.
RAW: Table = {
    "of another split": ("--raw-text VALID", "is not the text of test"),
    "of the training split": ("--raw-text TRAIN", "is not the text of test"),
    "one line short": ("--raw-text line-short.txt", "is not the text of test"),
    "one line more": ("--raw-text line-more.txt", "is not the text of test"),
    "other words in as many lines": ("--raw-text strangers.txt", "is not the text of test"),
    "empty": ("--raw-text empty", "empty"),
    "no UTF-8": ("--raw-text bytes.txt", "bytes.txt"),
    "a folder": ("--raw-text .", "raw.text"),
    "gone": ("--raw-text nowhere.txt", "nowhere.txt"),
    "no name": ("--raw-text=", "--raw-text"),
    "written over": ("--raw-text line-more.txt --results-json line-more.txt", "line-more.txt"),
}
#: ``report`` of the world's table of test.
REPORT: Table = {
    "raw text of another split": ("--data DATA --raw-text VALID", "is not the text of test"),
    "raw text that is gone": ("--data DATA --raw-text nowhere.txt", "nowhere.txt"),
    "raw text without data": ("--raw-text TEST", "--data"),
    "data that is not there": ("--data nowhere --raw-text TEST", "nowhere"),
    "results over the table": ("--results-json TABLE", "--results-json"),
    "results over the raw text": ("--data DATA --raw-text t.txt --results-json t.txt", "t.txt"),
    "a calibration besides": ("--calibration x.json", "--calibration"),
}


def cases() -> Iterator[Case]:
    """By command; then what is fitted on columns and used on others."""
    commands: tuple[Command, ...] = (
        ("columns", COLUMNS, lambda stage: _columns(stage, "words.txt", "--column=good=good.npy")),
        ("columns of a text", TEXTS, _columns),
        ("raw text", RAW, _with_raw_text),
        ("report", REPORT, _report),
    )
    yield from flag_cases("figures", MUST, commands, _known)
    for name, done, must, step in STEPS:
        yield Case("figures", name, done, must, step)


def _known(stage: Stage) -> dict[str, object]:
    texts = {split.upper(): stage.world.folder / f"{split}.txt" for split in _SPLITS}
    return {**texts, "DATA": stage.world.data, "TABLE": stage.world.tables / "test.npz"}


_SPLITS = ("train", "valid", "test")


def _columns(stage: Stage, *words: str) -> list[object]:
    _files(stage.folder)
    return knnlm("columns", *words)


def _with_raw_text(stage: Stage) -> list[object]:
    _files(stage.folder)
    lines = (stage.world.folder / "test.txt").read_text().splitlines()
    strangers = ["xyz" * 3 + " " + "q" * 9 for _ in lines]
    for name, some in (
        ("line-short", lines[:-1]),
        ("line-more", [*lines, lines[0]]),
        ("strangers", strangers),
    ):
        _write(stage.folder / f"{name}.txt", some)
    return stage.world.evaluate()


def _report(stage: Stage) -> list[object]:
    _write(stage.folder / "t.txt", ["a text"])
    table = stage.world.tables / "test.npz"
    return knnlm("report", "--dstore", stage.store(), "--score-table", table)


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))


def _files(folder: Path) -> None:
    """A text, a column of it that is right, and columns that are not, one fault in each."""
    good = np.random.default_rng(0).uniform(0.01, 0.9, len(WORDS))
    logs = np.log(good)
    for name, array in {
        "good": good,
        "short": good[:-1],
        "long": np.append(good, 0.5),
        "none": good[:0],
        "above": _with(good, 1.5),
        "zero": _with(good, 0.0),
        "nan": _with(good, math.nan),
        "inf": _with(good, math.inf),
        "logs-above": _with(logs, 0.7),
        "logs-zero": _with(logs, -math.inf),
        "integers": np.ones(len(WORDS), np.int64),
        "square": np.stack([good, good]),
        "objects": np.array([{"a": 1}] * len(WORDS), dtype=object),
    }.items():
        np.save(folder / f"{name}.npy", array)
    np.savez(folder / "both.npz", a=good, b=logs)
    for name in ("good.npy", "both.npz"):
        data = (folder / name).read_bytes()
        (folder / f"half{Path(name).suffix}").write_bytes(data[: len(data) // 2])
    numbers = [str(number) for number in good]
    for name, lines in {
        "words": WORDS,
        "others-short": OTHERS[:-3],
        "short": numbers[:-1],
        "others": [f"{word} {number}" for word, number in zip(OTHERS, numbers, strict=True)],
        "nan": [*numbers[:7], "nan", *numbers[8:]],
        "three": ["a word 0.5" for _ in WORDS],
    }.items():
        _write(folder / f"{name}.txt", lines)
    (folder / "bytes.txt").write_bytes(b"\xff\xfe" * 300)
    (folder / "empty").touch()


def _with(array: np.ndarray, number: float) -> np.ndarray:
    """Another number in its middle."""
    changed = array.copy()
    changed[len(array) // 2] = number
    return changed


# Several steps


def _half_and_half(stage: Stage) -> str:
    """Two columns that are right in turns, as others would publish them, come to perplexity 2."""
    turns = np.where(np.arange(len(WORDS)) % 2, 0.8, 0.2)
    _files(stage.folder)
    np.save(stage.folder / "one.npy", turns)
    np.save(stage.folder / "two.npy", np.log2(1 - turns))
    names = ("--column", "one=one.npy", "--column", "two=two.npy", "--log-base", "2")
    # Numbers from 0 to 1 are probabilities in any case.
    stage.works(knnlm("columns", "words.txt", *names, "--out", "t.npz"), says="2.50")
    tune = knnlm("tune", "--calibration", "c.json", "--score-table", "t.npz")
    stage.works(tune, says=r"two, fixed *\| +2.00")
    return "perplexity 2.5 each, 2 together, as by hand"


def _fitted(stage: Stage) -> None:
    _files(stage.folder)
    columns = ("--column", "good=good.npy", "--column", "b=both.npz:b")
    stage.works(knnlm("columns", "words.txt", *columns, "--out", "t.npz"))
    stage.works(knnlm("tune", "--calibration", "c.json", "--score-table", "t.npz"))


def _other_columns(stage: Stage) -> str:
    """What was fitted on columns is not used on a table of others, nor on one of a datastore."""
    _fitted(stage)
    report = knnlm("report", "--calibration", "c.json", "--score-table")
    for columns in (("c=good.npy", "b=both.npz:b"), ("good=good.npy", "c=both.npz:b")):
        flags = [word for column in columns for word in ("--column", column)]
        stage.works(knnlm("columns", "words.txt", *flags, "--out", "u.npz"), changes=["u.npz"])
        found = stage.refused([*report, "u.npz"], "another|lacks")
    stage.refused([*report, stage.world.tables / "test.npz"], "--dstore")
    return found


def _nothing_lost(stage: Stage) -> str:
    """A table that was there stays where a column is refused."""
    _fitted(stage)
    before = (stage.folder / "t.npz").read_bytes()
    words = knnlm("columns", "words.txt", "--column", "a=nan.npy", "--out", "t.npz")
    found = stage.refused(words, "column a")
    if (stage.folder / "t.npz").read_bytes() != before:
        raise BadOutcome("the table is another")
    return found


STEPS: tuple[tuple[str, str, str, Callable[[Stage], str]], ...] = (
    ("columns by hand", "0.8 and 0.2 in turns, two columns", "perplexity 2", _half_and_half),
    ("other columns", "report of a calibration on other columns", MUST, _other_columns),
    ("columns over a table", "NaN, where a table was", "refused; it stays", _nothing_lost),
)
