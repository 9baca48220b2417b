"""More experts than one, as people type them: fit on valid, evaluate on test, against oracles."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BLOCKS, Lab, must

from fairseq_knnlm.calibration.losses import mixture_losses
from fairseq_knnlm.calibration.report import measured
from fairseq_knnlm.calibration.stored import Calibration, read_calibration, write_calibration
from fairseq_knnlm.calibration.table import ScoreTable, read_table
from fairseq_knnlm.datastore import open_datastore
from fairseq_knnlm.errors import ConfigError, TableError
from fairseq_knnlm.experts.knn import KnnSetting
from fairseq_knnlm.mixture.components import Component

K = ["--k", 64]
EXPERTS = "knn,cache,ngram,suffix"
#: A cache that counts: theta 0 makes all positions of the window alike.
COUNTING = ["--experts", "cache", "--cache-lmbda", 0.3, "--cache-theta", 0, "--cache-window", 50]


@dataclass(frozen=True)
class Tuned:
    """A datastore with a calibration, what tuning said, and a score table of test."""

    store: Path
    said: str
    table: ScoreTable
    table_file: Path

    @property
    def calibration(self) -> Calibration:
        found = read_calibration(
            self.store / "calibration.json", [open_datastore(self.store).fingerprint]
        )
        assert found is not None
        return found


@pytest.fixture(scope="module")
def tuned(lab: Lab) -> Tuned:
    """Saved, indexed and tuned by the real commands."""
    store, table = lab.folder / "tuned", lab.folder / "mixtures.npz"
    model = ["--path", lab.checkpoint(), *BLOCKS, "--sample-break-mode", "none", "--cpu"]
    must("fairseq-knnlm", "save", lab.data, "--dstore", store, *model)
    must("fairseq-knnlm", "build-index", "--dstore", store)
    tune = ["tune", "--dstore", store, "--data", lab.data, *model, *K, "--lm-features"]
    said = must("fairseq-knnlm", *tune)
    asked = ["--dstore-filename", store, "--experts", EXPERTS, "--mixer", "none", "--lm-features"]
    lab.evaluate("test", *asked, *K, "--score-table", table)
    return Tuned(store, said, read_table(table), table)


@pytest.fixture
def copy(tuned: Tuned, tmp_path: Path) -> Path:
    """Of the datastore, to be changed."""
    return Path(shutil.copytree(tuned.store, tmp_path / "copy"))


def results(lab: Lab, folder: Path, *flags: object, split: str = "test") -> dict[str, Any]:
    """What an evaluation leaves in --results-json; fairseq's own figure is the same."""
    file = folder / "results.json"
    stock = lab.evaluate(split, *flags, "--results-json", file)
    found: dict[str, Any] = json.loads(file.read_text())
    assert found["loss"] == pytest.approx(stock["loss"], abs=1e-4)
    return found


def bits(log_probs: np.ndarray) -> float:
    return float(-log_probs.mean(dtype=np.float64) / math.log(2))


def mixed(lm: np.ndarray, expert: np.ndarray, weight: float) -> np.ndarray:
    """In float64; where the expert has nothing to go by, the language model."""
    p = (1 - weight) * np.exp(lm, dtype=np.float64) + weight * np.exp(expert, dtype=np.float64)
    return np.where(np.isnan(expert), lm, np.log(p))


def counted(tokens: Sequence[int], window: int, starts: Sequence[int] = (0,)) -> np.ndarray:
    """log of the share of a token in the window before it, back to the start of its document."""
    found = []
    for row, token in enumerate(tokens):
        start = max(start for start in starts if start <= row)
        before = list(tokens[max(start, row - window) : row])
        share = before.count(token) / len(before) if before else math.nan
        found.append(math.log(share) if share else -math.inf)
    return np.array(found)


def test_tuning_makes_its_table_and_says_what_each_part_adds(tuned: Tuned) -> None:
    names = {file.name for file in tuned.store.iterdir()}
    assert {"calibration.json", "valid.npz", "ngram.npz"} <= names
    assert "calibration.safetensors" not in names
    table = read_table(tuned.store / "valid.npz")
    assert list(table.experts) == EXPERTS.split(",")
    for stack in tuned.calibration.mixtures:
        row = rf"^\| {re.escape(stack.name)} +\| +{stack.perplexity:.2f} \|"
        assert re.search(row, tuned.said, re.M)
    (used,) = re.findall(r"^\| (.*?) +\| +\d.*\| <- used \|$", tuned.said, re.M)
    assert used == tuned.calibration.best.name
    assert "fitting: " in tuned.said


def test_tuning_keeps_to_its_own_lines(tuned: Tuned) -> None:
    """Neither fairseq's configuration nor matplotlib's search for fonts."""
    for noise in ("DEBUG", "INFO", "matplotlib.font_manager", "distributed_world_size"):
        assert noise not in tuned.said


def test_evaluation_uses_what_was_fitted_and_report_says_the_same(
    lab: Lab, tuned: Tuned, tmp_path: Path
) -> None:
    found = results(lab, tmp_path, "--knnlm", "--dstore-filename", tuned.store, *K)
    best = tuned.calibration.best
    assert found["mixture_from"] == "calibrated on valid"
    assert found["experts"] == list(best.experts)
    assert found["mixer"] == best.mixer.kind
    report = ["report", "--dstore", tuned.store, "--score-table", tuned.table_file]
    said = must("fairseq-knnlm", *report)
    (line,) = (line for line in said.splitlines() if "<- used" in line)
    assert line.split("|")[1].strip() == best.name
    assert f" {found['perplexity']:.2f} " in line
    base = rf"^\| language model alone +\| +{found['base_perplexity']:.2f} \|"
    assert re.search(base, said, re.M)


@pytest.mark.parametrize(
    ("experts", "kind"),
    [("knn", "fixed"), ("knn", "bins"), ("knn", "gate"), ("cache,knn", "gate"), (EXPERTS, "blend")],
)
def test_experts_and_mixer_can_be_chosen(
    lab: Lab, tuned: Tuned, tmp_path: Path, experts: str, kind: str
) -> None:
    """Evaluation mixes token by token what the report computes from the table."""
    stack = tuned.calibration.find(experts.split(","), kind)
    assert stack is not None
    flags = ["--dstore-filename", tuned.store, *K, "--experts", experts, "--mixer", kind]
    found = results(lab, tmp_path, *flags)
    expected = measured(tuned.calibration, tuned.table).find(experts.split(","), kind)
    assert expected is not None
    assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-4)
    assert found["loss"] == pytest.approx(expected.bits, abs=1e-4)
    assert found["mixed"] == list(stack.experts)


def test_the_mixture_stands_in_the_log(lab: Lab, tuned: Tuned) -> None:
    flags = ["--experts", "knn,cache,ngram", "--mixer", "fixed", "--dstore-filename", tuned.store]
    said = must("fairseq-eval-lm", *lab.command("test", *flags, *K))
    line = r"knn: lambda [\d.e-]+, temperature [\d.]+; cache: lambda .*; ngram: lambda "
    assert re.search(line, said)
    assert "(calibrated on valid)" in said
    ours = re.search(r"mixture +perplexity (\d+\.\d\d)", said)
    stock = re.search(r"Loss \(base 2\): [\d.]+, Perplexity: (\d+\.\d\d)", said)
    assert ours and stock and ours[1] == stock[1]


def test_explicit_flags_win(lab: Lab, tuned: Tuned, tmp_path: Path) -> None:
    memory = ["--knnlm", "--dstore-filename", tuned.store, *K]
    knn = tuned.table.column(Component("knn", vars(KnnSetting(temperature=2.0))))
    given = results(lab, tmp_path, *memory, "--lmbda", 0.3, "--knn-temp", 2)
    assert given["mixture_from"] == "given"
    assert given["loss"] == pytest.approx(bits(mixed(tuned.table["lm"], knn, 0.3)), abs=1e-4)
    # What is left open comes from the calibration.
    part = results(lab, tmp_path, *memory, "--knn-temp", 2)
    assert part["mixture_from"] == "--knn-temp given, else calibrated on valid"
    fixed = tuned.calibration.find(["knn"], "fixed")
    assert fixed is not None
    lmbda = fixed.mixer.weights[1]  # type: ignore[attr-defined]
    assert part["weights"][1]["weight"] == pytest.approx(lmbda)
    assert part["weights"][1]["temperature"] == 2
    weightless = ["--experts", "knn,cache", "--lmbda", 0, "--cache-lmbda", 0]
    none = results(lab, tmp_path, *memory, *weightless)
    assert none["loss"] == pytest.approx(none["base_loss"], abs=1e-6)


def test_another_k_is_worth_a_warning_and_a_gate_refuses_it(
    lab: Lab, tuned: Tuned, caplog: pytest.LogCaptureFixture
) -> None:
    flags = ["--experts", "knn", "--dstore-filename", tuned.store, "--k", 8]
    lab.evaluate("test", *flags, "--mixer", "fixed")
    assert "the calibration was fitted with knn k 64" in caplog.text
    with pytest.raises(ConfigError, match="as many neighbours") as caught:
        lab.evaluate("test", *flags, "--mixer", "gate")
    assert "expected: --k 64" in str(caught.value)


def test_a_calibration_of_another_model_is_refused(
    lab: Lab, tuned: Tuned, copy: Path, tmp_path: Path
) -> None:
    """Unless nothing is asked of it."""
    other = replace(tuned.calibration, model="x" * 64)
    write_calibration(copy / "calibration.json", other)
    memory = ["--knnlm", "--dstore-filename", copy, *K]
    with pytest.raises(TableError, match="another language model"):
        lab.evaluate("test", *memory)
    lab.evaluate("test", *memory, "--lmbda", 0.3, "--knn-temp", 2)
    lab.evaluate("test", *memory, "--mixer", "none", "--score-table", tmp_path / "table.npz")


def test_where_nothing_helped_the_language_model_is_used_alone(
    lab: Lab, tuned: Tuned, copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fitted = tuned.calibration
    alone = replace(fitted, mixtures=fitted.mixtures[:1], default=0)
    write_calibration(copy / "calibration.json", alone)
    found = results(lab, tmp_path, "--knnlm", "--dstore-filename", copy)
    assert found["loss"] == found["base_loss"]
    assert found["experts"] == []
    assert "nothing that was fitted beat the language model" in caplog.text


def test_a_cache_needs_no_datastore(lab: Lab, tmp_path: Path) -> None:
    """Against counting: across blocks and batches, and never the token itself."""
    file = tmp_path / "table.npz"
    found = results(lab, tmp_path, *COUNTING, "--score-table", file)
    table = read_table(file)
    setting = {"suffix": 0, "theta": 0.0, "window": 50}
    expected = counted(table["token"].tolist(), 50)
    np.testing.assert_allclose(table.column(Component("cache", setting)), expected, rtol=1e-5)
    assert np.isnan(expected[0])
    assert found["loss"] == pytest.approx(bits(mixed(table["lm"], expected, 0.3)), abs=1e-4)
    assert found["mixture_from"] == "given"
    assert "index" not in found


@pytest.mark.parametrize("tokens", [40, 400])
def test_a_cache_reads_in_the_order_of_the_text(lab: Lab, tmp_path: Path, tokens: int) -> None:
    """Where fairseq would go by the length of the lines, and however large the batches are."""
    lines = ["--sample-break-mode", "eos", "--tokens-per-sample", 16, "--context-window", 0]
    file = tmp_path / "table.npz"
    flags = [*lines, "--max-tokens", tokens, *COUNTING, "--score-table", file]
    found = results(lab, tmp_path, *flags)
    table = read_table(file)
    expected = mixed(table["lm"], counted(table["token"].tolist(), 50), 0.3)
    assert found["loss"] == pytest.approx(bits(expected), abs=1e-4)


def test_a_cache_can_be_emptied_where_a_document_ends(lab: Lab, tmp_path: Path) -> None:
    """At an empty line, which here stands after every seventh."""
    lines = (lab.folder / "test.txt").read_text().splitlines()
    broken = [line + "\n" * (1 + (n % 7 == 6)) for n, line in enumerate(lines)]
    (tmp_path / "documents.txt").write_text("".join(broken))
    must(
        *("fairseq-preprocess", "--only-source", "--srcdict", lab.data / "dict.txt"),
        *("--testpref", tmp_path / "documents.txt", "--destdir", tmp_path / "bin"),
    )
    words = [*COUNTING, "--score-table", tmp_path / "table.npz"]
    world = Lab(tmp_path)
    world.checkpoint().parent.symlink_to(lab.checkpoint().parent)
    losses = []
    for reset in ([], ["--cache-reset"]):
        found = results(world, tmp_path, *words, *reset)
        table = read_table(tmp_path / "table.npz")
        tokens, eos = table["token"].tolist(), 2
        ends = [n for n in range(2, len(tokens)) if tokens[n - 2 : n] == [eos, eos]]
        expected = counted(tokens, 50, [0, *ends] if reset else [0])
        losses.append(bits(mixed(table["lm"], expected, 0.3)))
        assert found["loss"] == pytest.approx(losses[-1], abs=1e-4)
    assert losses[0] != pytest.approx(losses[1], abs=1e-3)


def test_a_second_language_model(lab: Lab, tmp_path: Path) -> None:
    """Another of the checkpoints, and what it says by itself."""
    tables = {name: tmp_path / f"{name}.npz" for name in ("both", "second")}
    flags = ["--experts", "lm2", "--expert-lm", lab.checkpoint("plain"), "--expert-lm-lmbda", 0.4]
    found = results(lab, tmp_path, *flags, "--score-table", tables["both"])
    lab.evaluate("test", "--score-table", tables["second"], model="plain")
    both, second = (read_table(file) for file in tables.values())
    np.testing.assert_allclose(both["lm2"][:, 0], second["lm"], atol=1e-5)
    expected = mixed(both["lm"], second["lm"], 0.4)
    assert found["loss"] == pytest.approx(bits(expected), abs=1e-4)
    assert found["mixture_from"] == "given"


def test_several_datastores(lab: Lab, tuned: Tuned, copy: Path, tmp_path: Path) -> None:
    """Two with the same entries are one with twice the weight; each is an expert."""
    one = tuned.store
    given = ["--knnlm", *K, "--knn-temp", 2]
    file = tmp_path / "table.npz"
    two = ["--dstore-filename", f"{one}:{copy}", "--lmbda", 0.2, "--score-table", file]
    found = results(lab, tmp_path, *given, *two)
    expected = results(lab, tmp_path, *given, "--dstore-filename", one, "--lmbda", 0.4)
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert found["mixed"] == ["knn", "knn2"]
    assert found["mixture_from"] == "given"
    assert found["entries"] == 2 * expected["entries"]
    table = read_table(file)
    np.testing.assert_array_equal(table["knn"], table["knn2"])
    # What was fitted for one of them does not hold for both.
    with pytest.raises(TableError, match="another datastore"):
        lab.evaluate("test", "--knnlm", *K, "--dstore-filename", f"{one}:{copy}")


def test_several_datastores_are_tuned_together(
    lab: Lab, tuned: Tuned, copy: Path, tmp_path: Path
) -> None:
    """The calibration lies in the first, beside that of the first alone, which stays."""
    both = ["--dstore-filename", f"{copy}:{tuned.store}", "--knnlm", *K]
    table = tmp_path / "valid.npz"
    lab.evaluate("valid", *both, "--mixer", "none", "--score-table", table)
    must("fairseq-knnlm", "tune", "--dstore", copy, "--score-table", table)
    found = results(lab, tmp_path, *both, "--experts", "knn", "--mixer", "gate", split="valid")
    assert found["mixed"] == ["knn", "knn2"]
    fingerprint = open_datastore(copy).fingerprint
    fitted = read_calibration(copy / "calibration.json", [fingerprint, fingerprint])
    assert fitted is not None
    stack = fitted.find(["knn", "knn2"], "gate")
    assert stack is not None
    alone = read_calibration(copy / "calibration.json", [fingerprint])
    assert alone is not None
    assert alone.best.name == tuned.calibration.best.name
    expected = mixture_losses(read_table(table), stack.mixer).mean() / math.log(2)
    assert found["loss"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("experts", ["knn", "cache"])
def test_nobody_is_asked_where_nothing_is_mixed(lab: Lab, datastore: Path, experts: str) -> None:
    """There is no setting to ask an expert for."""
    memory = ["--knnlm", "--dstore-filename", datastore, "--k", 8, "--experts", experts]
    found = lab.evaluate("test", *memory, "--mixer", "none")
    assert found == lab.evaluate("test")
