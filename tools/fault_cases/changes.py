"""Datastores in blocks that are changed, and computed again."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from fault_cases import sealed
from fault_cases.stage import BadOutcome, Case, Stage, check_manners, check_message
from fault_cases.typed import HUGE, Command, Table, flag_cases
from fault_cases.world import knnlm

MUST = "refused with a message that names the flag or the file; nothing is changed"
DIGITS = "9" * 15
#: ``forget STORE``: flags, and what the message must hold.
FORGET: Table = {
    "nothing": ("", "--document"),
    "rows beyond": ("--rows 5:10000000", "rows"),
    "rows of 15 digits": (f"--rows 5:{DIGITS}", "rows"),
    "rows of 30 digits": (f"--rows 5:{HUGE}", "--rows"),
    "no row": ("--rows 5:5", "--rows"),
    "rows turned round": ("--rows 9:5", "--rows"),
    "rows below 0": ("--rows=-5:5", "--rows"),
    "words": ("--rows a:b", "--rows"),
    "one row": ("--rows 7", "--rows"),
    "other digits": ("--rows \u0663:\u0665", "--rows"),
    "all": ("--rows ALL", "nothing|all"),
    "all in two parts": ("--rows 0:1700 --rows REST", "nothing|all"),
    "one good, one beyond": ("--rows 5:9 --rows 5:10000000", "rows"),
    "unknown document": ("--document nobody --data DATA", "nobody"),
    "empty document": ("--document= --data DATA", "document"),
    "document without data": ("--document w1", "--data"),
    "data without document": ("--rows 5:9 --data DATA", "--data"),
    "data that is not there": ("--document w1 --data nowhere", "nowhere"),
    "flag nobody knows": ("--rows 5:9 --colour red", "--colour"),
    "dry run beyond": ("--dry-run --rows 5:10000000", "rows"),
}
#: ``append STORE DATA --path CKPT --gen-subset valid``.
APPEND: Table = {
    "another model": ("--path OTHER", "another checkpoint"),
    "no model": ("--path nowhere.pt", "nowhere.pt"),
    "another type of keys": ("--dstore-fp32", "--dstore-fp32"),
    "no keys": ("--no-save-keys", "--no-save-keys"),
    "another key type": ("--knn-keytype decoder_output", "key.type"),
    "another datastore": ("--dstore-mmap x", "--dstore-mmap"),
    "a datastore to ask": ("--dstore-filename x", "--dstore-filename"),
    "no split": ("--gen-subset nowhere", "nowhere|gen-subset"),
    "block-rows 0": ("--block-rows 0", "--block-rows"),
    "block-rows -5": ("--block-rows=-5", "--block-rows"),
    "block-rows of 30 digits": (f"--block-rows {HUGE}", "--block-rows"),
    "shard 5 of 2": ("--num-shards 2 --shard-id 5 --context-window 0", "--shard-id"),
    "more shards than blocks": ("--num-shards 9 --block-rows 300", "shards"),
    "results of a part": ("--results-json r.json --num-shards 2 --block-rows 99", "results"),
    "documents at no expression": ("--document-boundary (", "--document-boundary"),
}
#: ``verify --dstore STORE --data DATA --path CKPT``.
AGAIN: Table = {
    "nothing": ("--recompute 0", "--recompute"),
    "more than all": ("--recompute 1.5", "--recompute"),
    "less than nothing": ("--recompute=-1", "--recompute"),
    "nan": ("--recompute nan", "--recompute"),
    "a word": ("--recompute much", "--recompute"),
    "seed -1": ("--recompute 1 --seed=-1", "--seed"),
    "another model": ("--recompute 1 --path OTHER", "another checkpoint"),
    "no model": ("--recompute 1 --path nowhere.pt", "nowhere.pt"),
    "data that is not there": ("--recompute 1 --data nowhere", "nowhere"),
    "a dictionary for data": ("--recompute 1 --data DATA/dict.txt", "--data|folder"),
    "flag nobody knows": ("--recompute 1 --colour red", "--colour"),
}
#: ``verify --dstore STORE``.
ALONE: Table = {
    "a path": ("--path OTHER", "--path"),
    "a seed": ("--seed 3", "--seed"),
    "a flag of fairseq": ("--cpu", "--cpu"),
}


def cases() -> Iterator[Case]:
    """Flags by command, then what is done in several steps."""
    commands: tuple[Command, ...] = (
        ("forget", FORGET, lambda stage: knnlm("forget", stage.cut())),
        ("append", APPEND, lambda stage: _append(stage, stage.cut())),
        ("recompute", AGAIN, lambda stage: _again(stage, stage.cut())),
        ("verify", ALONE, lambda stage: knnlm("verify", "--dstore", stage.cut())),
    )
    yield from flag_cases("blocks", MUST, commands, _known)
    for name, done, must, step in STEPS:
        yield Case("blocks", name, done, must, step)


def _known(stage: Stage) -> dict[str, object]:
    return {
        "ALL": f"0:{stage.world.rows}",
        "REST": f"1600:{stage.world.rows}",
        "DATA": stage.world.data,
        "DATA/dict.txt": stage.world.data / "dict.txt",
        "OTHER": stage.world.checkpoint("other"),
    }


def _append(stage: Stage, store: Path | str, *flags: object) -> list[object]:
    lm = ("--path", stage.world.checkpoint(), "--gen-subset", "valid")
    rest = ("--cpu", "--num-workers", 0, "--max-tokens", 512, "--sample-break-mode", "none")
    return knnlm("append", store, stage.world.data, *lm, *rest, *flags)


def _again(stage: Stage, store: Path, *flags: object) -> list[object]:
    lm = ("--data", stage.world.data, "--path", stage.world.checkpoint(), "--cpu")
    return knnlm("verify", "--dstore", store, *lm, *flags)


# Several steps


def _forgets_what_overlaps(stage: Stage) -> str:
    """Each row goes once; a try changes nothing; who compacts twice has nothing to do."""
    store = stage.cut()
    words = knnlm("forget", store, "--rows", "5:20", "--rows", "10:30")
    stage.works([*words, "--dry-run"], says="would forget 25 of")
    stage.works(words, says="forgot 25 of", changes=["store/manifest.json"])
    first = stage.works(stage.world.knn(store)).loss
    stage.works(knnlm("compact", store), says="wrote 1 block anew", changes=["store/*"])
    stage.works(knnlm("compact", store), says="nothing to do")
    stage.works(stage.world.knn(store), loss=first)
    stage.works(knnlm("verify", "--dstore", store))
    return f"25 rows went, {first} bits before and after compact"


def _changed(store: Path | str) -> Iterator[list[object]]:
    yield knnlm("forget", store, "--rows", "5:20")
    yield knnlm("compact", store)


def _not_ours(stage: Stage) -> str:
    """Files of urvashik/knnlm, and what was compressed, stay as they are."""
    shutil.copytree(stage.world.old.parent, stage.folder / "old")
    compress = knnlm("compress", "--dstore", stage.world.store, "--out", "small", "--pca", 8)
    stage.works(compress)
    for words in (*_changed("old/old"), _append(stage, "old/old")):
        stage.refused(words, "urvashik")
    for words in (next(_changed("small")), _append(stage, "small")):
        stage.refused(words, "compressed")
    return stage.refused(_again(stage, Path("small"), "--recompute", 1), "compressed")


def _not_there(stage: Stage) -> str:
    for words in (*_changed("nowhere"), _append(stage, "nowhere")):
        found = stage.refused(words, "no datastore at nowhere")
    return found


def _while_another_changes(stage: Stage) -> str:
    store = stage.cut()
    manifest, held = store / "manifest.json", stage.folder / "held"
    before = manifest.read_bytes()

    def hold() -> None:
        from fairseq_knnlm.files import Claim

        with Claim(manifest):
            held.touch()
            signal.pause()

    holder = stage.start(hold)
    try:
        while not held.exists() and not holder.ended():
            time.sleep(0.01)
        for words in (*_changed(store), _append(stage, store)):
            ran = stage.start(words).wait()
            check_manners(ran)
            if ran.code == 0:
                raise BadOutcome(f"was accepted: {ran.last}")
            found = check_message(ran, "another process")
    finally:
        holder.send(signal.SIGKILL)
        holder.wait()
    if manifest.read_bytes() != before:
        raise BadOutcome("manifest.json has changed")
    return found


def _damaged_index(stage: Stage) -> str:
    """Where an index has to be cut and cannot be read, nothing is forgotten."""
    flat, store = stage.store("flat"), stage.cut()
    for path in (flat, store):
        data = bytearray((path / "knn.index").read_bytes())
        data[60] ^= 16
        (path / "knn.index").write_bytes(data)
    # Nothing of it has to be touched where it lies in pieces, and what is to go can go.
    words = knnlm("forget", store, "--rows", "5:20")
    stage.works(words, says="forgot 15 of", changes=["store/manifest.json"])
    stage.refused(stage.world.knn(store), "knn.index")
    return _unread_index(stage, flat)


def _unread_index(stage: Stage, flat: Path) -> str:
    """A flat one may become one of a block meanwhile, of the same entries."""
    changes = ["flat/manifest.json", "flat/*.npy", "flat/documents.npz", "flat/blocks/*"]
    words = knnlm("forget", flat, "--rows", "5:20")
    found = stage.refused(words, "knn.index", changes=changes)
    stage.works(knnlm("info", "--dstore", flat), says=f"{stage.world.rows:,}")
    return found


def _compacts_in_use(stage: Stage) -> str:
    """Keys that are mapped stay what they were, though their files are removed meanwhile."""
    store = stage.cut()

    def read() -> int:
        from fairseq_knnlm.cli import main
        from fairseq_knnlm.datastore import open_datastore

        opened = open_datastore(store)
        keys = np.array(opened.full_keys()[:])
        assert main(["forget", str(store), "--rows", "5:20"]) == 0
        assert main(["compact", str(store)]) == 0
        assert np.array_equal(np.array(opened.full_keys()[:]), keys)
        return 0

    stage.works(read, changes=["store/*"])
    stage.works(knnlm("verify", "--dstore", store))
    return "the reader went on with what it had opened"


def _appended_and_computed_again(stage: Stage) -> str:
    store = stage.cut()
    stage.works(_append(stage, store), changes=["store/*"])
    stage.works(_again(stage, store, "--recompute", 1))
    stage.works(stage.world.knn(store))
    return "works, and every bit of it is computed again"


def _planted(stage: Stage, *, file: str, change: Callable[[np.ndarray], object]) -> str:
    """Other numbers under checksums and seals that are right, which only computing tells."""
    store = stage.cut()
    # What is made of a block knows its seal, and would be refused without computing.
    for made in (store / "knn.index", *store.glob("blocks/*/[pd]*.np[yz]")):
        made.unlink()
    block = store / "blocks" / "000001"
    array = np.load(block / file)
    change(array)
    np.save(block / file, array)
    data = (block / file).read_bytes()
    manifest = sealed.MANIFEST.read(block)
    manifest["files"][file]["chunks"] = [hashlib.sha256(data).hexdigest()[:16]]
    text = sealed.sealed(manifest)
    sealed.MANIFEST.write(block, text)
    whole = sealed.MANIFEST.read(store)
    whole["blocks"][1]["fingerprint"] = json.loads(text)["fingerprint"]
    sealed.MANIFEST.write(store, sealed.sealed(whole))
    stage.works(knnlm("verify", "--dstore", store))
    says = "000001 is not what this checkpoint makes"
    return stage.refused(_again(stage, store, "--recompute", 1), says)


def _zero(array: np.ndarray) -> None:
    array[7] = 0


def _one_value(array: np.ndarray) -> None:
    array[7] = 9 if array[7] != 9 else 8


FOUND = "refused, with the block's name"
STEPS: tuple[tuple[str, str, str, Callable[[Stage], str]], ...] = (
    (
        "forget what overlaps",
        "ranges of rows that overlap",
        "each goes once",
        _forgets_what_overlaps,
    ),
    ("change what is not ours", "forget, compact, append", MUST, _not_ours),
    ("change what is not there", "forget, compact, append", MUST, _not_there),
    ("change what another changes", "the claim held meanwhile", MUST, _while_another_changes),
    (
        "forget, its index damaged",
        "a bit of knn.index",
        "works where it lies in pieces; refused where it has to be cut",
        _damaged_index,
    ),
    ("compact what is in use", "keys mapped by a reader", "stay what they are", _compacts_in_use),
    (
        "append and compute again",
        "append valid, --recompute 1",
        "works",
        _appended_and_computed_again,
    ),
    (
        "a key planted",
        "a key of zeros, sums and seals right, --recompute 1",
        FOUND,
        partial(_planted, file="keys.npy", change=_zero),
    ),
    (
        "a value planted",
        "another value, sums and seals right, --recompute 1",
        FOUND,
        partial(_planted, file="values.npy", change=_one_value),
    ),
)
