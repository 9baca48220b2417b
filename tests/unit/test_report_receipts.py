"""``replay`` of what ``report`` wrote: confirmed where all is as it was, and nowhere else."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_calls import Capture, calibration, refuse, said_and_wrong, say, small_store, write_table

from fairseq_knnlm.calibration.stored import write_calibration
from fairseq_knnlm.mixture.components import LM, Component
from fairseq_knnlm.mixture.mixers import Fixed
from fairseq_knnlm.runs.receipt import sealed


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Path:
    """Of a report on a table beside a datastore, by relative paths."""
    store = small_store(tmp_path)
    known = calibration(store.fingerprint)
    alone, mixed = known.mixtures
    knn = Component("knn", {"suffix": 0, "k": 0, "temperature": 2.0})
    mixed = replace(mixed, mixer=Fixed((LM, knn), (0.5, 0.5)))
    write_calibration(store.calibration_path, replace(known, mixtures=(alone, mixed)))
    monkeypatch.chdir(tmp_path)
    write_table(Path("test.npz"), store.fingerprint, split="test")
    words = ["report", "--dstore", "store", "--score-table", "test.npz"]
    say(capsys, *words, "--results-json", "report.json")
    return Path("report.json")


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Under a seal that is right."""
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(sealed(found)))


def test_it_names_the_files_with_their_bytes(results: Path) -> None:
    files = {file["of"]: file for file in json.loads(results.read_text())["receipt"]["table_files"]}
    assert set(files) == {"--score-table", "--calibration"}
    for name, path in (("--score-table", "test.npz"), ("--calibration", "store/calibration.json")):
        content = Path(path).read_bytes()
        assert files[name]["path"] == path and files[name]["bytes"] == len(content)
        assert files[name]["sha256"] == hashlib.sha256(content).hexdigest()


def test_what_is_as_it_was_is_confirmed(results: Path, capsys: Capture) -> None:
    said = say(capsys, "replay", results)
    assert "report.json: test, 960 tokens; its files are as they were" in said
    assert said.endswith("all measured again\nconfirmed\n")


@pytest.mark.parametrize("path", ["test.npz", "store/calibration.json", "report.json"])
def test_one_altered_byte_is_found(results: Path, path: str, capsys: Capture) -> None:
    content = bytearray(Path(path).read_bytes())
    content[len(content) // 2] ^= 1
    Path(path).write_bytes(content)
    said = refuse(capsys, "replay", results)
    assert path in said and said.count("expected:") == said.count("to do:") == 1


def test_what_moved_is_found_where_asked(results: Path, capsys: Capture) -> None:
    Path("elsewhere").mkdir()
    shutil.move("test.npz", "elsewhere/some.npz")
    said = refuse(capsys, "replay", results)
    assert "--score-table test.npz: gone" in said and "--search FOLDER finds it" in said
    said = say(capsys, "replay", results, "--search", "elsewhere")
    assert "--score-table test.npz: found at elsewhere/some.npz" in said
    assert said.endswith("confirmed\n")


@pytest.mark.parametrize(
    "name", ["perplexity", "base_loss", "loss_error", "tokens", "mixture", "conditions", "mixtures"]
)
def test_every_figure_is_compared(results: Path, name: str, capsys: Capture) -> None:
    def change(found: dict[str, Any]) -> None:
        if name == "mixtures":
            found[name][-1]["perplexity"] *= 1.001
        elif isinstance(found[name], (int, float)):
            found[name] *= 2
        else:
            del found[name]

    changed(results, change)
    _, said = said_and_wrong(capsys, 1, "replay", results)
    assert "are not what its files and flags come to" in said and f" {name} " in said


def test_a_receipt_names_both_files(results: Path, capsys: Capture) -> None:
    changed(results, lambda found: found["receipt"]["table_files"].pop())
    said = refuse(capsys, "replay", results)
    assert "report.json cannot be replayed" in said and said.count("expected:") == 1


def test_several_results(results: Path, capsys: Capture) -> None:
    """Each is gone through, and those that are not confirmed are named at the end."""
    shutil.copy(results, "a.json")
    changed(Path("a.json"), lambda found: found.update(perplexity=1.5))
    said, wrong = said_and_wrong(capsys, 1, "replay", "a.json", results, "nowhere.json")
    assert "a.json is not confirmed: the figures of a.json are not what" in said
    assert "report.json: test, 960 tokens" in said and said.count("\nconfirmed\n") == 1
    assert "nowhere.json is not confirmed" in said
    assert wrong.startswith("error: 2 of 3 results are not confirmed")
    assert "found:    a.json, nowhere.json" in wrong
    assert say(capsys, "replay", results, results).count("\nconfirmed\n") == 2
