"""The paper's headline experiment, and the text of an environment that it is made on."""

from __future__ import annotations

import importlib
import json
import random
import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT, must

SCRIPTS = ROOT / "examples" / "experiments"
PACKAGES = 60
MODEL = """
    --arch transformer_lm --decoder-layers 1 --decoder-attention-heads 2 --decoder-embed-dim 32
    --decoder-input-dim 32 --decoder-output-dim 32 --decoder-ffn-embed-dim 32
    --optimizer adam --lr 0.01 --tokens-per-sample 32 --sample-break-mode none --batch-size 4
    --cpu --num-workers 0 --no-epoch-checkpoints
"""
READING = "--tokens-per-sample 32 --sample-break-mode none --cpu"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty packages of 200 words; two of them belong to one release."""
    folder = tmp_path_factory.mktemp("library")
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefgh", k=4)) for _ in range(60)]
    for number in range(PACKAGES):
        (folder / f"package{number}").mkdir()
        lines = [" ".join(rng.choices(words, k=20)) for _ in range(10)]
        text = "\n\n".join([*lines, "The same everywhere."])
        (folder / f"package{number}" / "__init__.py").write_text(f'"""{text}"""\n')
    info = folder / "both-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: both\nVersion: 2.0\n")
    (info / "RECORD").write_text("package1/__init__.py,,\npackage2/__init__.py,,\n")
    return folder


def collect(library: Path, out: Path, *flags: object) -> dict[str, list[str]]:
    """The lines of each split."""
    words = [sys.executable, SCRIPTS / "installed_text.py", "--library", library, "--out", out]
    must(*words, "--held-out", 1000, *flags)
    splits = ("train", "valid", "test")
    return {split: (out / f"docstrings/{split}.txt").read_text().splitlines() for split in splits}


def test_packages_are_split_whole_and_recorded(library: Path, tmp_path: Path) -> None:
    lines = collect(library, tmp_path)
    card = json.loads((tmp_path / "packages.json").read_text())
    every = [line for split in lines.values() for line in split]
    assert len(every) == len(set(every))  # "The same everywhere." stands once
    for split, found in lines.items():
        words = sum(len(line.split()) for line in found)
        assert card["words"][split] == words
        assert sum(p["words"] for p in card["packages"] if p["split"] == split) == words
    names = [package["package"] for package in card["packages"]]
    assert len(names) == len(set(names))  # in one split each
    assert "both 2.0" in names
    assert not {"package1", "package2"} & set(names)
    assert 900 <= card["words"]["test"] <= 1000  # ten packages of 100 words, of their 203
    # Documents are shuffled, so no more than a part of the train text need be read.
    fewer = collect(library, tmp_path / "fewer", "--words", 500)
    assert fewer["test"] == lines["test"]
    assert fewer["train"] == lines["train"][: len(fewer["train"])]
    assert sum(len(line.split()) for line in fewer["train"]) == 500


@pytest.mark.slow
def test_headline_on_a_tiny_text(library: Path, tmp_path: Path) -> None:
    words = [sys.executable, SCRIPTS / "headline.py", "--library", library, "--out", tmp_path]
    words += ["--seeds", 1, "--updates", 6, "--points", 1, "--lm-part", "1/4"]
    words += ["--parts", "1/4", "1/1", "--held-out", 1000, "--vocabulary", 300, "--k", 16]
    words += [f"--{which}-flags={shlex.join(READING.split())}" for which in ("eval", "save")]
    words += [f"--train-flags={shlex.join(MODEL.split())}"]
    out = must(*words)
    found = json.loads((tmp_path / "headline.json").read_text())["found"]
    assert len(found) == 1
    for seed, one in enumerate(found, start=1):
        for part, rows in (("1-4", one["small"]), ("1-1", {"1/1": one["large"]})):
            for of, row in rows.items():
                label = f"{part}-seed{seed}"
                manifest = tmp_path / f"dstore-{label}-of-{of.replace('/', '-')}" / "manifest.json"
                whole = tmp_path / "pieces" / "docstrings" / "train.txt"
                text = tmp_path / f"{of.replace('/', '-')}.txt" if of != "1/1" else whole
                saved = text.read_text()
                entries = len(saved.split()) + len(saved.splitlines())
                assert json.loads(manifest.read_text())["rows"] == entries
                assert row["seconds"] > 0
                assert row["knn_fixed"] <= row["alone"] * 1.02
        # As many updates for both: the only checkpoint is the last, whose seconds are all.
        for model in ("small", "large"):
            note = tmp_path / f"lm-{'1-4' if model == 'small' else '1-1'}-seed{seed}.seconds"
            ((seconds, perplexity),) = one["trained"][model]
            assert seconds == pytest.approx(float(note.read_text()))
            alone = one["large"] if model == "large" else one["small"]["1/1"]
            assert perplexity == pytest.approx(alone["alone"], rel=1e-4)
    mean = found[0]["large"]["alone"]
    assert re.search(rf"LM of all, memory of all +\| +{mean:.2f} ", out)
    again = must(*words)  # finds everything there
    assert again.count("there already") == len(re.findall(r"^\[\d+/", again, re.MULTILINE))
    assert again.split("| test")[1] == out.split("| test")[1]


def test_a_cell_says_how_far_seeds_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    cell = importlib.import_module("headline").cell
    assert cell([120.0]) == "120.00"
    assert cell([119.0, 120.0, 121.0]) == "120.00 ± 1.00"  # of a sample: divided by two, not three
