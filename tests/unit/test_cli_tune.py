"""``fairseq-knnlm tune``: a calibration from a score table."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_calls import Capture, refuse, said_and_wrong, say, small_store, write_table
from stores import write_compressed

from fairseq_knnlm.calibration import curves, search
from fairseq_knnlm.calibration.stored import read_calibration
from fairseq_knnlm.cli import tune
from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.errors import TableError
from fairseq_knnlm.mixture.mixers import Fixed


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    return small_store(tmp_path)


def reads(folder: Path) -> list[object]:
    """``--data`` and ``--path``, of files that are there, for who does not read them."""
    data, model = folder / "data-bin", folder / "model.pt"
    data.mkdir()
    for file in (data / "dict.txt", data / "valid.idx", data / "valid.bin", model):
        file.write_text("text")
    return ["--data", data, "--path", model]


def test_tune_stores_the_fit(store: Datastore, tmp_path: Path, capsys: Capture) -> None:
    """Half the tokens are certain at temperature 2. With a = exp(-2) the loss is least where
    0.5 (1 - a) / (lambda + (1 - lambda) a) = 0.5 / (1 - lambda).
    """
    table = write_table(tmp_path / "valid.npz", store.fingerprint)
    said = say(capsys, "tune", "--dstore", store.path, "--score-table", table)
    fitted = read_calibration(store.calibration_path, [store.fingerprint])
    assert fitted is not None
    stack = fitted.find(["knn"], "fixed")
    assert stack is not None
    assert isinstance(stack.mixer, Fixed)
    a = np.exp(-2)
    assert stack.mixer.weights[1] == pytest.approx((1 - 2 * a) / (2 * (1 - a)), abs=1e-6)
    assert stack.mixer.components[1].setting["temperature"] == 2.0
    assert "valid, 960 tokens; figures are of the 96 that nothing was fitted or chosen on" in said
    assert f"| language model alone | {np.exp(2):>10.2f} |        |" in said
    change = f"{stack.perplexity / np.exp(2) - 1:+.1%}"
    assert f"| knn, fixed           | {stack.perplexity:>10.2f} | {change} |" in said
    assert said.count("<- used") == 1
    assert str(store.calibration_path) in said
    assert "nothing helps" not in said


def test_tune_says_where_nothing_helps(store: Datastore, tmp_path: Path, capsys: Capture) -> None:
    table = write_table(tmp_path / "valid.npz", store.fingerprint, helpful=False)
    said = say(capsys, "tune", "--dstore", store.path, "--score-table", table)
    assert "language model alone" in next(x for x in said.splitlines() if "<- used" in x)
    assert "nothing helps this model on this text: evaluation will use it alone" in said
    assert "calibration  language model alone, fitted on valid" in say(
        capsys, "info", "--dstore", store.path
    )


def test_what_goes_wrong_beside_other_fits_is_told_once(
    store: Datastore, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write_table(tmp_path / "valid.npz", store.fingerprint)
    every = search.expert_sets

    def fails(*_: object) -> None:
        raise TableError("no good table")

    monkeypatch.setattr(search, "expert_sets", lambda experts: every(experts) * 9)
    monkeypatch.setattr(search, "fit_skip", fails)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    words = ("tune", "--dstore", store.path, "--score-table", table)
    out, wrong = said_and_wrong(capsys, 1, *words)
    assert not out
    lines = [line for line in wrong.splitlines() if line.strip() and "fitting" not in line]
    assert lines == ["error: no good table"]
    assert not store.calibration_path.exists()


def test_tune_draws_curves_where_it_can(
    store: Datastore,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = write_table(tmp_path / "valid.npz", store.fingerprint)
    command = ["tune", "--dstore", store.path, "--score-table", table]
    drawn: list[Path] = []
    monkeypatch.setattr(curves, "draw_curves", lambda table, path: not drawn.append(path))
    assert f"curves: {store.path / 'calibration.png'}\n" in say(capsys, *command)
    assert "x.png" in say(capsys, *command, "--plot", tmp_path / "x.png")
    assert drawn == [store.path / "calibration.png", tmp_path / "x.png"]
    monkeypatch.setattr(curves, "draw_curves", lambda table, path: False)
    assert "no curves: they need matplotlib" in say(capsys, *command)


def test_curves_that_fail_cost_nothing_else(
    store: Datastore,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are drawn last, whatever matplotlib and the disk have to say."""

    def fail(*_: object) -> bool:
        assert store.calibration_path.is_file()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(curves, "draw_curves", fail)
    table = write_table(tmp_path / "valid.npz", store.fingerprint)
    said = say(capsys, "tune", "--dstore", store.path, "--score-table", table)
    assert "no curves: error: the disk is full" in said
    assert read_calibration(store.calibration_path, [store.fingerprint]) is not None


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--plot", "FOLDER"], "--plot cannot be written"),
        (["--plot", "FOLDER/calibration.json"], "the calibration and --plot name the same file"),
        (["--plot", "/dev/null"], "--plot cannot be written"),
        (["--score-table", "FOLDER"], "--score-table cannot be written"),
        (["--score-table", "T.npz", "--plot", "T.npz"], "--score-table and --plot name the same"),
    ],
)
def test_what_tune_writes_is_tried_before_the_table_is_made(
    store: Datastore,
    tmp_path: Path,
    flags: list[str],
    says: str,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tune, "evaluate", lambda *_: pytest.fail("hours of work"))
    typed = [flag.replace("FOLDER", str(store.path)) for flag in flags]
    typed = [str(store.path / flag) if flag == "T.npz" else flag for flag in typed]
    flags = [*reads(tmp_path), *typed]
    assert says in refuse(capsys, "tune", "--dstore", store.path, *flags)


def test_a_plot_does_not_replace_the_table(
    store: Datastore, tmp_path: Path, capsys: Capture
) -> None:
    table = write_table(tmp_path / "valid.npz", store.fingerprint)
    before = table.read_bytes()
    command = ["tune", "--dstore", store.path, "--score-table", table, "--plot", table]
    assert "--plot names the score table" in refuse(capsys, *command)
    assert table.read_bytes() == before


def test_a_second_tune_of_one_datastore_is_refused(
    store: Datastore, tmp_path: Path, capsys: Capture
) -> None:
    """While a living process fits one; a lock that is left behind stops nobody."""
    table = write_table(tmp_path / "valid.npz", store.fingerprint)
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom fairseq_knnlm.files import Claim\n"
        "claim = Claim(Path(sys.argv[1]))\nprint('claimed', flush=True)\ntime.sleep(60)"
    )
    claims = [sys.executable, "-c", script, str(store.calibration_path)]
    with subprocess.Popen(claims, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        command = ["tune", "--dstore", store.path, "--score-table", table]
        assert "another process is writing" in refuse(capsys, *command)
        other.kill()
    say(capsys, *command)


def test_tune_of_several_leaves_the_calibration_of_one(
    store: Datastore, tmp_path: Path, capsys: Capture
) -> None:
    one = write_table(tmp_path / "one.npz", store.fingerprint)
    say(capsys, "tune", "--dstore", store.path, "--score-table", one)
    before = store.calibration_path.read_bytes()
    seals = [store.fingerprint, "e" * 64]
    two = write_table(tmp_path / "two.npz", seals[0], datastores=seals, datastore="news:books")
    said = say(capsys, "tune", "--dstore", store.path, "--score-table", two)
    assert "written to " in said
    assert store.calibration_path.read_bytes() == before
    both = read_calibration(store.calibration_path, seals)
    assert both is not None
    assert both.names == ("news", "books")
    said = say(capsys, "info", "--dstore", store.path)
    assert "calibration  knn" in said
    assert "calibration  also of datastore" in said
    assert "news:books" in said


def test_a_merged_datastore_is_tuned_without_ngrams(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which it no longer has the text for; whoever asks for them is still told so by evaluation."""
    store = write_compressed(tmp_path / "merged")
    asked: list[str] = []

    def evaluate(_: str, flags: Sequence[str]) -> None:
        asked.append(flags[flags.index("--experts") + 1])
        write_table(store.path / "valid.npz", store.fingerprint)

    monkeypatch.setattr(tune, "evaluate", evaluate)
    command = ["tune", "--dstore", store.path, *reads(tmp_path)]
    assert "n-grams are left out" in say(capsys, *command)
    assert "n-grams" not in say(capsys, *command, "--experts", "knn,ngram")
    assert asked == ["knn,cache,suffix", "knn,ngram"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [([], "--score-table FILE.npz"), (["--data", "data-bin"], "--data needs --path")],
)
def test_tune_needs_a_table_or_what_makes_one(
    store: Datastore, flags: list[str], says: str, capsys: Capture
) -> None:
    assert says in refuse(capsys, "tune", "--dstore", store.path, *flags)


def test_tune_refuses_a_table_of_another_datastore(
    store: Datastore, tmp_path: Path, capsys: Capture
) -> None:
    table = write_table(tmp_path / "valid.npz", "e" * 64)
    said = refuse(capsys, "tune", "--dstore", store.path, "--score-table", table)
    assert "not of this datastore" in said
    assert f"expected: datastore {store.fingerprint[:12]}" in said
    assert "found:    datastore eeeeeeeeeeee" in said
    assert not store.calibration_path.exists()


def test_tune_refuses_what_is_no_table(store: Datastore, tmp_path: Path, capsys: Capture) -> None:
    said = refuse(capsys, "tune", "--dstore", store.path, "--score-table", tmp_path / "x.npz")
    assert "no score table" in said
