"""The experiments' scripts, as processes: on made-up score tables, and one on the tiny world."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import BLOCKS, ROOT, Lab, must, run
from stores import random_entries, write_store

from fairseq_knnlm.calibration.table import ScoreTable, read_table
from fairseq_knnlm.calibration.writer import ScoreTableWriter

SCRIPTS = ROOT / "examples" / "experiments"
FROM_TABLES = (
    *("training_data", "continuous_cache", "knn_settings", "other_experts", "who_gains"),
)
FROM_COMMANDS = ("scaling", "adaptation", "ablations", "memorising", "writing", "headline")
#: Of these text_measures and installed_text have tests of their own.
SHARED = ("scores", "steps", "text_measures", "installed_text", "headline_figure")
ROWS = 800
KNN = [
    {"suffix": suffix, "k": k, "temperature": temperature}
    for suffix, k in ((0, 0), (0, 4), (1, 0))
    for temperature in (1.0, 4.0, 16.0)
]


@dataclass(frozen=True)
class Made:
    """Score tables of 50 types, and a datastore that they are of."""

    folder: Path

    @property
    def test(self) -> ScoreTable:
        return read_table(self.folder / "test.npz")

    def run(self, script: str, *flags: object) -> str:
        """A script's output over these tables."""
        words = ["--valid", self.folder / "valid.npz", "--test", self.folder / "test.npz"]
        words += ["--figure", self.folder / f"{script}.png", *flags]
        if script == "who_gains":
            words += ["--dstore", self.folder / "dstore"]
        return must(sys.executable, SCRIPTS / f"{script}.py", *words)


def write_table(path: Path, datastore: str, seed: int) -> None:
    """Neighbours too sure of themselves at temperature 1, and of use at 16."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=ROWS)
    lm = (-3 + 0.5 * rng.normal(size=ROWS)).astype(np.float32)
    known = 1 / (1 + np.exp(-logits)) > rng.random(ROWS)
    sure = np.array([setting["temperature"] for setting in KNN])
    knn = np.where(known[:, None], -4 / np.sqrt(sure), -24 / np.sqrt(sure)).astype(np.float32)
    writer = ScoreTableWriter(path)
    writer.write(
        {
            "row": np.arange(ROWS),
            "token": rng.integers(0, 50, ROWS).astype(np.int32),
            "context": np.zeros(ROWS, np.int32),
            "lm": lm,
            "knn": knn,
            "knn_distances": np.sort(rng.random((ROWS, 2)), axis=1).astype(np.float32),
            "knn_shared": rng.integers(0, 3, (ROWS, 4)).astype(np.float32),
            "cache": np.where(rng.random((ROWS, 1)) < 0.3, -0.5, -9).astype(np.float32),
            "cache_size": rng.random(ROWS).astype(np.float32),
        }
    )
    card = {
        "model": "m" * 64,
        "datastores": [datastore],
        "described": {"knn": {}, "cache": {}},
        "split": path.stem,
        "k": 8,
        "features": ["knn_distances", "knn_shared", "cache_size"],
        "experts": {"knn": KNN, "cache": [{"suffix": 0, "theta": 0.5, "window": 100}]},
    }
    writer.publish(card)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("tables")
    store = write_store(folder / "dstore", *random_entries(400, 4))
    for seed, split in enumerate(("valid", "test")):
        write_table(folder / f"{split}.npz", store.fingerprint, seed)
    return Made(folder)


def tables(out: str) -> list[list[list[str]]]:
    """The Markdown tables in some output: their rows' cells, without header and rule."""
    found: list[list[list[str]]] = []
    inside = False
    for line in out.splitlines():
        if line.startswith("|") and not inside:
            found.append([])
        inside = line.startswith("|")
        if inside:
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
    return [rows[2:] for rows in found]


def mixed(table: ScoreTable, expert: np.ndarray, weight: float) -> float:
    """Perplexity of a mixture of two, float64."""
    probs = (1 - weight) * np.exp(table["lm"].astype(float)) + weight * np.exp(expert.astype(float))
    return math.exp(-np.log(probs).mean())


@pytest.mark.parametrize("script", FROM_TABLES + FROM_COMMANDS)
def test_every_script_shows_an_example(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: each would load torch and fairseq first."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
    assert ended.value.code == 0
    assert f"example: python examples/experiments/{script}.py" in capsys.readouterr().out


def test_every_script_is_tested() -> None:
    """But for what the others share."""
    names = {file.stem for file in SCRIPTS.glob("*.py")}
    assert names == {*FROM_TABLES, *FROM_COMMANDS, *SHARED}


def test_training_data_warns_of_untuned_neighbours(made: Made) -> None:
    out = made.run("training_data")
    base, untuned, tuned, gate = (float(row[1]) for row in tables(out)[0])
    test = made.test
    assert base == pytest.approx(math.exp(-test["lm"].mean()), abs=0.01)
    assert untuned == pytest.approx(mixed(test, test["knn"][:, 0], 0.25), abs=0.01)
    assert tuned < base < untuned
    assert gate < base
    assert "worse than none" in out


def test_cache_and_neighbours_together_are_best(made: Made) -> None:
    (rows,) = tables(made.run("continuous_cache"))
    fixed = {row[0]: float(row[1]) for row in rows}
    assert fixed["kNN and cache"] < min(fixed["kNN"], fixed["cache"]) < fixed["alone"]


def test_settings_are_varied_one_by_one(made: Made) -> None:
    by_k, by_temperature, by_lambda = tables(made.run("knn_settings"))
    test = made.test
    assert [row[0] for row in by_k] == ["4", "8"]
    assert [row[0] for row in by_temperature] == ["1", "4", "16"]
    assert float(by_lambda[0][1]) == pytest.approx(math.exp(-test["lm"].mean()), abs=0.01)
    for lmbda, perplexity, temperature in by_lambda:
        place = [setting["temperature"] for setting in KNN].index(float(temperature))
        expected = mixed(test, test["knn"][:, place], float(lmbda))
        assert float(perplexity) == pytest.approx(expected, abs=0.01)


def test_each_expert_stands_alone(made: Made) -> None:
    out = made.run("other_experts")
    (rows,) = tables(out)
    assert [row[0] for row in rows] == ["nothing", "nearest neighbours", "continuous cache"]
    base = float(rows[0][2])
    for _, weight, perplexity, gain, _ in rows[1:]:
        assert 0 < float(weight) < 1
        assert float(gain) == pytest.approx(base - float(perplexity), abs=0.02)
    if importlib.util.find_spec("matplotlib"):
        assert (made.folder / "other_experts.png").read_bytes().startswith(b"\x89PNG")
    else:
        assert "needs matplotlib" in out


def test_groups_of_tokens_add_up_to_all(made: Made) -> None:
    ways = tables(made.run("who_gains"))
    assert len(ways) == 3
    for rows in ways:
        counts = np.array([int(row[1].replace(",", "")) for row in rows])
        losses = np.log([float(row[2]) for row in rows])
        assert counts.sum() == ROWS
        total = math.exp((counts * losses).sum() / ROWS)
        assert total == pytest.approx(math.exp(-made.test["lm"].mean()), abs=0.02)


def test_tables_of_different_models_are_refused(made: Made, tmp_path: Path) -> None:
    other = tmp_path / "other.npz"
    write_table(other, "e" * 64, seed=3)
    words = ["--valid", other, "--test", made.folder / "test.npz"]
    ran = run(sys.executable, SCRIPTS / "other_experts.py", *words)
    assert ran.code == 1
    assert "datastores differ" in ran.out
    assert "Traceback" not in ran.out


@pytest.mark.slow
def test_adaptation_on_the_tiny_world(lab: Lab, tmp_path: Path) -> None:
    """With one model in both parts the two must agree; a second run finds everything there."""
    flags = shlex.join([*BLOCKS, "--sample-break-mode", "none", "--cpu"])
    words = [sys.executable, SCRIPTS / "adaptation.py", lab.data, "--path", lab.checkpoint()]
    words += ["--in-domain-path", lab.checkpoint(), "--out", tmp_path, "--k", 64]
    words += ["--eval-flags", flags, "--save-flags", flags]
    out = must(*words)
    other, adapted, bound = (float(row[1]) for row in tables(out)[0])
    assert other == bound
    assert adapted < other
    card = json.loads((tmp_path / "dstore-in-domain" / "manifest.json").read_text())
    assert card["rows"] == len(lab.text("train"))
    assert must(*words).count("there already") == 5


@pytest.mark.slow
def test_writing_on_the_tiny_world(lab: Lab, datastore: Path, tmp_path: Path) -> None:
    """Texts are those of ``generate``, and measured as counting their words says."""
    model = [lab.data, "--path", lab.checkpoint(), "--dstore", datastore, "--cpu"]
    model += ["--k", 32, "--lmbda", 0.9, "--knn-temp", 2]
    words = [sys.executable, SCRIPTS / "writing.py", *model, "--out", tmp_path / "out"]
    words += ["--prompts", 6, "--prompt-tokens", 5, "--new-tokens", 11]
    out = must(*words)
    lines = (tmp_path / "out" / "texts.jsonl").read_text().splitlines()
    texts = [{name: cut(text) for name, text in json.loads(line).items()} for line in lines]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["prompts"] == len(texts) == 6
    whole = lab.text("test")
    for number, one in enumerate(texts):
        start = number * len(whole) // 6
        assert one.pop("prompt") + one["people"] == whole[start : start + 16]
        assert {len(text) for text in one.values()} == {11}
    for name, found in results["texts"].items():
        mine = [one[name] for one in texts]
        pairs = {pair for text in mine for pair in pairwise(text)}
        assert found["distinct_2"] == pytest.approx(len(pairs) / 60)
        truths = [one["people"] for one in texts]
        hits = [
            sum(min(text.count(word), truth.count(word)) for word in set(text)) / 11
            for text, truth in zip(mine, truths, strict=True)
        ]
        assert found["true_1"]["mean"] == pytest.approx(sum(hits) / 6)
    assert [row[0] for rows in tables(out) for row in rows] == [*results["texts"]] * 2
    again = must(*words)  # finds the texts there
    assert tables(again) == tables(out)
    assert not re.search(r"greedy: \d+ s", again)
    one = next(one for one in map(json.loads, lines) if "\n" not in one["prompt"])
    (tmp_path / "prompt.txt").write_text(one["prompt"] + "\n")
    fixed = ["--experts", "knn", "--mixer", "fixed", "--lines", "--new-tokens", 11]
    words = ["fairseq-knnlm", "generate", *model, *fixed, "--prompts", tmp_path / "prompt.txt"]
    written = one["kNN, fixed, greedy"]
    assert written.strip() != one["LM alone, greedy"].strip()
    assert must(*words).split(one["prompt"], 1)[1].startswith(written.rstrip())


def cut(text: str) -> list[str]:
    """A text's tokens, ends of lines included."""
    return text.replace("\n", " </s> ").split()
