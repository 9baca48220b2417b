"""What an evaluation tells for its figures to be compared: by the tokens of its own score table."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Lab, must

from fairseq_knnlm.calibration.table import read_table
from fairseq_knnlm.errors import ConfigError

#: Sentences by themselves, for a model that takes no long ones.
SHORT = (
    *("--sample-break-mode", "eos", "--tokens-per-sample", "1000", "--context-window", "0"),
    *("--model-overrides", "{'max_target_positions': 12}"),
)
KNN = ["--knnlm", "--k", 16, "--lmbda", 0.3, "--knn-temp", 2.0]


@pytest.fixture(scope="module")
def found(lab: Lab, datastore: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the test split, whose raw text is what was binarised."""
    folder = tmp_path_factory.mktemp("comparable")
    to = folder / "results.json"
    table = folder / "table.npz"
    flags = [*KNN, "--dstore-filename", datastore, "--raw-text", lab.folder / "test.txt"]
    lab.evaluate("test", *flags, "--results-json", to, "--score-table", table)
    return {**json.loads(to.read_text()), "lm": read_table(table)["lm"].astype(np.float64)}


def test_words_and_bytes_are_the_raw_texts(lab: Lab, found: dict[str, Any]) -> None:
    raw = (lab.folder / "test.txt").read_text()
    total = -found["lm"].sum()
    assert found["text"]["words"] == len(raw.split())
    assert found["text"]["bytes"] == len(raw.encode())
    assert found["text"]["agreement"] == 1 or found["text"]["unknown"] > 0
    assert found["base_word_perplexity"] == pytest.approx(math.exp(total / len(raw.split())))
    assert found["base_byte_perplexity"] == pytest.approx(math.exp(total / len(raw)))
    nats = found["loss"] * found["tokens"] * math.log(2)
    assert found["bits_per_byte"] == pytest.approx(nats / len(raw) / math.log(2))


def test_the_standard_error_is_that_of_batch_means(found: dict[str, Any]) -> None:
    """Sections begin with blocks of 8 tokens; the jackknife leaves out one after the other."""
    rows, lm = found["sections"]["rows"], found["lm"]
    assert len(rows) - 1 == min(64, -(-len(lm) // 8))
    assert all(row % 8 == 0 for row in rows[:-1]) and rows[-1] == len(lm)
    sums = np.array([lm[a:b].sum() for a, b in pairwise(rows)])
    assert found["sections"]["base_log_prob"] == pytest.approx(sums.tolist())
    sizes = np.diff(rows)
    left = (sums.sum() - sums) / (sizes.sum() - sizes)
    spread = left - left.mean()
    jackknife = math.sqrt((len(sums) - 1) / len(sums) * spread @ spread) / math.log(2)
    assert found["base_loss_error"] == pytest.approx(jackknife, rel=0.05)


def test_conditions(found: dict[str, Any]) -> None:
    assert found["conditions"] == {
        "stride": 8,
        "context_of_queries": [9, 16],
        "context_of_keys": [[9, 16]],
        "datastores_of": ["train"],
        "fitted_on": None,
    }


def positions_read(lab: Lab, length: int, window: int) -> list[int]:
    """By fairseq's own task and loader: positions that the model reads, up to each query's own."""
    from fairseq import options, tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    words = lab.command("test", "--tokens-per-sample", length - window)
    words[words.index("knn_lm")] = "language_modeling"
    args = options.parse_args_and_arch(options.get_eval_lm_parser(), words)
    task = tasks.setup_task(convert_namespace_to_omegaconf(args).task)
    task.load_dataset("test")
    loader = task.eval_lm_dataloader(task.dataset("test"), max_tokens=64, context_window=window)
    found: list[int] = []
    for batch in loader:
        read = batch["net_input"]["src_tokens"].ne(task.source_dictionary.pad())
        starts = batch.get("start_indices", [0] * len(read))
        for row, targets, start in zip(read, batch["target"], starts, strict=True):
            if start == window:  # all of it: the text has begun long before
                predicted = targets.ne(task.source_dictionary.pad()).nonzero()[:, 0].tolist()
                found += [int(row[: place + 1].sum()) for place in predicted]
    return found


@pytest.mark.parametrize(("length", "window"), [(16, 8), (16, 0), (12, 11), (13, 3)])
def test_context_is_what_the_model_reads(
    lab: Lab, tmp_path: Path, length: int, window: int
) -> None:
    to = tmp_path / "results.json"
    blocks = ["--tokens-per-sample", length, "--context-window", window]
    lab.evaluate("test", *blocks, "--results-json", to)
    read = positions_read(lab, length, window)
    told = json.loads(to.read_text())["conditions"]["context_of_queries"]
    assert told == [min(read), max(read)]


def test_the_report_says_them(lab: Lab, datastore: Path) -> None:
    raw = ["--raw-text", lab.folder / "test.txt", "--dstore-filename", datastore]
    said = must("fairseq-eval-lm", *lab.command("test", *KNN, *raw))
    assert "standard error of the loss" in said
    assert "a word: perplexity" in said
    assert (
        "9 to 16 tokens before each token, stride 8; keys of train, 9 to 16 tokens before each"
    ) in said


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--raw-text", "valid.txt"], "is not the text of test"),
        (["--raw-text", "nowhere.txt"], "no such file"),
        (
            ["--raw-text", "test.txt", *SHORT],
            "--raw-text needs all tokens of the text scored",
        ),
        (
            ["--raw-text", "test.txt", "--save-knnlm-dstore", "--dstore-mmap", "new"],
            "--raw-text does nothing where a datastore is saved",
        ),
    ],
)
def test_bad_input(lab: Lab, tmp_path: Path, flags: list[str], says: str) -> None:
    flags = [flags[0], str(lab.folder / flags[1]), *flags[2:]]
    with pytest.raises(ConfigError, match=says):
        lab.evaluate("test", *flags, "--results-json", tmp_path / "x.json")
    assert not list(tmp_path.iterdir())


def test_a_raw_text_is_not_written_over(lab: Lab) -> None:
    raw = lab.folder / "test.txt"
    before = raw.read_bytes()
    with pytest.raises(Exception, match="would write over what is read"):
        lab.evaluate("test", "--raw-text", raw, "--results-json", raw)
    assert raw.read_bytes() == before
