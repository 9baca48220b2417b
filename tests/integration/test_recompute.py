"""``verify --recompute``: a datastore is what its checkpoint makes of its text, or is not."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_calls import Capture, refuse, said_and_wrong
from conftest import Lab
from stores import plant

from fairseq_knnlm.datastore import open_datastore
from fairseq_knnlm.index.pieces import open_piece, write_piece
from fairseq_knnlm.runs.verify_blocks import training_at

SAVE = ["--save-knnlm-dstore", "--dstore-mmap"]
BLOCKS = ["--block-rows", 64]
STREAM = ["--no-save-keys", "--recipe", "IVF4,PQ4x4fsr"]
#: Of the blocks of 8 tokens after 8; by sentences, without context.
KINDS = {
    "flat": [],
    "blocks": BLOCKS,
    "sentences": ["--context-window", 0, "--sample-break-mode", "eos", "--dstore-fp32"],
    "sentences in blocks": ["--context-window", 0, "--sample-break-mode", "eos", *BLOCKS],
    "streamed": [*STREAM, *BLOCKS],
    "streamed flat": STREAM,
    "one at a time": ["--batch-size", 1, *BLOCKS],
    "stride": ["--stride", 5, "--context-window", 0],
    "stride in blocks": ["--stride", 5, "--context-window", 0, *BLOCKS],
}


def saved(lab: Lab, kind: str) -> Path:
    path = lab.folder / f"to be computed, {kind}"
    if not path.exists():
        lab.evaluate("valid", *SAVE, path, *KINDS[kind])
    return path


def again(lab: Lab, path: Path, *flags: object, model: str = "adaptive") -> list[object]:
    where = ["--data", lab.data, "--path", lab.checkpoint(model), "--cpu", "--num-workers", 0]
    return ["verify", "--dstore", path, "--recompute", 1, *where, *flags]


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_is_unchanged_is_confirmed(lab: Lab, kind: str, capsys: Capture) -> None:
    path = saved(lab, kind)
    said, _ = said_and_wrong(capsys, 0, *again(lab, path))
    lines = [line for line in said.splitlines() if "entries computed again" in line]
    assert len(lines) == max(1, len(open_datastore(path).blocks))
    compared = "keys in float16, and values"
    compared = {
        "streamed": "values and codes",
        "streamed flat": "values alone",
        "sentences": "keys in float32, and values",
    }.get(kind, compared)
    assert all(f"the same, bit for bit ({compared})" in line for line in lines), lines


@pytest.mark.parametrize("kind", ["flat", "blocks"])
@pytest.mark.parametrize("name", ["keys.npy", "values.npy"])
def test_one_change_is_found(
    lab: Lab, tmp_path: Path, kind: str, name: str, capsys: Capture
) -> None:
    """Under checksums and seals that are right, so that nothing else tells."""
    shutil.copytree(saved(lab, kind), tmp_path / "store", ignore=lambda *_: ["documents.npz"])

    def change(array: np.ndarray) -> None:
        array.view(np.uint16)[13, ...].flat[0] ^= 1

    store = open_datastore(tmp_path / "store")
    plant(store, 2, name, change)
    said_and_wrong(capsys, 0, "verify", "--dstore", store.path)
    _, wrong = said_and_wrong(capsys, 1, *again(lab, store.path))
    where = store.blocks[2].path if store.blocks else store.path
    assert f"{where} is not what this checkpoint makes of this text" in wrong
    what = "keys" if name == "keys.npy" else "values"
    assert f"1 other {what}, the first in row 13" in wrong
    assert wrong.count("expected:") == 1


def test_one_code_is_found(lab: Lab, tmp_path: Path, capsys: Capture) -> None:
    shutil.copytree(saved(lab, "streamed"), tmp_path / "store")
    store = open_datastore(tmp_path / "store")
    training = training_at(store.index_path)
    assert training is not None
    block = store.blocks[1]
    codes = np.array(open_piece(block, training.fingerprint, training.width))
    codes[[4, 5], 0] ^= 1
    write_piece(block, training.fingerprint, training.width, [codes])
    _, wrong = said_and_wrong(capsys, 1, *again(lab, store.path))
    assert "2 other codes, the first in row 4" in wrong
    assert str(block.path) in wrong


def test_another_checkpoint_is_refused(lab: Lab, capsys: Capture) -> None:
    """Before anything is read for long."""
    path = saved(lab, "blocks")
    said = refuse(capsys, *again(lab, path, model="plain"))
    assert "is of another checkpoint than the language model" in said


def test_the_text_of_another_split_is_told(lab: Lab, tmp_path: Path, capsys: Capture) -> None:
    """Data whose valid split is another text."""
    shutil.copytree(lab.data, tmp_path / "data")
    for end in ("bin", "idx"):
        shutil.copy(lab.data / f"test.{end}", tmp_path / "data" / f"valid.{end}")
    words = again(lab, saved(lab, "blocks"), "--data", tmp_path / "data")
    _, wrong = said_and_wrong(capsys, 1, *words)
    assert "is of the text in --data" in wrong
    (tmp_path / "data" / "valid.idx").unlink()
    assert "has no split valid" in refuse(capsys, *words)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--recompute", 0], "--recompute is a share"),
        (["--recompute", 1.5], "--recompute is a share"),
        (["--tokens-per-sample", 8], "--tokens-per-sample is not to be chosen"),
        (["--max-tokens=8"], "--max-tokens is not to be chosen"),
        (["--path", "nowhere.pt"], "no checkpoint nowhere.pt"),
        (["--data", "nowhere"], "nowhere"),
        (["--seed", -1], "--seed"),
    ],
)
def test_bad_input(lab: Lab, flags: list[object], says: str, capsys: Capture) -> None:
    assert says in refuse(capsys, *again(lab, saved(lab, "blocks"), *flags))


def test_blocks_that_were_added(lab: Lab, tmp_path: Path, capsys: Capture) -> None:
    """Of another split, in batches of their own."""
    shutil.copytree(saved(lab, "flat"), tmp_path / "store")
    lab.evaluate("test", "--append-dstore", *SAVE, tmp_path / "store", "--max-tokens", 32)
    said, _ = said_and_wrong(capsys, 0, *again(lab, tmp_path / "store"))
    assert said.count("the same, bit for bit") == 2
