"""Saves and evaluations in shares, and searches on Ray."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator

from fault_cases import sealed
from fault_cases.archives import load, pack, with_card
from fault_cases.stage import BadOutcome, Case, Stage, check_close
from fault_cases.typed import HUGE, Command, Table, flag_cases
from fault_cases.world import CUT, DOCUMENTS, knnlm

MUST = "refused with a message that names the flag or the file; nothing is changed"
#: Saving in blocks.
SAVE: Table = {
    "block-rows 0": ("--block-rows 0", "--block-rows"),
    "block-rows -5": ("--block-rows=-5", "--block-rows"),
    "shards 0": ("--num-shards 0", "--num-shards"),
    "shard 2 of 2": ("--num-shards 2 --shard-id 2", "--shard-id"),
    "shard -1": ("--num-shards 2 --shard-id=-1", "--shard-id"),
    "a shard and no number": ("--shard-id 1", "--shard-id"),
    "more shards than blocks": ("--num-shards 99", "shards"),
    "shards of one block": ("--num-shards 2 --block-rows 1000000", "shards"),
    "results of a share": ("--num-shards 2 --results-json r.json", "--results-json"),
    "a table of a share": ("--num-shards 2 --score-table t.npz", "--score-table"),
}
#: ``report --join FILES``, with the world's shares: I.json and I.npz.
JOIN: Table = {
    "one share": ("0.json", "share"),
    "the same share twice": ("0.json 0.json", "share|twice"),
    "a copy of the same share": ("0.json copy.json", "share"),
    "one that is not there": ("0.json nowhere.json", "nowhere"),
    "a folder": ("0.json .", "results|file"),
    "a whole run": ("0.json whole.json", "whole.json"),
    "k 32": ("0.json k.json", "k.json"),
    "another lambda": ("0.json lambda.json", "lambda.json"),
    "another split": ("0.json valid.json", "valid.json"),
    "another datastore": ("0.json flat.json", "flat.json"),
    "of three": ("0.json third.json", "third.json"),
    "tables of two runs": ("0.npz k.npz", "k.npz"),
    "one table": ("0.npz", "share"),
    "a table and the others' results": ("0.json 1.json 0.npz", "share"),
    "results under a table's name": ("0.npz renamed.npz", "renamed.npz"),
    "garbage": ("0.json garbage.json", "garbage.json"),
    "half a file": ("0.json half.json", "half.json"),
    "written over what is read": ("0.json 1.json --results-json 1.json", "1.json"),
    "a table of results alone": ("0.json 1.json --score-table t.npz", "--score-table"),
    "and a datastore": ("0.json 1.json --dstore STORE", "--dstore"),
}
#: An evaluation over the datastore in blocks.
RAY: Table = {
    "a word": ("--knn-ray somewhere", "--knn-ray"),
    "empty": ("--knn-ray=", "--knn-ray"),
    "a port alone": ("--knn-ray :6379", "--knn-ray"),
    "port 0": ("--knn-ray localhost:0", "--knn-ray"),
    "port 99999": ("--knn-ray localhost:99999", "--knn-ray"),
    "a web address": ("--knn-ray http://localhost:6379", "--knn-ray"),
    "nobody there": ("--knn-ray 127.0.0.1:1", "127.0.0.1:1"),
    "shards 0": ("--knn-ray local --knn-shards 0", "--knn-shards"),
    "shards -1": ("--knn-ray local --knn-shards=-1", "--knn-shards"),
    "shards of 30 digits": (f"--knn-ray local --knn-shards {HUGE}", "--knn-shards"),
    "more shards than blocks": ("--knn-ray local --knn-shards 99", "--knn-shards"),
    "copies 0": ("--knn-ray local --knn-replicas 0", "--knn-replicas"),
    "copies -1": ("--knn-ray local --knn-replicas=-1", "--knn-replicas"),
    "copies of 30 digits": (f"--knn-ray local --knn-replicas {HUGE}", "--knn-replicas"),
    "shards without Ray": ("--knn-shards 2", "--knn-ray"),
    "copies without Ray": ("--knn-replicas 2", "--knn-ray"),
    "an index elsewhere": ("--knn-ray local --indexfile x.index", "--indexfile|x.index"),
    "a mapped index": ("--knn-ray local --mmap-index", "--mmap-index"),
    "a GPU": ("--knn-ray local --knn-device cuda", "--knn-device|cuda"),
    "probe 9 of 8 lists": ("--knn-ray local --probe 9", "--probe"),
    "probe 0": ("--knn-ray local --probe 0", "--probe"),
    "k above the entries": ("--knn-ray local --k 10000000", "--k"),
    "one block": ("--knn-ray local --dstore-filename FLAT", "block"),
    "no neighbours asked": ("--knn-ray local --experts cache --cache-lmbda 0.1", "--knn-ray|knn"),
}


def cases() -> Iterator[Case]:
    """Flags by command, then what is done in several steps."""
    commands: tuple[Command, ...] = (
        ("save in blocks", SAVE, lambda stage: stage.world.save("new", *DOCUMENTS, *CUT)),
        ("join", JOIN, _join),
        ("Ray", RAY, lambda stage: stage.world.knn(stage.world.cut)),
    )
    yield from flag_cases("blocks", MUST, commands, _known)
    for name, done, must, step in STEPS:
        yield Case("blocks", name, done, must, step)


def _known(stage: Stage) -> dict[str, object]:
    return {"FLAT": stage.world.store, "STORE": stage.world.cut}


def _join(stage: Stage) -> list[object]:
    _files_to_join(stage)
    return knnlm("report", "--join")


def _files_to_join(stage: Stage) -> None:
    """The world's shares, and files of other runs, made from them or run."""
    world, folder = stage.world, stage.folder
    for file in world.shares.iterdir():
        shutil.copy(file, folder / file.name)
    second = json.loads((folder / "1.json").read_text())
    for name, of_share in (
        ("k", {"described": {"knn": {**second["share"]["described"]["knn"], "k": 32}}}),
        ("lambda", {"flags": {**second["share"]["flags"], "lmbda": 0.5}}),
        ("flat", {"datastores": ["f" * 64]}),
        ("third", {"of": 3}),
    ):
        share = {**second["share"], **of_share}
        (folder / f"{name}.json").write_text(json.dumps({**second, "share": share}))
    (folder / "valid.json").write_text(json.dumps({**second, "split": "valid"}))
    whole = {name: value for name, value in second.items() if name != "share"}
    (folder / "whole.json").write_text(json.dumps(whole))
    shutil.copy(folder / "0.json", folder / "copy.json")
    shutil.copy(folder / "1.json", folder / "renamed.npz")
    (folder / "garbage.json").write_bytes(b"\xff" * 100)
    (folder / "half.json").write_text(json.dumps(second)[:300])
    table = with_card(
        load(folder / "1.npz"),
        lambda card: [of["described"]["knn"].update(k=32) for of in (card, card["share"])],
    )
    (folder / "k.npz").write_bytes(pack(table))


# Several steps


def _goes_on(stage: Stage) -> str:
    """Half a save is gone on with by whoever saves the same, and by nobody else."""
    world, share = stage.world, ("--num-shards", 2, "--shard-id")
    words = world.save("new", *DOCUMENTS, *CUT)
    stage.works([*words, *share, 0])
    stage.refused(knnlm("save", "--join", "new"), "not complete|missing")
    stage.refused(world.knn("new"), "in the making|no datastore")
    stage.refused([*words, "--gen-subset", "valid"], "new exists already")  # it is one block
    for other in (
        ("--block-rows", 800),
        ("--max-tokens", 256),
        ("--tokens-per-sample", 24),
        ("--path", world.checkpoint("other")),
        ("--dstore-fp32",),
        ("--document-boundary", "w2"),
    ):
        stage.refused([*words, *other], "in the making|making")
    stage.works([*words, *share, 1], changes=["new/*"])
    made, right = (sealed.MANIFEST.read(path) for path in (stage.folder / "new", world.cut))
    if made["blocks"] != right["blocks"]:
        raise BadOutcome("other blocks than one process makes")
    return "refused seven times, then made as by one process"


def _joins_nothing(stage: Stage) -> str:
    stage.refused(knnlm("save", "--join", "nowhere"), "nowhere")
    stage.refused(knnlm("save", "--join", stage.cut()), "making")
    return stage.refused(knnlm("save", "--join", "x", "--dstore", "y"), "--join")


def _joins(stage: Stage) -> str:
    """Two shares, in any order, come to what one process comes to."""
    for file in stage.world.shares.iterdir():
        shutil.copy(file, stage.folder / file.name)
    outputs = ("--results-json", "r.json", "--score-table", "t.npz")
    stage.works(knnlm("report", "--join", "1.json", "0.json", "1.npz", "0.npz", *outputs))
    check_close(
        json.loads((stage.folder / "r.json").read_text())["loss"], stage.world.losses["cut"]
    )
    return "the loss of one process"


def _on_ray(stage: Stage) -> str:
    """Shards of a Ray that ends with the command; one of them is given a damaged piece then."""
    store = stage.cut()
    words = stage.world.knn(store, "--knn-ray", "local", "--knn-shards", 2)
    stage.works(words, loss=stage.world.losses["cut"], real=True, patience=150)
    (piece,) = (store / "blocks" / "000002").glob("piece-*.npy")
    os.truncate(piece, 500)
    return stage.refused(words, "piece", real=True, patience=150)


STEPS: tuple[tuple[str, str, str, Callable[[Stage], str]], ...] = (
    ("go on with another save", "half a save, then other flags", MUST, _goes_on),
    ("join no blocks", "save --join of what is not in the making", MUST, _joins_nothing),
    ("join shares", "report --join of both", "the loss of one process", _joins),
    ("shards on Ray", "--knn-ray local; then a piece cut off", "the loss; refused", _on_ray),
)
