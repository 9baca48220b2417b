"""Subcommands of ``fairseq-knnlm`` in this process, and what they are given in the tests."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import random_entries, write_store

from fairseq_knnlm import cli
from fairseq_knnlm.calibration.stored import Calibration, FittedMixture, write_calibration
from fairseq_knnlm.calibration.writer import ScoreTableWriter
from fairseq_knnlm.datastore import Datastore, Documents, write_documents
from fairseq_knnlm.experts.kneser_ney import NGramModel
from fairseq_knnlm.experts.ngram_file import save_counts
from fairseq_knnlm.mixture.components import LM, Component
from fairseq_knnlm.mixture.mixers import Fixed

#: Of the datastores that are made here.
ROWS, WIDTH = 400, 8
#: Fingerprint of the language model of the tables and calibrations that are made here.
MODEL = "m" * 64

Capture = pytest.CaptureFixture[str]


def call(*words: object) -> int:
    """The exit code of a command."""
    before = list(logging.root.handlers), logging.root.level
    try:
        return cli.main([str(word) for word in words])
    finally:  # it sets up logging for a process of its own
        logging.root.handlers[:], logging.root.level = before


def say(capsys: Capture, *words: object) -> str:
    """What a command that succeeds prints."""
    capsys.readouterr()  # of what it was given, made before
    code = call(*words)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def refuse(capsys: Capture, *words: object) -> str:
    """What a command that fails says, on standard error and nowhere else."""
    capsys.readouterr()  # of what it was given, made before
    code = call(*words)
    captured = capsys.readouterr()
    assert code == 1
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    return captured.err


def said_and_wrong(capsys: Capture, code: int, *words: object) -> tuple[str, str]:
    """What a command prints, and what it ends with."""
    capsys.readouterr()  # of what it was given, made before
    assert call(*words) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


def small_store(folder: Path) -> Datastore:
    return write_store(folder / "store", *random_entries(ROWS, WIDTH), dtype="float16")


def indexed_store(folder: Path, capsys: Capture) -> Datastore:
    store = small_store(folder)
    say(capsys, "build-index", "--dstore", store.path, "--recipe", "IVF8,Flat", "--probe", 4)
    return store


def whole_store(folder: Path, capsys: Capture) -> Datastore:
    """With index, calibration, n-grams, documents and a score table."""
    store = indexed_store(folder, capsys)
    write_calibration(store.calibration_path, calibration(store.fingerprint))
    save_counts(NGramModel.count(store.values, 50, 3), store.ngram_path, store.fingerprint)
    write_documents(store, documents(store))
    write_table(store.path / "valid.npz", store.fingerprint)
    return store


def documents(store: Datastore) -> Documents:
    """Every line of its text as one."""
    begins = np.flatnonzero(np.asarray(store.values[:-1]) == 2) + 1
    return Documents(np.array([0, *begins]), len(store), eos=2, boundary=".")


def legacy_store(folder: Path) -> Path:
    """A datastore of urvashik/knnlm: its prefix."""
    keys, values = random_entries(ROWS, WIDTH)
    keys.astype(np.float16).tofile(folder / "old_keys.npy")
    values.astype(np.int16).tofile(folder / "old_vals.npy")
    return folder / "old"


def calibration(datastore: str) -> Calibration:
    """The language model alone, and neighbours that lower its perplexity."""
    alone = FittedMixture((), Fixed((LM,), (1.0,)), 150.0, 7.2, 151.0)
    knn = Component("knn", {"suffix": 0, "k": 0, "temperature": 12.0})
    mixed = FittedMixture(("knn",), Fixed((LM, knn), (0.875, 0.125)), 120.25, 6.9, 121.0)
    fitted_on = {"split": "valid", "tokens": 1000, "chosen_on": 100, "held_out": 100, "seed": 0}
    fitted_on["context"] = {}
    stacks = (alone, mixed)
    return Calibration((datastore,), MODEL, fitted_on, {"knn": {"k": 8}}, 150.0, stacks, 1)


def write_table(
    path: Path,
    seal: str,
    *,
    helpful: bool = True,
    split: str = "valid",
    own: bool = False,
    **card: Any,
) -> Path:
    """960 tokens; the neighbours know half of them for certain at temperature 2, or nothing."""
    rows = np.arange(960)
    lm = np.full(960, -2.0, np.float32)
    sharp = np.where(rows % 2, 0.0, -np.inf).astype(np.float32)
    other = lm - 1
    writer = ScoreTableWriter(path)
    columns = np.stack([other, sharp if helpful else other], axis=1)
    distances = 1 + np.random.default_rng(1).random((960, 2), np.float32)
    if own:
        distances[::2, 0] = 0
    experts = {} if card.get("experts") == {} else {"knn": columns}
    ids = np.zeros((2, 960), np.int32)
    named = {"row": rows, "token": ids[0], "context": ids[1], "lm": lm}
    writer.write({**named, **experts, "knn_distances": distances})
    settings = [{"suffix": 0, "k": 0, "temperature": t} for t in (1.0, 2.0)]
    writer.publish(
        {
            "datastores": [seal],
            "model": MODEL,
            "split": split,
            "k": 8,
            "experts": {"knn": settings},
            "described": {"knn": {"k": 8, "index": "Flat"}},
            "features": ["knn_distances"],
        }
        | card
    )
    return path
