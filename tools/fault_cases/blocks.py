"""Datastores in blocks that are wrong: their manifest, blocks, and pieces of the index."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fault_cases import sealed
from fault_cases.sealed import Change
from fault_cases.stage import BadOutcome, Case, Stage
from fault_cases.world import DOCUMENTS, INDEX, knnlm

MUST = "refused by verify and by an evaluation, with a message that names what is wrong"
FIELDS = (
    *("rows", "width", "key_dtype", "value_dtype", "origin", "blocks", "before"),
    *("blocks.0.name", "blocks.0.rows", "blocks.0.fingerprint", "blocks.0.breaks"),
    "blocks.0.forgotten",
)


def cases() -> Iterator[Case]:
    """The manifest, then what lies in the folders, then what is beside them."""
    for change in (*_of_fields(), *sealed.of_number("blocks.1.rows"), *MANIFEST):
        play = partial(_manifest, change=change)
        yield Case("blocks", f"manifest in blocks: {change.name}", change.done, MUST, play)
    for name, done, says, spoil in FOLDERS:
        play = partial(_folder, spoil=spoil, says=says)
        yield Case("blocks", f"block: {name}", done, MUST, play)
    for name, done, must, alone in ALONE:
        yield Case("blocks", f"block: {name}", done, must, alone)


def _of_fields() -> Iterator[Change]:
    for change in sealed.of_fields(FIELDS):
        # One without blocks is taken for a flat one, whose files are missing.
        yield replace(change, says="files") if change.name == "blocks dropped" else change


def _refused_by_all(stage: Stage, store: Path, says: str) -> str:
    verified = stage.refused(knnlm("verify", "--dstore", store), says)
    stage.refused(stage.world.knn(store), says)
    return verified


# The manifest


def _manifest(stage: Stage, *, change: Change) -> str:
    store = stage.cut()
    sealed.MANIFEST.write(store, change.make(sealed.MANIFEST.read(store)))
    return _refused_by_all(stage, store, change.says)


def _blocks(name: str, says: str, change: Callable[[list[dict[str, Any]]], object]) -> Change:
    """A change of the list of blocks."""

    def make(content: dict[str, Any]) -> bytes:
        content = json.loads(json.dumps(content))
        change(content["blocks"])
        return sealed.sealed(content)

    return Change(name, f"{name}, sealed anew", says, make)


def _forgotten(name: str, ranges: list[list[int]], says: str = "forgotten") -> Change:
    return _blocks(f"forgotten {name}", says, lambda blocks: blocks[0].update(forgotten=ranges))


def _swap(blocks: list[dict[str, Any]]) -> None:
    blocks[0]["name"], blocks[1]["name"] = blocks[1]["name"], blocks[0]["name"]


MANIFEST = (
    _blocks("a block twice", "twice", lambda blocks: blocks.append(dict(blocks[0]))),
    _blocks("a block left out", "rows", lambda blocks: blocks.pop()),
    _blocks("no blocks", "blocks|files", lambda blocks: blocks.clear()),
    _blocks("names of two blocks swapped", "block", _swap),
    _blocks("a name that leads out", "name", lambda blocks: blocks[0].update(name="../../x")),
    _blocks("a name of 3 digits", "name", lambda blocks: blocks[0].update(name="000")),
    _blocks(
        "a name of nothing", "000077|datastore", lambda blocks: blocks[0].update(name="000077")
    ),
    _blocks("another fingerprint", "block", lambda blocks: blocks[0].update(fingerprint="f" * 64)),
    _blocks("breaks that descend", "breaks", lambda blocks: blocks[0].update(breaks=[5, 0])),
    _blocks("a break beyond", "breaks", lambda blocks: blocks[0].update(breaks=[0, 10**9])),
    _blocks("a break below 0", "breaks", lambda blocks: blocks[0].update(breaks=[-1])),
    _blocks("100,000 unknown fields", "x", lambda blocks: blocks[0].update(x=[0] * 100_000)),
    _forgotten("overlapping", [[5, 20], [10, 30]]),
    _forgotten("touching", [[5, 20], [20, 30]]),
    _forgotten("descending", [[50, 60], [5, 20]]),
    _forgotten("of no row", [[5, 5]]),
    _forgotten("turned round", [[20, 5]]),
    _forgotten("beyond the block", [[5, 10**9]]),
    _forgotten("below 0", [[-5, 5]]),
    _forgotten("half a range", [[5]]),
    _forgotten("not counted", [[5, 20]], "rows"),
    Change(
        "another width",
        "width 15, sealed anew",
        "width",
        lambda content: sealed.sealed({**content, "width": 15}),
    ),
    Change(
        "float32",
        "key_dtype float32, sealed anew",
        "type of keys",
        lambda content: sealed.sealed({**content, "key_dtype": "float32"}),
    ),
    Change(
        "files of its own",
        "files as of a flat one, sealed anew",
        "files",
        lambda content: sealed.sealed(
            {**content, "files": {"keys.npy": {"bytes": 1, "chunks": []}}}
        ),
    ),
)


# What lies in the folders


def _folder(stage: Stage, *, spoil: Callable[[Stage, Path], object], says: str) -> str:
    store = stage.cut()
    spoil(stage, store)
    return _refused_by_all(stage, store, says)


def _block(store: Path, number: int = 1) -> Path:
    return store / "blocks" / f"{number:06d}"


def _piece(store: Path, number: int = 1) -> Path:
    (found,) = _block(store, number).glob("piece-*.npy")
    return found


def _shorter(path: Path, size: int) -> None:
    os.truncate(path, size)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def _in_place_of_block(stage: Stage, store: Path, kind: str) -> None:
    block = _block(store)
    shutil.rmtree(block)
    if kind == "a file":
        block.write_text("no folder")
    elif kind == "a pipe":
        os.mkfifo(block)
    elif kind == "a dangling link":
        block.symlink_to("nowhere")
    elif kind == "an empty folder":
        block.mkdir()
    elif kind == "another block":
        shutil.copytree(_block(store, 0), block)
    elif kind == "the whole":
        shutil.copytree(stage.world.cut, block)
    elif kind == "another datastore":
        shutil.copytree(stage.world.store, block)


def _of_another_save(stage: Stage, store: Path) -> None:
    """The same rows of the same text by another model, of which no array is damaged."""
    other = stage.folder / "other"
    words = ("--block-rows", 900, *DOCUMENTS, "--path", stage.world.checkpoint("other"))
    stage.works(stage.world.save(other, *words))
    shutil.rmtree(_block(store))
    shutil.move(_block(other), _block(store))


def _other_training(stage: Stage) -> Path:
    """The same datastore with an index of other lists."""
    other = stage.cut("other")
    recipe = ("--recipe", "IVF4,Flat", "--probe", 2)
    stage.works(knnlm("build-index", "--dstore", other, *recipe), changes=["other/*"])
    return other


def _piece_of_another_training(stage: Stage, store: Path) -> None:
    shutil.copy(_piece(_other_training(stage)), _piece(store))


def _trained_part_of_another(stage: Stage, store: Path) -> None:
    shutil.copy(_other_training(stage) / "knn.index", store / "knn.index")


def _index_of_flat(stage: Stage, store: Path) -> None:
    """The whole index of the flat datastore of the same text, in the place of the trained part."""
    shutil.copy(stage.world.store / "knn.index", store / "knn.index")


def _piece_with_other_codes(_: Stage, store: Path) -> None:
    """Lists that are not there, under checksums and a seal that are right."""
    import hashlib

    path = _piece(store)
    found = sealed.trailer(path)
    assert found is not None
    start = found[0]
    card = json.loads(path.read_bytes()[slice(*found)])
    with path.open("rb") as file:
        codes = np.load(file)
    codes[:, 0] = 255
    with path.open("wb") as file:
        np.save(file, codes)
    data = path.read_bytes()
    assert len(data) == start
    text = sealed.sealed({**card, "chunks": [hashlib.sha256(data).hexdigest()[:16]]})
    path.write_bytes(data + text + len(text).to_bytes(8, "little") + b"kNNcard1")


Spoil = Callable[[Stage, Path], object]
FOLDERS: tuple[tuple[str, str, str, Spoil], ...] = (
    *(
        (f"{kind} in its place", f"a block taken away, {kind} in its place", says, play)
        for kind, says in (
            ("nothing", "000001"),
            ("a file", "000001"),
            ("a pipe", "000001"),
            ("a dangling link", "000001"),
            ("an empty folder", "000001"),
            ("another block", "000001"),
            ("the whole", "000001"),
            ("another datastore", "000001"),
        )
        for play in (partial(_in_place_of_block, kind=kind),)
    ),
    ("of another model", "a block of the same rows by another model", "000001", _of_another_save),
    ("its manifest gone", "manifest.json of a block removed", "000001",
     lambda _, store: (_block(store) / "manifest.json").unlink()),
    ("its keys gone", "keys.npy of a block removed", "keys",
     lambda _, store: (_block(store) / "keys.npy").unlink()),
    ("its keys cut off", "keys.npy of a block cut off", "keys",
     lambda _, store: _shorter(_block(store) / "keys.npy", 500)),
    ("its values flipped", "a bit of a block's values", "values",
     lambda _, store: _flip(_block(store) / "values.npy")),
    ("keys of another block", "keys.npy of another block", "keys",
     lambda _, store: shutil.copy(_block(store, 0) / "keys.npy", _block(store) / "keys.npy")),
    ("a piece missing", "a piece of the index removed", "piece",
     lambda _, store: _piece(store).unlink()),
    ("a piece cut off", "half a piece", "piece",
     lambda _, store: _shorter(_piece(store), _piece(store).stat().st_size // 2)),
    ("a piece without its card", "the end of a piece cut off", "piece",
     lambda _, store: _shorter(_piece(store), _piece(store).stat().st_size - 8)),
    ("a piece empty", "a piece of no bytes", "piece", lambda _, store: _shorter(_piece(store), 0)),
    ("a piece flipped", "a bit of a piece", "piece", lambda _, store: _flip(_piece(store))),
    ("a piece of another block", "the piece of the block before", "piece of another block",
     lambda _, store: shutil.copy(_piece(store, 0), _piece(store))),
    ("a piece of another training", "the piece of an index of other lists",
     "piece of another training", _piece_of_another_training),
    ("a piece of lists that are not there", "codes of list 255 of 8, sums and seal right",
     "piece|list", _piece_with_other_codes),
    ("the training of another", "knn.index of other lists", "piece", _trained_part_of_another),
    ("the index of a flat one", "the whole index of the same text in one block",
     "another datastore|index", _index_of_flat),
)  # fmt: skip


# What is not refused by all


def _documents_of_another(stage: Stage) -> str:
    """Nobody who scores asks for them; who forgets a document does."""
    store = stage.cut()
    shutil.copy(_block(store, 0) / "documents.npz", _block(store) / "documents.npz")
    stage.refused(knnlm("verify", "--dstore", store), "documents")
    words = knnlm("forget", store, "--document", "w1", "--data", stage.world.data)
    return stage.refused(words, "documents.npz is of another")


def _stranger(stage: Stage) -> str:
    """A folder that the manifest does not name is no part of the datastore."""
    store = stage.cut()
    shutil.copytree(_block(store, 0), _block(store, 9))
    stage.works(stage.world.knn(store), loss=stage.world.losses["cut"])
    stage.works(knnlm("verify", "--dstore", store), says="000009: a block that is no part")
    return "works, with the same loss; verify names it"


def _alone(stage: Stage) -> str:
    """A block is a datastore of its own."""
    store = stage.cut()
    stage.works(knnlm("verify", "--dstore", _block(store)))
    stage.works(knnlm("info", "--dstore", _block(store)))
    words = knnlm("build-index", "--dstore", _block(store), *INDEX)
    stage.works(words, changes=["store/*"])
    stage.works(stage.world.knn(_block(store)))
    stage.works(stage.world.knn(store), loss=stage.world.losses["cut"])
    return "verified, indexed and searched; the whole has its loss"


def _in_the_making(stage: Stage, *, text: bytes, says: str) -> str:
    """``making.json`` that is damaged, and blocks that are not joined."""
    store = stage.cut("new")
    (store / "manifest.json").unlink()
    (store / "making.json").write_bytes(text)
    for words in (knnlm("verify", "--dstore", store), knnlm("save", "--join", store)):
        stage.refused(words, says)
    stage.refused(stage.world.knn(store), "datastore|making")
    return stage.refused(stage.world.save(store, *DOCUMENTS, "--block-rows", 900), says)


def _moved(stage: Stage) -> str:
    store = stage.cut()
    moved = store.rename(stage.folder / "elsewhere")
    stage.works(stage.world.knn(moved), loss=stage.world.losses["cut"])
    return "works, with the same loss"


def _as_flat(stage: Stage) -> str:
    """Blocks, lists and all come to what one block comes to."""
    loss, flat = stage.world.losses["cut"], stage.world.losses["knn"]
    if abs(loss - flat) > 0.02:
        raise BadOutcome(f"{loss} in blocks, {flat} in one")
    return f"{loss} bits in blocks, {flat} in one"


NAMED = "refused with a message that names it"
ALONE: tuple[tuple[str, str, str, Callable[[Stage], str]], ...] = (
    ("documents of another", "documents.npz of another block", NAMED, _documents_of_another),
    ("one too many", "a folder that the manifest does not name", "works", _stranger),
    ("alone", "a block named as a datastore", "works", _alone),
    ("moved", "the folder renamed", "works, the same loss", _moved),
    ("all as one", "the same text in blocks and in one", "about the same loss", _as_flat),
    *(
        (f"making.json {name}", f"blocks without a manifest, making.json {name}", NAMED, play)
        for name, text in (
            ("empty", b""),
            ("of another kind", sealed.sealed({"format": "cake", "version": 1})),
            ("garbage", b"\xff" * 100),
        )
        for play in (partial(_in_the_making, text=text, says="making"),)
    ),
)
