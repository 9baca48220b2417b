"""A datastore saved in blocks is the same whoever saved which of them, stopped or not."""

from __future__ import annotations

import logging
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_calls import Capture, say
from conftest import Lab, must

from fairseq_knnlm.cli import main
from fairseq_knnlm.datastore import DatastoreWriter, open_datastore, read_documents
from fairseq_knnlm.errors import ConfigError, DatastoreError

#: Some 230 entries, in six blocks.
BLOCKS = ["--block-rows", 64]
COUNT = 6


def saving(path: Path, *flags: object) -> list[object]:
    return ["--save-knnlm-dstore", "--dstore-mmap", path, *BLOCKS, *flags]


@pytest.fixture(scope="session")
def saved(lab: Lab) -> Path:
    """Of one process that was not stopped."""
    path = lab.folder / "in-blocks"
    lab.evaluate("valid", *saving(path))
    return path


def same(path: Path, saved: Path) -> bool:
    """Every byte as it was written, and the same as in the other."""
    return open_datastore(path, verify=True).fingerprint == open_datastore(saved).fingerprint


def rest(lab: Lab, path: Path, *flags: object) -> None:
    """A run that finds nothing to read ends by itself."""
    try:
        lab.evaluate("valid", *saving(path, *flags))
    except SystemExit as ended:
        assert not ended.code


def test_it_holds_what_one_block_holds(lab: Lab, saved: Path, tmp_path: Path) -> None:
    """But for the last digits of the keys, since batches are cut at the blocks."""
    lab.evaluate("valid", "--save-knnlm-dstore", "--dstore-mmap", tmp_path / "one")
    one, store = open_datastore(tmp_path / "one"), open_datastore(saved)
    assert len(store.blocks) == COUNT and not one.blocks
    assert all(len(open_datastore(block.path)) <= 64 + 8 for block in store.blocks)
    assert np.array_equal(store.values, one.values)
    np.testing.assert_allclose(np.array(store.keys), np.array(one.keys), rtol=2e-3, atol=2e-3)
    ours, theirs = read_documents(store), read_documents(one)
    assert ours is not None and theirs is not None
    assert np.array_equal(ours.starts, theirs.starts)


@pytest.mark.parametrize("shards", [2, 3, COUNT])
def test_processes_share_the_blocks(lab: Lab, saved: Path, tmp_path: Path, shards: int) -> None:
    for number in random.Random(shards).sample(range(shards), shards):
        with pytest.raises(DatastoreError):
            open_datastore(tmp_path / "store")
        flags = ["--num-shards", shards, "--shard-id", number]
        lab.evaluate("valid", *saving(tmp_path / "store", *flags))
    assert same(tmp_path / "store", saved)


def test_processes_at_the_same_time(lab: Lab, saved: Path, tmp_path: Path) -> None:
    """As the commands that people type; the last of them joins the blocks."""
    started = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "fairseq_knnlm.cli", "save", str(lab.data)),
                *("--path", str(lab.checkpoint()), "--gen-subset", "valid"),
                *("--dstore", str(tmp_path / "store"), "--tokens-per-sample", "16"),
                *("--context-window", "8", "--sample-break-mode", "none", "--cpu"),
                *("--max-tokens", "64"),
                *("--block-rows", "64", "--num-shards", "2", "--shard-id", str(number)),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert sum(f"entries in {tmp_path / 'store'}, {COUNT} blocks" in text for text in said) == 1
    assert same(tmp_path / "store", saved)


@pytest.mark.parametrize("written", [1, 5, 12])
def test_it_goes_on_where_it_was_stopped(
    lab: Lab,
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    written: int,
) -> None:
    path, write, count = tmp_path / "store", DatastoreWriter.write, []

    def stop(writer: DatastoreWriter, *entries: np.ndarray) -> None:
        count.append(len(entries[0]))
        if len(count) > written:
            raise OSError(28, "No space left on device")
        write(writer, *entries)

    with monkeypatch.context() as patched:
        patched.setattr("fairseq_knnlm.runs.save_blocks.DatastoreWriter.write", stop)
        with pytest.raises(OSError, match="No space"):
            lab.evaluate("valid", *saving(path), "--max-tokens", 16)
    there = sorted(folder.name for folder in path.glob("blocks/[!.]*"))
    assert len(there) < COUNT
    kept = [(path / "blocks" / name / "keys.npy").stat().st_ino for name in there]
    caplog.set_level(logging.INFO)
    lab.evaluate("valid", *saving(path), "--max-tokens", 16)
    assert ("going on with" in caplog.text) is bool(there)
    assert kept == [(path / "blocks" / name / "keys.npy").stat().st_ino for name in there]
    assert {file.name for file in path.iterdir()} == {"blocks", "manifest.json"}
    whole = tmp_path / "whole"
    lab.evaluate("valid", *saving(whole), "--max-tokens", 16)
    assert same(path, whole)


def test_killed_and_gone_on_with(lab: Lab, saved: Path, tmp_path: Path) -> None:
    """A process that is killed outright once its second block is there."""
    path = tmp_path / "store"
    words = ["-m", "fairseq_cli.eval_lm", *lab.command("valid", *saving(path))]
    process = subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not (path / "blocks" / "000001").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not (path / "manifest.json").exists():  # it was not faster than that
        rest(lab, path)
    assert same(path, saved)
    assert not list(path.rglob(".*"))


def test_a_damaged_block_is_made_again(
    lab: Lab, saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "store"
    lab.evaluate("valid", *saving(path, "--num-shards", 2, "--shard-id", 0))
    file = path / "blocks" / "000002" / "keys.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    rest(lab, path)
    assert "making" in caplog.text and "again" in caplog.text
    assert same(path, saved)


def test_joined_by_hand(
    lab: Lab, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the last process was stopped between its last block and the joining."""
    path = tmp_path / "store"
    lab.evaluate("valid", *saving(path, "--num-shards", 2, "--shard-id", 0))
    assert main(["save", "--join", str(path)]) == 1
    assert "3 missing, the first is 000001" in capsys.readouterr().err
    lab.evaluate("valid", *saving(path, "--num-shards", 2, "--shard-id", 1))
    plan = (path / "manifest.json").read_bytes()
    assert same(path, saved) and plan
    assert main(["save", "--join", str(path)]) == 1
    assert "making.json" in capsys.readouterr().err


def test_more_shards_than_blocks(lab: Lab, tmp_path: Path) -> None:
    for flags in (["--num-shards", 7], ["--num-shards", 2, "--block-rows", 10**6]):
        with pytest.raises(ConfigError, match="more shards than blocks"):
            lab.evaluate("valid", *saving(tmp_path / "store", *flags))
        assert not list(tmp_path.rglob("*.json"))  # nothing is in the making that would not end


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--dstore-fp32"], "key_dtype"),
        (["--context-window", 0, "--tokens-per-sample", 8], "origin.context.context_window"),
        (["--block-rows", 32], "starts"),
        (["--knn-keytype", "decoder_output"], "origin.key_type"),
        (["--max-tokens", 48], "origin.context.max_tokens"),
        (["--batch-size", 2], "origin.context.batch_size"),
        (["--fp16"], "origin.context.precision"),
    ],
)
def test_another_making_is_refused(
    lab: Lab, tmp_path: Path, flags: list[object], says: str
) -> None:
    path = tmp_path / "store"
    lab.evaluate("valid", *saving(path, "--num-shards", 2, "--shard-id", 0))
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    with pytest.raises(DatastoreError) as caught:
        lab.evaluate("valid", *saving(path), *flags)
    assert "of another making" in str(caught.value) and says in str(caught.value)
    assert before == {file: file.stat().st_mtime_ns for file in path.rglob("*")}


def test_results_of_a_part_are_refused(lab: Lab, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "store"
    lab.evaluate("valid", *saving(path, "--num-shards", 2, "--shard-id", 0))
    with pytest.raises(ConfigError, match="--results-json would hold a part"):
        lab.evaluate("valid", *saving(path), "--results-json", tmp_path / "r.json")
    rest(lab, path)
    assert same(path, saved)


STREAM = ["--no-save-keys", "--recipe", "IVF4,PQ4x4fsr"]


@pytest.fixture(scope="session")
def streamed(lab: Lab) -> Path:
    """Without keys, whose index lies in pieces; of one process that was not stopped."""
    path = lab.folder / "streamed-in-blocks"
    lab.evaluate("valid", *saving(path, *STREAM))
    return path


def every_byte(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_streamed_by_processes_that_share_the_blocks(
    lab: Lab, streamed: Path, tmp_path: Path
) -> None:
    """The index too is the same to the byte, whoever trained it."""
    for number in (2, 0, 1):
        flags = ["--num-shards", 3, "--shard-id", number]
        lab.evaluate("valid", *saving(tmp_path / "store", *STREAM, *flags))
    assert every_byte(tmp_path / "store") == every_byte(streamed)


@pytest.mark.parametrize("spoil", ["piece", "block"])
def test_streamed_and_gone_on_with(lab: Lab, streamed: Path, tmp_path: Path, spoil: str) -> None:
    """Where a block is missing, or its piece is damaged."""
    path = tmp_path / "store"
    lab.evaluate("valid", *saving(path, *STREAM, "--num-shards", 2, "--shard-id", 0))
    if spoil == "piece":
        (piece,) = (path / "blocks" / "000002").glob("piece-*.npy")
        piece.write_bytes(piece.read_bytes().replace(b"NUMPY", b"NUMPI"))
    else:
        shutil.rmtree(path / "blocks" / "000002")
    rest(lab, path, *STREAM)
    assert every_byte(path) == every_byte(streamed)


@pytest.mark.parametrize("kind", ["kept", "streamed"])
def test_the_command_that_info_names_goes_on(
    lab: Lab, saved: Path, streamed: Path, tmp_path: Path, kind: str, capsys: Capture
) -> None:
    path, flags = tmp_path / "store", STREAM if kind == "streamed" else []
    lab.evaluate("valid", *saving(path, *flags, "--num-shards", 2, "--shard-id", 1))
    looked_at = say(capsys, "verify", "--dstore", path)
    assert "3 of 6 blocks are there of what is being made" in looked_at
    if kind == "streamed":
        assert "IVF4,PQ4x4fsr" in looked_at and "piece-" in looked_at
    said = say(capsys, "info", "--dstore", path)
    assert "in making    3 of 6 blocks are there" in said
    (command,) = [line.split("go on with")[1] for line in said.splitlines() if "go on with" in line]
    known = {"DATA": str(lab.data), "CKPT": str(lab.checkpoint())}
    _, *words = [known.get(word, word) for word in shlex.split(command)]
    must(sys.executable, "-m", "fairseq_knnlm.cli", *words, "--cpu")
    assert every_byte(path) == every_byte(streamed if kind == "streamed" else saved)


def test_streamed_and_evaluated(lab: Lab, streamed: Path, tmp_path: Path) -> None:
    """With full keys in all lists, the figures are those of keys in float32 and exact search."""
    full = ["--no-save-keys", "--recipe", "IVF4,Flat"]
    lab.evaluate("valid", *saving(tmp_path / "streamed", *full))
    lab.evaluate("valid", *saving(tmp_path / "kept", "--dstore-fp32"))
    must(sys.executable, "-m", "fairseq_knnlm.cli", "build-index", "--dstore", tmp_path / "kept")
    losses = [
        lab.evaluate(
            "test", "--knnlm", "--dstore-filename", tmp_path / name, "--k", 50, "--lmbda", 0.3, *all
        )["loss"]
        for name, all in (("streamed", ["--probe", 4]), ("kept", []))
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_another_recipe_is_another_making(lab: Lab, tmp_path: Path) -> None:
    path = tmp_path / "store"
    lab.evaluate("valid", *saving(path, *STREAM, "--num-shards", 2, "--shard-id", 0))
    for flags, says in (([], "key_dtype"), (["--no-save-keys", "--recipe", "IVF4,SQ8"], "recipe")):
        with pytest.raises(DatastoreError, match=says):
            lab.evaluate("valid", *saving(path, *flags))


def test_what_its_last_digits_depend_on_is_said(lab: Lab, saved: Path) -> None:
    """Each block says which processor made it; the whole is the same, whichever that was."""
    store = open_datastore(saved)
    assert store.manifest.origin.context == {
        "tokens_per_sample": 8,
        "context_window": 8,
        "sample_break_mode": "none",
        "max_tokens": 64,
        "batch_size": None,
        "add_bos_token": 0,
        "precision": "float32",
    }
    assert "processor" not in store.manifest.origin.versions
    block = open_datastore(store.blocks[0].path).manifest.origin
    capability = torch.backends.cpu.get_cpu_capability()
    assert block.versions["processor"].endswith(f", {capability}")
    assert block.context == store.manifest.origin.context


def test_evaluated_as_one(lab: Lab, saved: Path, tmp_path: Path) -> None:
    """The figures of a kNN-LM with exact search, to the last digit those of one block's keys."""
    store = open_datastore(saved)
    writer = DatastoreWriter(tmp_path / "one", len(store), 16, store.manifest.origin)
    writer.write(np.arange(len(store)), np.array(store.keys), store.values)
    one = writer.publish()
    losses = []
    for path in (saved, one):
        must(sys.executable, "-m", "fairseq_knnlm.cli", "build-index", "--dstore", path)
        flags = ["--knnlm", "--dstore-filename", path, "--k", 50, "--lmbda", 0.3]
        losses.append(lab.evaluate("test", *flags, "--knn-sim-func", "l2")["loss"])
    assert losses[0] == losses[1]
