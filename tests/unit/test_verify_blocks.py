"""``fairseq-knnlm verify`` and ``info`` of datastores in blocks, and of those in the making."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_calls import Capture, refuse, said_and_wrong, say
from msgspec.structs import replace
from stores import alter, origin, plant, random_entries, truncate, write_cut, write_store

from fairseq_knnlm.datastore import Datastore, open_datastore, outline
from fairseq_knnlm.datastore.compacting import compact
from fairseq_knnlm.datastore.forgetting import forget
from fairseq_knnlm.datastore.making import Making, Plan, read_plan
from fairseq_knnlm.index.pieces import open_piece, write_piece
from fairseq_knnlm.runs.changing import compact_store
from fairseq_knnlm.runs.origins import block_rows
from fairseq_knnlm.runs.verify_blocks import training_at

RECIPE = ["--recipe", "IVF4,Flat", "--probe", "2"]


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    """100 entries in three blocks of 40, 1 and 59."""
    return write_cut(tmp_path / "store")


@pytest.fixture
def whole(store: Datastore, capsys: Capture) -> Datastore:
    """With documents in each block, and an index in pieces."""
    say(capsys, "verify", "--dstore", store.path, "--documents")
    say(capsys, "build-index", "--dstore", store.path, *RECIPE)
    return store


def piece(store: Datastore, block: int) -> Path:
    (found,) = store.blocks[block].path.glob("piece-*.npy")
    return found


# verify


def test_all_that_is_well_takes_one_line(whole: Datastore, capsys: Capture) -> None:
    blocks, index, documents = say(capsys, "verify", "--dstore", whole.path).splitlines()
    names = f"keys.npy, values.npy, documents.npz, {piece(whole, 0).name}"
    sound = "3 blocks, 100 entries, every byte as it was written"
    assert blocks == f"{whole.path}/blocks: {sound} ({names})"
    assert index.startswith(f"{whole.path}/knn.index: IVF4,Flat, nprobe 2")
    assert index.endswith(", of this datastore, its entries in the blocks")
    documented = "documents of this datastore: 1, with empty lines between them"
    assert documents == f"{whole.path}/blocks: {documented}"


@pytest.mark.parametrize("spoil", [alter, truncate, Path.unlink])
@pytest.mark.parametrize("name", ["keys.npy", "values.npy", "manifest.json", "piece"])
def test_what_is_damaged_is_named(
    whole: Datastore, name: str, spoil: Callable[[Path], None], capsys: Capture
) -> None:
    """Of every block that is, and what else is wrong; the others are read all the same."""
    for block in (0, 2):
        file = piece(whole, block) if name == "piece" else whole.blocks[block].path / name
        spoil(file)
    alter(whole.index_path if name != "piece" else whole.blocks[1].path / "documents.npz")
    said, wrong = said_and_wrong(capsys, 1, "verify", "--dstore", whole.path)
    for block in (0, 2):
        folder = whole.blocks[block].path
        assert f"{folder}: not as it should be" in said
        assert str(folder) in wrong
    if name == "piece":
        assert "blocks/000001/documents.npz" in wrong
    else:
        assert "1 other blocks, 1 entries, every byte as it was written" in said
        assert "knn.index is damaged" in wrong
    assert wrong.count("expected:") >= 3


def test_all_blocks_are_gone(store: Datastore, capsys: Capture) -> None:
    shutil.rmtree(store.path / "blocks")
    _, wrong = said_and_wrong(capsys, 1, "verify", "--dstore", store.path)
    assert wrong.count("no datastore at") == 3


def test_a_sound_block_of_another_datastore(store: Datastore, capsys: Capture) -> None:
    block = store.blocks[2].path
    shutil.rmtree(block)
    write_store(block, *random_entries(59, 6), dtype="float16")
    _, wrong = said_and_wrong(capsys, 1, "verify", "--dstore", store.path)
    assert "as the datastore's manifest says" in wrong


def test_blocks_are_read_number_by_number(store: Datastore, capsys: Capture) -> None:
    """What no checksum tells, since it was written so."""
    plant(store, 1, "values.npy", lambda values: values.fill(50))
    store = open_datastore(store.path)
    plant(store, 2, "keys.npy", lambda keys: keys[7:9].fill(np.inf))
    _, wrong = said_and_wrong(capsys, 1, "verify", "--dstore", store.path)
    assert "000001/values.npy" in wrong and "no token id below 50 in 1 of 1 rows" in wrong
    assert "000002/keys.npy" in wrong and "NaN or infinity in 2 of 59 rows, first in row 7" in wrong


def test_a_piece_names_lists_that_are_there(whole: Datastore, capsys: Capture) -> None:
    """What no checksum tells: the first byte of a code is its list, of four."""
    training = training_at(whole.index_path)
    assert training is not None
    block = whole.blocks[2]
    codes = np.array(open_piece(block, training.fingerprint, training.width))
    assert codes[:, 0].max() < 4
    codes[7, 0] = 4
    write_piece(block, training.fingerprint, training.width, [codes])
    _, wrong = said_and_wrong(capsys, 1, "verify", "--dstore", whole.path)
    assert f"{piece(whole, 2)} is damaged" in wrong and "list 4 of 4" in wrong


def test_every_byte_of_a_large_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Also what opening leaves unread: here all but both ends."""
    monkeypatch.setattr("fairseq_knnlm.files.integrity.CHUNK_BYTES", 64)
    store = write_cut(tmp_path / "store")
    monkeypatch.setattr("fairseq_knnlm.files.integrity.CHUNKS_ON_OPEN", 2)
    alter(store.blocks[2].path / "keys.npy")
    open_datastore(store.path)
    _, wrong = said_and_wrong(capsys, 1, "verify", "--dstore", store.path)
    assert "000002/keys.npy is damaged" in wrong


def test_what_does_not_belong_there_is_named(whole: Datastore, capsys: Capture) -> None:
    """Leftovers of runs, blocks that nothing lists, an old piece, what somebody put there."""
    blocks, first = whole.path / "blocks", whole.blocks[0].path
    shutil.copytree(first, blocks / "000007")
    (blocks / ".000008.partial-abc").mkdir()
    (blocks / ".000008.lock").touch()
    (blocks / "notes.txt").touch()
    (first / ".piece-0.npy.partial-x").touch()
    (first / "piece-0123456789abcdef.npy").touch()
    (first / "more").mkdir()
    (whole.path / ".manifest.json.partial-x").touch()
    said, _ = said_and_wrong(capsys, 0, "verify", "--dstore", whole.path)
    for name, words in {
        "blocks/000007": "a block that is no part of the datastore",
        "blocks/.000008.partial-abc": "of a run that has not ended",
        "blocks/.000008.lock": "of a run that has not ended",
        "blocks/notes.txt": "a file that fairseq-knnlm does not know",
        "blocks/000000/.piece-0.npy.partial-x": "of a run that has not ended",
        "blocks/000000/piece-0123456789abcdef.npy": "of another index",
        "blocks/000000/more": "a folder that fairseq-knnlm does not know",
        ".manifest.json.partial-x": "of a run that has not ended",
    }.items():
        assert f"{whole.path}/{name}: {words}" in said
    compact(whole.path)
    assert "no part of the datastore" not in say(capsys, "verify", "--dstore", whole.path)


@pytest.mark.parametrize("where", ["blocks/000000/keys.npy", "blocks/000000/documents.npz"])
def test_no_pipe_is_waited_for(whole: Datastore, where: str, capsys: Capture) -> None:
    (whole.path / where).unlink()
    os.mkfifo(whole.path / where)
    _, wrong = said_and_wrong(capsys, 1, "verify", "--dstore", whole.path)
    assert "a device or pipe" in wrong


def test_a_changed_datastore_is_sound(tmp_path: Path, capsys: Capture) -> None:
    """With documents of which some were forgotten in part; also after blocks are written anew."""
    values = np.tile([2, 5, 6, 7, 2], 20)
    store = write_cut(tmp_path / "store", values=values)
    say(capsys, "verify", "--dstore", store.path, "--documents")
    say(capsys, "build-index", "--dstore", store.path, *RECIPE)
    forget(store.path, [(3, 8), (40, 41), (90, 100)])
    said = say(capsys, "verify", "--dstore", store.path)
    assert "2 blocks, 84 entries" in said and "documents of this datastore" in said
    compact_store(store.path)
    assert "2 blocks, 84 entries" in say(capsys, "verify", "--dstore", store.path)


def test_documents_of_another_text(tmp_path: Path, capsys: Capture) -> None:
    values = np.tile([2, 5, 6, 7, 2], 20)
    store = write_cut(tmp_path / "store", values=values)
    say(capsys, "verify", "--dstore", store.path, "--documents")
    plant(store, 2, "values.npy", lambda values: values.fill(9))
    for block in store.blocks[2:]:
        (block.path / "documents.npz").unlink()
    said = say(capsys, "verify", "--dstore", store.path)
    assert "documents of some of the blocks, and not of all" in said


# info


def test_info_of_blocks(whole: Datastore, capsys: Capture) -> None:
    said = say(capsys, "info", "--dstore", whole.path)
    size = sum(file.stat().st_size for file in whole.path.glob("blocks/*/*"))
    for words in (
        "100 entries of width 6",
        "blocks       3\n",
        "processor    unknown",
        f"on disk      {size / 1024:.1f} KiB",
        "arrays       as they were written (keys.npy, values.npy); ",
        "its entries are in the blocks, all 3 have theirs",
        "documents    1, with",
    ):
        assert words in said
    assert "changed" not in said
    piece(whole, 1).unlink()
    said = say(capsys, "info", "--dstore", whole.path)
    assert "in the blocks, 2 of 3 have theirs: `fairseq-knnlm build-index` makes" in said


def test_info_of_what_was_changed(store: Datastore, capsys: Capture) -> None:
    forget(store.path, [(0, 3)])
    said = say(capsys, "info", "--dstore", store.path)
    assert "blocks       3; 3 of 100 entries are forgotten" in said
    assert "changed      once, last at 20" in said
    assert f"it was {store.fingerprint[:12]}... before" in said
    forget(store.path, [(0, 3)])
    assert "changed      2 times" in say(capsys, "info", "--dstore", store.path)


def test_info_of_a_damaged_block(store: Datastore, capsys: Capture) -> None:
    alter(store.blocks[1].path / "manifest.json")
    said = say(capsys, "info", "--dstore", store.path)
    assert "blocks       3\n" in said
    assert f"arrays       {store.blocks[1].path}/manifest.json is damaged" in said


# In the making


CONTEXT = {"tokens_per_sample": 8, "context_window": 4, "sample_break_mode": "none"}
CONTEXT |= {"max_tokens": 64, "batch_size": None, "add_bos_token": 1, "precision": "float32"}
PLAN = Plan(6, "float16", replace(origin(), context=CONTEXT), [0, 40, 64, 100], "= [^=]")


def begun(path: Path, blocks: int, plan: Plan = PLAN) -> Making:
    """The first blocks are there."""
    making = Making(path, plan)
    keys, values = random_entries(100, 6)
    for block in list(plan.blocks)[:blocks]:
        rows = plan.rows(block)
        part = slice(rows.start, rows.stop)
        writer = making.writer(block)
        writer.write(np.arange(len(rows)), keys[part], values[part])
        writer.publish()
    return making


def test_info_of_one_in_the_making(tmp_path: Path, capsys: Capture) -> None:
    path = begun(tmp_path / "store", 2).path
    said = say(capsys, "info", "--dstore", path)
    assert f"{path}: in the making, 100 entries of width 6" in said
    assert "in making    2 of 3 blocks are there, 64 of 100 entries" in said
    assert (
        f"go on with   fairseq-knnlm save DATA --path CKPT --dstore {path} --knn-keytype "
        "last_ffn_input --gen-subset train --tokens-per-sample 12 --context-window 4 "
        "--sample-break-mode none --max-tokens 64 --add-bos-token --block-rows 32 "
        "--document-boundary '= [^=]'\n"
    ) in said
    begun(tmp_path / "other", 3)
    said = say(capsys, "info", "--dstore", tmp_path / "other")
    assert f"go on with   fairseq-knnlm save --join {tmp_path / 'other'}\n" in said


def test_info_of_one_that_is_being_added_to(store: Datastore, capsys: Capture) -> None:
    begun(store.path, 1, replace(PLAN, number=3, onto=store.fingerprint, boundary=None))
    said = say(capsys, "info", "--dstore", store.path)
    assert "100 entries of width 6" in said
    assert "in making    1 of 3 blocks to be added are there, 40 of 100 entries" in said
    assert f"go on with   fairseq-knnlm append {store.path} DATA --path CKPT --knn-keytype" in said
    said = say(capsys, "verify", "--dstore", store.path)
    assert "3 blocks, 100 entries" in said and "1 blocks, 40 entries" in said
    assert "making.json: 1 of 3 blocks are there of what is being added" in said
    assert "no part of the datastore" not in said


def test_verify_of_one_in_the_making(tmp_path: Path, capsys: Capture) -> None:
    path = begun(tmp_path / "store", 2).path
    (path / "blocks" / ".000002.partial-abc").mkdir()
    said = say(capsys, "verify", "--dstore", path)
    assert "2 blocks, 64 entries, every byte as it was written (keys.npy, values.npy)" in said
    assert f"{path}/making.json: 2 of 3 blocks are there of what is being made" in said
    assert ".000002.partial-abc: of a run that has not ended" in said
    alter(path / "blocks" / "000001" / "keys.npy")
    _, wrong = said_and_wrong(capsys, 1, "verify", "--dstore", path)
    assert "000001/keys.npy is damaged" in wrong


def test_a_block_of_another_making(tmp_path: Path, capsys: Capture) -> None:
    path = begun(tmp_path / "store", 1).path
    write_store(path / "blocks" / "000001", *random_entries(24, 6), dtype="float16")
    _, wrong = said_and_wrong(capsys, 1, "verify", "--dstore", path)
    assert "of another making than this" in wrong


def test_a_damaged_plan_is_said(tmp_path: Path, capsys: Capture) -> None:
    path = begun(tmp_path / "store", 1).path
    alter(path / "making.json")
    assert "making.json is damaged" in refuse(capsys, "info", "--dstore", path)
    _, wrong = said_and_wrong(capsys, 1, "verify", "--dstore", path)
    assert "making.json is damaged" in wrong


@pytest.mark.parametrize("asked", [1, 7, 8, 20, 64, 65, 100, 1000])
@pytest.mark.parametrize("sizes", [[8] * 25 + [3], [5, 9, 2, 7, 7, 1, 30, 4, 8, 8] * 2])
def test_block_rows_that_cut_the_same(asked: int, sizes: list[int]) -> None:
    from fairseq_knnlm.runs.save_blocks import cut

    starts = np.cumsum(sizes) - sizes
    texts = cut(starts, sum(sizes), asked)
    edges = [int(starts[text.start]) for text in texts]
    if len(texts) > 1 and asked >= max(sizes):  # no block is left out
        assert cut(starts, sum(sizes), block_rows(edges)) == texts


def test_the_plan_is_of_whichever_processor(tmp_path: Path) -> None:
    path = begun(tmp_path / "store", 1).path
    known = replace(PLAN.origin, versions={"processor": "another"})
    other = replace(PLAN, origin=known)
    assert other.fingerprint == read_plan(path).fingerprint == PLAN.fingerprint
    assert outline(path / "blocks" / "000000").manifest.origin == PLAN.origin
