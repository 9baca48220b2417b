"""``fairseq-knnlm columns``: from what others published to a table, a mixture and a report."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from cli_calls import Capture, refuse, say, small_store, write_table
from conftest import ROOT
from test_ngram import Formula

from fairseq_knnlm.calibration.table import read_table
from fairseq_knnlm.experts.history import history

ROWS = 1200
TYPES = 60
#: Seven frozen models, as their authors published them; not a part of the project.
PENN_TREEBANK = Path(os.environ.get("SHARED", ROOT.parent / "shared")) / "data" / "ptb-columns"


class Text:
    """Words of few types, and two columns that are right in turns: 0.8 and 0.2, 0.2 and 0.8."""

    def __init__(self, folder: Path, split: str = "valid", seed: int = 0) -> None:
        self.folder = folder
        self.tokens = np.random.default_rng(seed).integers(0, TYPES, ROWS)
        self.words = folder / f"{split}.txt"
        self.words.write_text("\n".join(f"w{token}" for token in self.tokens))
        turns = np.where(np.arange(ROWS) % 2, 0.8, 0.2)
        self.one, self.two = folder / f"{split}-one.npy", folder / f"{split}-two.npz"
        np.save(self.one, turns)
        np.savez(self.two, a=np.log(turns), b=np.log(1 - turns))
        self.table = folder / f"{split}.npz"

    @property
    def command(self) -> list[object]:
        return [
            *("columns", self.words, "--column", f"one={self.one}"),
            *("--column", f"two={self.two}:b", "--out", self.table),
        ]


def test_columns_tune_report(tmp_path: Path, capsys: Capture) -> None:
    """One in two tokens has 0.8 by the first and 0.2 by the second: half and half is best."""
    place = tmp_path / "fitted.json"
    for split, seed in (("valid", 0), ("test", 1)):
        said = say(capsys, *Text(tmp_path, split, seed).command)
        alone = math.exp(-math.log(0.8 * 0.2) / 2)
        assert f"| one    | {alone:>10.2f} |" in said
        assert f"| two    | {alone:>10.2f} |" in said
    said = say(capsys, "tune", "--calibration", place, "--score-table", tmp_path / "valid.npz")
    assert f"written to {place}; `report` reads it" in said
    assert (tmp_path / "fitted.png").exists()
    said = say(capsys, "report", "--calibration", place, "--score-table", tmp_path / "test.npz")
    assert "test.txt, 1,200 tokens; fitted on valid.txt, 1,200 tokens" in said
    rows = re.findall(r"^\| (.*?) *\| +([\d.]+) \|", said, flags=re.MULTILINE)
    figures = {name: float(figure) for name, figure in rows}
    assert figures["language model alone"] == round(alone, 2)
    assert figures["two, fixed"] == 2.0
    assert {"two, gate", "history, gate", "two+history, fixed"} < set(figures)
    assert figures["two+history, gate"] < 1.5  # whoever was right last is wrong now


def test_what_is_in_the_table(tmp_path: Path, capsys: Capture) -> None:
    text = Text(tmp_path)
    say(capsys, *text.command)
    table = read_table(text.table)
    turns = np.where(np.arange(ROWS) % 2, 0.8, 0.2)
    np.testing.assert_allclose(table["lm"], np.log(turns), rtol=1e-6)
    np.testing.assert_allclose(table["two"], np.log(1 - turns)[:, None], rtol=1e-6)
    np.testing.assert_array_equal(table["history"], history(text.tokens).log_probs)
    assert list(table.experts) == ["two", "history"]
    assert (table["context"][1:] == table["token"][:-1]).all()
    for name in ("lm_last", "lm_lately", "two_after", "history_met", "history_last"):
        assert name in table.card["features"]
    assert table["history_last"].shape == (ROWS, 5)
    assert table.card["base_perplexity"] == pytest.approx(2.5)
    assert table.card["datastores"] == []


def test_suffixes_where_they_are_asked_for(tmp_path: Path, capsys: Capture) -> None:
    """Where a text says itself again, what followed the same six words is nearly sure."""
    text = Text(tmp_path)
    half = text.tokens[: ROWS // 2]
    text.words.write_text("\n".join(f"w{token}" for token in np.concatenate([half, half])))
    say(capsys, *text.command, "--suffixes")
    table = read_table(text.table)
    assert list(table.experts) == ["two", "history", "suffix"]
    assert [one["half_life"] for one in table.experts["suffix"]] == [500, 2000, 1e6]
    assert table["suffix"].shape == (ROWS, 3)
    features = set(table.card["features"])
    assert {"suffix_counts", "suffix_types", "suffix_best", "suffix_gap", "suffix_last"} < features
    again = table["suffix"][ROWS // 2 + 10 :, 2]
    # After 4, 5 and 6 words there is one place, which counts as much as all that fewer words say.
    assert (again > math.log(1 - 1 / 8)).all()
    assert (table["suffix_counts"][ROWS // 2 + 10 :, 5] >= math.log(2) - 1e-6).all()


def test_ngrams_of_a_training_text_are_those_of_the_formula(
    tmp_path: Path, capsys: Capture
) -> None:
    """What the training text does not have gets nothing, and is no context."""
    text, training = Text(tmp_path), tmp_path / "train.txt"
    counted = np.random.default_rng(5).integers(0, TYPES - 1, 3000)  # never the last type
    training.write_text(" ".join(f"w{token}" for token in counted))
    say(capsys, *text.command, "--training-text", training)
    table = read_table(text.table)
    assert list(table.experts) == ["two", "history", "ngram"]
    formula, listed = Formula([counted], TYPES - 1, 5), text.tokens.tolist()
    for place in range(60):
        context = listed[max(0, place - 4) : place]
        while TYPES - 1 in context:  # what follows the last word that was never seen
            context = context[context.index(TYPES - 1) + 1 :]
        word = listed[place]
        wanted = math.log(formula.prob(tuple(context), word)) if word < TYPES - 1 else -math.inf
        assert table["ngram"][place, 0] == pytest.approx(wanted, abs=1e-5)
        assert table["ngram_length"][place, 0] == formula.known(tuple(context))[0]
    assert np.isneginf(table["ngram"][:, 0]).sum() == (text.tokens == TYPES - 1).sum() > 0
    assert table.card["described"]["ngram"] == {"order": 5, "tokens": 3000}


def test_ends_of_lines_and_bases(tmp_path: Path, capsys: Capture) -> None:
    words, column = tmp_path / "words", tmp_path / "logs.txt"
    words.write_text("a b\na b\n")
    column.write_text("".join(f"{word} -1\n" for word in ["a", "b", "</s>"] * 2))
    out = tmp_path / "table.npz"
    flags = ["--line-end", "</s>", "--log-base", 10, "--out", out]
    said = say(capsys, "columns", words, "--column", f"it={column}", *flags)
    assert "| it     |      10.00 |" in said
    assert read_table(out)["token"].tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("column", "says"),
    [
        ("one", "--column names no column"),
        ("=x.npy", "--column names no column"),
        ("one=", "--column names no column"),
        ("One=x.npy", "--column cannot be named 'One'"),
        ("a_b=x.npy", "--column cannot be named 'a_b'"),
        ("lm=x.npy", "'lm', which a score table has for something else"),
        ("knn2=x.npy", "'knn2', which a score table has for something else"),
        ("history=x.npy", "'history', which"),
        ("token=x.npy", "'token', which"),
        ("first=x.npy", "two columns are named 'first'"),
    ],
)
def test_names_that_no_column_can_have(
    tmp_path: Path, column: str, says: str, capsys: Capture
) -> None:
    words = ["--column", "first=y.npy", "--column", column, "--out", tmp_path / "t.npz"]
    assert says in refuse(capsys, "columns", tmp_path / "words", *words)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([0.5] * (ROWS - 1), "of another length than the text"),
        ([0.5] * (ROWS - 1) + [1.5], "above 1 among probabilities"),
        ([0.5] * (ROWS - 1) + [0.0], "a probability of 0"),
        ([0.5] * (ROWS - 1) + [math.nan], "no number (NaN)"),
    ],
)
def test_a_bad_column_leaves_no_table(
    tmp_path: Path, values: list[float], says: str, capsys: Capture
) -> None:
    text = Text(tmp_path)
    np.save(text.one, values)
    assert says in refuse(capsys, *text.command)
    assert not text.table.exists()


def test_other_words_are_refused(tmp_path: Path, capsys: Capture) -> None:
    text, column = Text(tmp_path), tmp_path / "words.txt"
    column.write_text("".join(f"w{token} 0.5\n" for token in (text.tokens + 1) % TYPES))
    said = refuse(capsys, *text.command, "--column", f"three={column}")
    assert "is of other words than the text" in said
    assert f"'w{text.tokens[0]}', word 1" in said


def test_what_is_read_is_not_written_over(tmp_path: Path, capsys: Capture) -> None:
    text = Text(tmp_path)
    for path in (text.words, text.one, text.two):
        before = path.read_bytes()
        said = refuse(capsys, *text.command[:-1], path)
        assert "--out would write over what is read" in said
        assert path.read_bytes() == before
    say(capsys, *text.command)
    said = refuse(capsys, "tune", "--calibration", text.table, "--score-table", text.table)
    assert "would write over what is read" in said
    assert len(read_table(text.table)) == ROWS


def test_a_calibration_has_one_place(tmp_path: Path, capsys: Capture) -> None:
    text, store, place = Text(tmp_path), small_store(tmp_path), tmp_path / "fitted.json"
    say(capsys, *text.command)
    tables = ["--score-table", text.table]
    for command in ("tune", "report"):
        both = ["--dstore", store.path, "--calibration", place, *tables]
        assert "a calibration lies beside its datastore" in refuse(capsys, command, *both)
        sized = ["--dstore-size", 5, "--calibration", place, *tables]
        assert "--calibration and --dstore-size" in refuse(capsys, command, *sized)
        said = refuse(capsys, command, "--dstore", store.path, *tables)
        assert "give --calibration FILE in the place of --dstore" in said
    assert "tune needs a place" in refuse(capsys, "tune", *tables)
    said = refuse(capsys, "tune", "--calibration", place, "--data", tmp_path)
    assert "--calibration does nothing with --data" in said
    of_store = write_table(tmp_path / "of-store.npz", store.fingerprint)
    said = refuse(capsys, "tune", "--calibration", place, "--score-table", of_store)
    assert "--dstore DSTORE in the place of --calibration" in said
    said = refuse(capsys, "report", "--calibration", place, *tables)
    assert f"expected: {place}" in said
    assert not place.exists()


def test_a_table_of_another_first_column_is_refused(tmp_path: Path, capsys: Capture) -> None:
    text, place = Text(tmp_path), tmp_path / "fitted.json"
    say(capsys, *text.command)
    say(capsys, "tune", "--calibration", place, "--score-table", text.table)
    other = [f"--column=other={text.one}", f"--column=two={text.two}:b", "--out", text.table]
    say(capsys, "columns", text.words, *other)
    said = refuse(capsys, "report", "--calibration", place, "--score-table", text.table)
    assert "fitted for another language model" in said


@pytest.mark.skipif(not PENN_TREEBANK.is_dir(), reason="the published columns are not here")
def test_the_published_ensemble_of_penn_treebank(tmp_path: Path, capsys: Capture) -> None:
    """Fixed weights by the authors: 47.31, and 52.38 by the best of the seven alone."""
    from fairseq_knnlm.calibration.fitting import best_weights

    with np.load(PENN_TREEBANK / "valid.npz") as archive:
        names = archive.files
    tables = {}
    for split in ("valid", "test"):
        flags = []
        for number, name in enumerate(names):
            flags += ["--column", f"m{number}={PENN_TREEBANK / split}.npz:{name}"]
        out = tmp_path / f"{split}.npz"
        said = say(capsys, "columns", PENN_TREEBANK / f"{split}.words", *flags, "--out", out)
        table = read_table(out)
        columns = [table["lm"], *(table[f"m{number}"][:, 0] for number in range(1, len(names)))]
        tables[split] = np.stack(columns, axis=1)
    assert "52.38" in said
    weights = best_weights(tables["valid"], 400)
    mixed = np.log(np.exp(tables["test"].astype(np.float64)) @ weights)
    assert round(math.exp(-mixed.mean()), 2) == 47.31
