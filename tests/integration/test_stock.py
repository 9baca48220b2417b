"""fairseq's own failures in our words, and commands that are told to end: real processes."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import PLUGIN, Lab, run

from fairseq_knnlm.errors import ConfigError, KnnlmError, ModelError
from fairseq_knnlm.tasks.stock import (
    check_batches,
    check_checkpoint,
    check_data,
    check_numbers,
    check_split,
    in_our_words,
)


def stock_numbers(**given: object) -> Namespace:
    """fairseq's configuration, as far as its numbers are checked."""
    flags = {
        "num_shards": 1,
        "shard_id": 0,
        "max_tokens": None,
        "batch_size": None,
        "num_workers": 1,
        "data_buffer_size": 10,
        "context_window": 0,
        "seed": 1,
        **given,
    }
    common = Namespace(seed=flags["seed"])
    world = Namespace(distributed_world_size=1)
    return Namespace(
        dataset=Namespace(**flags),
        common=common,
        eval_lm=Namespace(context_window=flags["context_window"]),
        distributed_training=world,
    )


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ({"num_shards": 2, "shard_id": 5}, "--shard-id"),
        ({"shard_id": -1}, "--shard-id"),
        ({"num_shards": 0}, "--num-shards"),
        ({"num_shards": -2}, "--num-shards"),
        ({"max_tokens": 0}, "--max-tokens"),
        ({"batch_size": -1}, "--batch-size"),
        ({"num_workers": -1}, "--num-workers"),
        ({"num_workers": 10**9}, "--num-workers"),
        ({"context_window": -3}, "--context-window"),
        ({"seed": -1}, "--seed"),
        ({"seed": 2**40}, "--seed"),
    ],
)
def test_numbers_that_fairseq_takes_as_they_come(given: dict[str, int], flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        check_numbers(stock_numbers(**given))
    check_numbers(stock_numbers(num_shards=6, shard_id=5, seed=0, max_tokens=1))


def test_data_and_splits(lab: Lab, tmp_path: Path) -> None:
    for spoil, says in (
        (lambda folder: (folder / "dict.txt").unlink(), "without dict.txt"),
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (lambda folder: (folder / "test.idx").unlink(), "no split test"),
        (lambda folder: (folder / "test.bin").write_bytes(b""), "cut off"),
        (lambda folder: os.truncate(folder / "test.idx", 20), "cut off"),
        (lambda folder: os.truncate(folder / "test.idx", 100), "cut off"),
        (lambda folder: os.truncate(folder / "test.bin", 20), "cut off"),
    ):
        folder = Path(shutil.copytree(lab.data, tmp_path / "data", dirs_exist_ok=True))
        check_data(str(folder))
        check_split(str(folder), "test")
        spoil(folder)
        with pytest.raises(ConfigError, match=says):
            check_data(str(folder))
            check_split(str(folder), "test")
        shutil.rmtree(folder, ignore_errors=True)


def test_checkpoints_named(lab: Lab) -> None:
    path = str(lab.checkpoint())
    check_checkpoint(path, one=True)
    check_checkpoint(f"{path}:{path}", one=False)
    for wrong in (None, "", f"{path}:{path}", "nowhere.pt", str(lab.data)):
        with pytest.raises((ConfigError, ModelError), match="--path"):
            check_checkpoint(wrong, one=True)


def test_batches() -> None:
    check_batches(8, 100, 8)
    check_batches(8, 100, None)
    with pytest.raises(ConfigError, match="--max-tokens is less than a block"):
        check_batches(8, 100, 7)
    with pytest.raises(ConfigError, match="no tokens to read"):
        check_batches(0, 0, 7)


@pytest.mark.parametrize("content", [b"", b"plain text", pickle.dumps([1, 2]), None])
def test_garbage_in_the_place_of_a_checkpoint(
    lab: Lab, tmp_path: Path, content: bytes | None
) -> None:
    garbage = tmp_path / "garbage.pt"
    whole = lab.checkpoint().read_bytes()
    garbage.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(Exception) as caught:
        lab.evaluate("test", "--path", garbage)
    found = in_our_words(caught.value)
    assert isinstance(found, ModelError)
    assert f"the checkpoint {garbage} cannot be read" in str(found)


def test_a_dictionary_of_another_size(lab: Lab, tmp_path: Path) -> None:
    data = Path(shutil.copytree(lab.data, tmp_path / "bin"))
    lines = (data / "dict.txt").read_text().splitlines(keepends=True)
    (data / "dict.txt").write_text("".join(lines[:-20]))
    words = ["--tokens-per-sample", "16", "--cpu", "--gen-subset", "test"]
    ran = run(
        *("fairseq-eval-lm", data, "--user-dir", Path(in_our_words.__code__.co_filename).parent),
        *("--task", "knn_lm", "--path", lab.checkpoint(), *words),
    )
    assert ran.code == 1
    assert "Traceback" not in ran.out
    assert "does not fit the data's dictionary" in ran.out
    assert ran.out.rstrip().splitlines()[-1].startswith("  found:")


def test_flags_of_generation_that_contradict_each_other(lab: Lab, datastore: Path) -> None:
    words = [*PLUGIN, "--path", lab.checkpoint(), "--cpu"]
    words += ["--knnlm", "--dstore-filename", datastore, "--sampling", "--beam", 2, "--nbest", 1]
    ran = run("fairseq-generate", lab.data, *words)
    assert ran.code == 1
    said = [line for line in ran.out.splitlines() if not line.startswith("INFO:")]
    assert said and said[0] == "error: --sampling requires --nbest to be equal to --beam"


def test_blocks_that_are_too_long_to_go_on(lab: Lab, datastore: Path) -> None:
    words = [*PLUGIN, "--path", lab.checkpoint(), "--cpu", "--sample-break-mode", "none"]
    words += ["--knnlm", "--dstore-filename", datastore, "--tokens-per-sample", 64]
    ran = run("fairseq-generate", lab.data, *words)
    assert ran.code == 1
    assert "error: a block of the text is longer than the model takes" in ran.out
    assert ran.out.count("at most 16 tokens") == 1


def test_who_reads_no_further_is_told_nothing(lab: Lab, datastore: Path) -> None:
    """As in `fairseq-generate ... | head -n 1`."""
    words = [lab.data, *PLUGIN, "--path", lab.checkpoint()]
    words += ["--knnlm", "--dstore-filename", datastore, "--cpu", "--beam", "1"]
    words += ["--sample-break-mode", "eos", "--tokens-per-sample", "16"]
    program = Path(sys.executable).with_name("fairseq-generate")
    with subprocess.Popen(
        [program, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert "error" not in said
    assert "Broken pipe" not in said


def test_other_failures_stay_what_they_are() -> None:
    for error in (ValueError("x"), KnnlmError("x"), KeyboardInterrupt(), MemoryError()):
        assert in_our_words(error) is error


@pytest.mark.parametrize("command", ["fairseq-eval-lm", "fairseq-knnlm"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_save_that_is_told_to_end(
    lab: Lab, tmp_path: Path, command: str, number: signal.Signals
) -> None:
    """In the middle, when its temporary folder is there: one line, and nothing is left."""
    words = lab.command("train", "--tokens-per-sample", 1, "--max-tokens", 1)
    words += ["--context-window", "0"]
    if command == "fairseq-eval-lm":
        words += ["--save-knnlm-dstore", "--dstore-mmap", str(tmp_path / "new")]
    else:
        words = ["save", *words[:1], *words[5:], "--dstore", str(tmp_path / "new")]
    program = Path(sys.executable).with_name(command)
    # A shell lets what it starts in the background ignore SIGINT, tests too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [program, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    until = time.monotonic() + 120
    while not list(tmp_path.glob(".new.partial-*")) and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.005)
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    assert process.returncode in (-number, 128 + number), said[-2000:]
    assert "Traceback" not in said
    last = said.rstrip().splitlines()[-1]
    assert last.startswith("terminated" if number == signal.SIGTERM else "interrupted")
    assert not list(tmp_path.iterdir())


def test_a_reader_that_goes_away(datastore: Path) -> None:
    """As in ``fairseq-knnlm info --dstore DSTORE | head -0``."""
    program = Path(sys.executable).with_name("fairseq-knnlm")
    process = subprocess.Popen(
        [program, "info", "--dstore", datastore], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(120) == 0
