"""``fairseq-knnlm report``: a calibration on another table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_calls import (
    MODEL,
    Capture,
    calibration,
    call,
    refuse,
    say,
    small_store,
    write_table,
)

from fairseq_knnlm.calibration.stored import write_calibration
from fairseq_knnlm.calibration.writer import ScoreTableWriter
from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.mixture.components import LM, Component
from fairseq_knnlm.mixture.mixers import Fixed


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    return small_store(tmp_path)


@pytest.mark.parametrize("own", ["split", "distances", "neither"])
def test_text_that_the_datastore_holds_comes_with_a_warning(
    store: Datastore, tmp_path: Path, own: str, capsys: Capture
) -> None:
    split = "train" if own == "split" else "valid"
    table = write_table(tmp_path / "x.npz", store.fingerprint, split=split, own=own == "distances")
    for command in ("tune", "report"):
        assert call(command, "--dstore", store.path, "--score-table", table) == 0
        said = capsys.readouterr().err
        assert ("warning: the datastore seems to hold the text" in said) == (own != "neither")
        assert ("'train'" in said) == (own == "split")
        assert ("at distance 0" in said) == (own == "distances")


def test_report_judges_the_calibration_on_another_table(
    store: Datastore, tmp_path: Path, capsys: Capture
) -> None:
    table = write_table(tmp_path / "test.npz", store.fingerprint, split="test")
    report = ["report", "--dstore", store.path, "--score-table", table]
    assert "has no calibration" in refuse(capsys, *report)
    fitted = calibration(store.fingerprint)
    setting = {"suffix": 0, "k": 0, "temperature": 2.0}
    knn = replace(fitted.best, mixer=Fixed((LM, Component("knn", setting)), (0.875, 0.125)))
    write_calibration(store.calibration_path, replace(fitted, mixtures=(fitted.mixtures[0], knn)))
    lm = np.exp(-2)
    sharp = np.where(np.arange(960) % 2, 1.0, 0.0)
    losses = -np.log2(0.875 * lm + 0.125 * sharp)
    perplexity = 2 ** losses.mean()
    means = losses.reshape(64, 15).mean(axis=1)
    error = means.std(ddof=1) / 8
    gain = f"gain {2 / np.log(2) - losses.mean():.4f} bits, standard error {error:.4f}"
    assert say(capsys, *report).splitlines() == [
        "test, 960 tokens; fitted on valid, 1,000 tokens",
        "| mixture              | perplexity | change |         |",
        "|----------------------|------------|--------|---------|",
        f"| language model alone | {np.exp(2):>10.2f} |        |         |",
        f"| knn, fixed           | {perplexity:>10.2f} | {perplexity * lm - 1:>+6.1%} | <- used |",
        f"{gain}; standard error of the loss {error:.4f} bits, by batch means over sections of the "
        "text",
    ]
    to = tmp_path / "figures.json"
    say(capsys, *report, "--results-json", to)
    found = json.loads(to.read_text())
    assert found["perplexity"] == pytest.approx(perplexity)
    assert found["gain_error"] == pytest.approx(error)
    assert [one["mixture"] for one in found["mixtures"]] == ["language model alone", "knn, fixed"]
    assert found["conditions"]["fitted_on"] == {"split": "valid", "tokens": 1000}


LINES = 4 * ["the cat sat on a mat", "", "it was the cat 's mat"]


@pytest.fixture
def spelled(store: Datastore, tmp_path: Path) -> list[object]:
    """A report on a text that can be read, and its dictionary; one word of it is unknown."""
    write_calibration(store.calibration_path, calibration(store.fingerprint))
    words = sorted({word for line in LINES for word in line.split()} - {"mat"})
    (tmp_path / "dict.txt").write_text("".join(f"{word} 1\n" for word in words))
    ids = {word: 4 + number for number, word in enumerate(words)}
    tokens = [x for line in LINES for x in [*(ids.get(word, 3) for word in line.split()), 2]]
    path, size = tmp_path / "words.npz", len(tokens)
    lm = np.full(size, -3.0, np.float32)
    writer = ScoreTableWriter(path)
    named = {"row": np.arange(size), "token": np.array(tokens, np.int32)}
    knn = np.stack([lm, lm + 1], axis=1)
    writer.write(named | {"context": np.array(tokens, np.int32), "lm": lm, "knn": knn})
    settings = [{"suffix": 0, "k": 0, "temperature": t} for t in (1.0, 12.0)]
    about = {"model": MODEL, "split": "test", "k": 8, "features": []}
    known = {"experts": {"knn": settings}, "described": {"knn": {"k": 8}}}
    writer.publish(about | known | {"datastores": [store.fingerprint]})
    return ["report", "--dstore", store.path, "--score-table", path, "--data", tmp_path]


def test_figures_of_a_word_and_a_byte(
    spelled: list[object], tmp_path: Path, capsys: Capture
) -> None:
    """60 tokens of words and ends of lines, of a text that writes "'s" with the word before it."""
    assert "a word:" not in say(capsys, *spelled)  # words are not pieces
    raw = tmp_path / "raw.txt"
    raw.write_text(4 * "The cat sat on a mat.\n\nIt was the cat's mat.\n")
    to = tmp_path / "figures.json"
    said = say(capsys, *spelled, "--raw-text", raw, "--results-json", to)
    found = json.loads(to.read_text())
    assert found["tokens"] == 60
    assert found["base_word_perplexity"] == pytest.approx(np.exp(3 * 15 / 11))
    assert found["base_byte_perplexity"] == pytest.approx(np.exp(3 * 15 / 45))
    mixed = -15 * np.log(0.875 * np.exp(-3) + 0.125 * np.exp(-2))
    assert found["word_perplexity"] == pytest.approx(np.exp(mixed / 11))
    assert found["bits_per_byte"] == pytest.approx(mixed / 45 / np.log(2))
    assert "of 44 words and 180 bytes (raw text, 8 of the tokens unknown)" in said


def test_the_raw_text_of_another_split_is_refused(
    spelled: list[object], tmp_path: Path, capsys: Capture
) -> None:
    raw = tmp_path / "raw.txt"
    raw.write_text(4 * "other words\n\naltogether different\n")
    assert "is not the text of test" in refuse(capsys, *spelled, "--raw-text", raw)
    raw.write_text("The cat sat on a mat.\n")
    assert "12 lines, as in the split" in refuse(capsys, *spelled, "--raw-text", raw)
    (tmp_path / "dict.txt").write_text("a 1\n")
    assert "of another dictionary" in refuse(capsys, *spelled, "--raw-text", raw)


@pytest.mark.parametrize(
    ("card", "says"),
    [
        ({"model": "x" * 64}, "another language model"),
        ({"experts": {}}, "lacks knn"),
        ({"described": {"knn": {"k": 16}}}, "another number of neighbours"),
    ],
)
def test_report_refuses_a_table_of_another_run(
    store: Datastore,
    tmp_path: Path,
    card: dict[str, Any],
    says: str,
    capsys: Capture,
) -> None:
    write_calibration(store.calibration_path, calibration(store.fingerprint))
    table = write_table(tmp_path / "test.npz", store.fingerprint, **card)
    assert says in refuse(capsys, "report", "--dstore", store.path, "--score-table", table)
