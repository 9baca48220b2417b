"""What is refused of the flags before anything is opened, and what is named as doing nothing."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from stores import random_entries, write_store

from fairseq_knnlm.errors import ConfigError, DatastoreError, KnnlmError, OutputError
from fairseq_knnlm.experts.kind import Opened
from fairseq_knnlm.experts.registry import kind_of
from fairseq_knnlm.runs.opening import Memory
from fairseq_knnlm.runs.places import check_apart
from fairseq_knnlm.tasks.checks import check
from fairseq_knnlm.tasks.flags import KnnlmConfig, options_of
from fairseq_knnlm.tasks.idle import name_ignored
from fairseq_knnlm.tasks.loading import name_precision
from fairseq_knnlm.tasks.outputs import check_writes

NAN, INF = float("nan"), float("inf")
KNN = {"knnlm": True, "dstore_filename": "x"}
CACHE = {**KNN, "experts": "knn,cache"}
SAVE = {"save_knnlm_dstore": True, "dstore_mmap": "new"}


def flags(**given: Any) -> SimpleNamespace:
    """Flags as fairseq gives them, those left out at their defaults."""
    return SimpleNamespace(**{**vars(KnnlmConfig()), "tokens_per_sample": 8, **given})


def name_idle(cfg: SimpleNamespace, experts: list[str] | None, *, lists: bool = True) -> None:
    """Names what does nothing in a run with these experts, over an index with lists or without."""
    options, card = options_of(cfg), SimpleNamespace(nprobe=32 if lists else None)
    retriever = SimpleNamespace(index=SimpleNamespace(card=card))
    opened = {}
    for name in experts or ():
        kind = kind_of(name)
        opened[name] = Opened(name, kind, options.of(kind), retriever)
    name_ignored(cfg, options, None if experts is None else Memory((), None, opened))


def refused(**given: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check(flags(**given))
    message = str(caught.value)
    assert "expected:" in message and "found:" in message
    return message


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"k": 0}, ["--k counts neighbours", "1 or more"]),
        ({"k": -5}, ["--k", "-5"]),
        ({"k": 10**12}, ["--k", "1 to 2,147,483,647", "1,000,000,000,000"]),
        ({"k": 10**30}, ["--k counts"]),
        ({"probe": -3}, ["--probe counts lists", "-3"]),
        ({"probe": 0}, ["--probe", "1 or more"]),
        ({"probe": 2**31}, ["--probe"]),
        ({"dstore_size": 0}, ["--dstore-size counts entries", "1 or more"]),
        ({"dstore_size": -1}, ["--dstore-size"]),
        ({"dstore_size": 10**18}, ["--dstore-size"]),
        ({"lmbda": NAN}, ["--lmbda is a weight", "0 to 1", "nan"]),
        ({"lmbda": INF}, ["--lmbda"]),
        ({"lmbda": -0.1}, ["--lmbda"]),
        ({"knn_temp": NAN}, ["--knn-temp", "above 0", "nan"]),
        ({"knn_temp": INF}, ["--knn-temp", "inf"]),
        ({"knn_temp": 0.0}, ["--knn-temp"]),
        ({"knn_temp": -1.0}, ["--knn-temp"]),
        ({"knn_temp": 1e-300}, ["--knn-temp"]),
        ({"skip_searches": NAN}, ["--skip-searches is a share"]),
        ({"skip_searches": INF}, ["--skip-searches"]),
        ({"skip_searches": -0.1}, ["--skip-searches"]),
        ({"pointers": "replace", "pointer_min": 0}, ["--pointer-min", "1 or more"]),
        ({"pointers": "replace", "pointer_min": 10**12}, ["--pointer-min"]),
        ({"pointer_min": 4}, ["--pointers replace"]),
        ({"knn_device": "gpu"}, ["--knn-device names no device", "auto, cpu, cuda", "gpu"]),
        ({"knn_device": "cuda:"}, ["--knn-device"]),
        ({"knn_device": "cuda:-1"}, ["--knn-device"]),
        ({"knn_device": ""}, ["--knn-device is empty"]),
        ({"tokens_per_sample": 0}, ["--tokens-per-sample above --context-window"]),
        ({"tokens_per_sample": -4}, ["--context-window"]),
    ],
)
def test_numbers_and_names(given: dict[str, Any], words: list[str]) -> None:
    says = refused(**KNN, **given)
    assert all(word in says for word in words), says


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"cache_window": 0}, ["--cache-window counts tokens", "1 or more"]),
        ({"cache_window": 10**12}, ["--cache-window"]),
        ({"cache_theta": NAN}, ["--cache-theta is a sharpness", "nan"]),
        ({"cache_theta": INF}, ["--cache-theta"]),
        ({"cache_theta": -1.0}, ["--cache-theta", "0 or more"]),
        ({"cache_theta": 1e300}, ["--cache-theta"]),
        ({"cache_lmbda": NAN}, ["--cache-lmbda"]),
        ({"cache_lmbda": 2.0}, ["--cache-lmbda"]),
    ],
)
def test_numbers_of_the_cache(given: dict[str, Any], words: list[str]) -> None:
    says = refused(**CACHE, **given)
    assert all(word in says for word in words), says


@pytest.mark.parametrize("experts", ["", ",", ",,", "knn,", "knn,knn", "oracle", " "])
def test_experts(experts: str) -> None:
    assert "--experts" in refused(**{**KNN, "experts": experts})


@pytest.mark.parametrize(
    "name",
    [
        *("dstore_mmap", "dstore_filename", "indexfile", "expert_lm", "results_json"),
        *("score_table", "progress_file"),
    ],
)
def test_empty_paths(name: str) -> None:
    assert f"--{name.replace('_', '-')} is empty" in refused(**{**KNN, name: ""})


@pytest.mark.parametrize("names", ["a::b", ":a", "a:", ":"])
def test_empty_names_between_colons(names: str) -> None:
    assert "a colon separates datastores" in refused(knnlm=True, dstore_filename=names)


def test_a_path_with_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a:b").mkdir()
    assert "a colon separates datastores" in refused(knnlm=True, dstore_filename="a:b")
    with pytest.raises(OutputError, match="holds a colon"):
        trying("dstore_mmap", "c:d")


def test_the_same_datastore_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    Path("b").symlink_to("a")
    for names in ("a:a", "a:./a", "a:b", f"a:{tmp_path / 'a'}", "a:../" + tmp_path.name + "/a/"):
        assert "the same datastore twice" in refused(knnlm=True, dstore_filename=names), names
    check(flags(knnlm=True, dstore_filename="a:c"))


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ({**KNN, "expert_lm": "lm.pt", "experts": "knn"}, "--expert-lm"),
        ({**KNN, "lm_features": True}, "--lm-features"),
        ({**KNN, "dstore_mmap": "new"}, "--dstore-mmap"),
        ({**KNN, "dstore_fp32": True}, "--dstore-fp32"),
        ({**KNN, "experts": "knn", "cache_reset": True}, "--cache-reset"),
        ({**SAVE, "dstore_filename": "x"}, "--dstore-filename"),
        ({**SAVE, "indexfile": "x"}, "--indexfile"),
        ({**SAVE, "k": 8}, "--k"),
        ({**SAVE, "knn_temp": 2.0}, "--knn-temp"),
        ({**SAVE, "lmbda": 0.3}, "--lmbda"),
        ({**SAVE, "probe": 3}, "--probe"),
        ({**SAVE, "mixer": "gate"}, "--mixer"),
        ({**SAVE, "knn_device": "cpu"}, "--knn-device"),
        ({**SAVE, "expert_lm": "lm.pt"}, "--expert-lm"),
        ({**SAVE, "cache_window": 9}, "--cache-window"),
        ({**SAVE, "mmap_index": True}, "--mmap-index"),
        ({"k": 8}, "--k"),
        ({"lmbda": 0.3}, "--lmbda"),
        ({"indexfile": "x"}, "--indexfile"),
        ({"knn_sim_func": "dot"}, "--knn-sim-func"),
        ({"cache_reset": True}, "--cache-reset"),
        ({"lm_features": True, "score_table": "t.npz"}, "--lm-features"),
        ({"dstore_fp32": True}, "--dstore-fp32"),
        ({"max_bytes_per_key": 0, **SAVE, "no_save_keys": True}, "--max-bytes-per-key"),
        ({"recipe": "", **SAVE, "no_save_keys": True}, "--recipe"),
        ({"recipe": "Flat", **SAVE}, "--recipe"),
    ],
)
def test_flags_that_would_do_nothing(given: dict[str, Any], flag: str) -> None:
    assert flag in refused(**given)


@pytest.mark.parametrize(
    "given",
    [
        {},
        KNN,
        {**KNN, "k": 8, "lmbda": 0.3, "knn_temp": 1e-6, "probe": 3, "knn_device": "cuda:0,1"},
        {**KNN, "dstore_filename": "a:b", "expert_lm": "lm.pt", "cache_reset": True},
        {**CACHE, "cache_reset": True, "cache_theta": 0.0, "cache_window": 1},
        {**KNN, "experts": "knn, lm2", "expert_lm": "lm.pt", "expert_lm_lmbda": 1.0},
        {**KNN, "lm_features": True, "score_table": "t.npz"},
        {**SAVE, "dstore_fp16": True, "dstore_size": 9, "score_table": "t.npz"},
        {**SAVE, "no_save_keys": True, "probe": 3, "knn_device": "cpu", "recipe": "paper"},
    ],
)
def test_flags_that_are_right(given: dict[str, Any]) -> None:
    check(flags(**given))


def test_what_does_nothing_is_named_a_line_each(caplog: pytest.LogCaptureFixture) -> None:
    given = {**KNN, "k": 8, "dstore_size": 9, "dstore_fp16": True, "expert_lm": "x", "probe": 2}
    name_idle(flags(**given), ["knn"], lists=False)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 4
    for flag in ("--dstore-size", "--dstore-fp16", "--expert-lm", "--probe"):
        assert [flag in message for message in caplog.messages].count(True) == 1
    caplog.clear()
    name_idle(flags(**KNN, k=8), ["cache"])
    assert len(caplog.messages) == 1 and "--k does nothing" in caplog.text
    caplog.clear()
    name_idle(flags(**KNN, k=8, pointers="replace"), ["knn"])
    assert "at most k / 4 = 2" in caplog.text
    caplog.clear()
    name_idle(flags(**KNN, k=8, probe=2), ["knn", "knn2"])
    name_idle(flags(**SAVE, no_save_keys=True, knn_device="cpu"), None)
    name_precision(False, False, on_gpu=False)
    name_precision(True, False, on_gpu=True)
    assert not caplog.messages
    name_precision(True, True, on_gpu=False)
    assert len(caplog.messages) == 2


def test_legacy_flags_are_heeded_for_legacy_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    np.zeros(4).tofile(tmp_path / "old_keys.npy")
    np.zeros(4).tofile(tmp_path / "old_vals.npy")
    store = str(tmp_path / "old")
    name_idle(flags(knnlm=True, dstore_filename=store, dstore_size=4), ["knn"])
    assert not caplog.messages


OUTPUTS = ["dstore_mmap", "results_json", "score_table", "progress_file"]


def trying(name: str, path: object, **given: Any) -> None:
    """Tries one output of a run that writes it."""
    saving = {"save_knnlm_dstore": True} if name == "dstore_mmap" else {}
    asked = options_of(flags(**{**saving, name: str(path), **given}))
    check_writes(asked, {"--path": ["lm.pt"]})


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize(
    "path",
    ["folder", ".", "/", "/dev/null", "file/below", "n" * 300, "dangling", "closed/new", "lm.pt"],
)
def test_places_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for file in ("file", "lm.pt", "folder/file"):
        Path(file).write_text("here before")
    Path("dangling").symlink_to("nowhere/at/all")
    Path("closed").mkdir(mode=0o500)
    if path == "closed/new" and os.access("closed", os.W_OK):
        pytest.skip("this user may write everywhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((OutputError, DatastoreError)) as caught:
        trying(name, path)
    assert "expected:" in str(caught.value) and "found:" in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert Path("file").read_text() == Path("lm.pt").read_text() == "here before"


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_place_where_something_can(tmp_path: Path, name: str) -> None:
    trying(name, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_outputs_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From each other, from what is read, and from the parts of datastores."""
    monkeypatch.chdir(tmp_path)
    write_store(Path("store"), *random_entries(20, 4))
    Path("link.pt").symlink_to("lm.pt")
    Path("lm.pt").touch()
    for first, second in (("x", "x"), ("x", "./x"), ("new", "new/x")):
        with pytest.raises(KnnlmError):
            trying("results_json", second, save_knnlm_dstore=True, dstore_mmap=first)
    with pytest.raises(OutputError, match="--score-table name the same file"):
        trying("results_json", "x", score_table="y/../x")
    for inside in ("store/new", "store/keys.npy/new", "store"):
        with pytest.raises((OutputError, DatastoreError)):
            trying("dstore_mmap", inside)
    parts = ("manifest.json", "keys.npy", "knn.index", "knn.index.json", "calibration.json")
    for part in (*parts, "values.npy", "ngram.npz"):
        with pytest.raises(OutputError, match="a part of the datastore"):
            trying("results_json", f"store/{part}")
    for mine in ({"expert_lm": "link.pt"}, {"indexfile": "lm.pt"}):
        with pytest.raises(OutputError, match="write over what is read"):
            trying("score_table", "lm.pt", **mine)
    trying("score_table", "store/valid.npz")
    check_apart({"--plot": "store/calibration.png"}, {})
