"""Disks that are full, at every write of every command that writes."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from fault_cases.stage import BadOutcome, Case, Stage, check_manners, check_message, snapshot
from fault_cases.world import INDEX, knnlm

MUST = "one message that names the disk, what was there intact, space given back; or it fits"
PAGE = 4096
#: What a message about a full disk holds.
FULL = "disk|room|space|larger file|too large"
Command = Callable[[Stage, Path], list[object]]


def _save(stage: Stage, disk: Path) -> list[object]:
    return stage.world.save(disk / "new")


def _no_keys(stage: Stage, disk: Path) -> list[object]:
    return stage.world.save(disk / "new", "--no-save-keys", "--recipe", "IVF8,SQ8")


def _flat(stage: Stage, disk: Path) -> list[object]:
    return knnlm("build-index", "--dstore", disk / "store", "--recipe", "Flat")


def _lists(stage: Stage, disk: Path) -> list[object]:
    return knnlm("build-index", "--dstore", disk / "store", *INDEX)


def _tune(stage: Stage, disk: Path) -> list[object]:
    table = stage.world.tables / "knn.npz"
    return knnlm("tune", "--dstore", disk / "store", "--score-table", table)


def _compress(stage: Stage, disk: Path) -> list[object]:
    return knnlm("compress", "--dstore", stage.world.store, "--out", disk / "new", "--pca", 12)


def _merge(stage: Stage, disk: Path) -> list[object]:
    return knnlm("compress", "--dstore", stage.world.store, "--out", disk / "new", "--merge", 4)


def _import(stage: Stage, disk: Path) -> list[object]:
    old = ("--dstore", stage.world.old, "--dstore-size", stage.world.rows, "--dstore-fp16")
    return knnlm("import", *old, "--out", disk / "new")


def _score_table(stage: Stage, disk: Path) -> list[object]:
    return stage.world.knn(stage.world.store, "--score-table", disk / "t.npz")


def _results(stage: Stage, disk: Path) -> list[object]:
    return stage.world.knn(stage.world.store, "--results-json", disk / "r.json")


#: Command, whether it works in a copy of the datastore there, and bytes free, all of them too few
#: but for the last.
COMMANDS: dict[str, tuple[Command, bool, tuple[int, ...]]] = {
    "save": (_save, False, (0, 8, 48, 84, 88, 96, 1024)),
    "save --no-save-keys": (_no_keys, False, (0, 8, 20, 40, 56, 64, 1024)),
    "build-index Flat": (_flat, True, (0, 8, 64, 160, 1024)),
    "build-index IVF8": (_lists, True, (0, 8, 32, 100, 180, 2048)),
    "tune": (_tune, True, (0, 4, 16, 64, 128, 2048)),
    "compress --pca": (_compress, False, (0, 8, 48, 68, 76, 1024)),
    "compress --merge": (_merge, False, (0, 8, 48, 2048)),
    "import": (_import, False, (0, 8, 48, 84, 88, 96, 1024)),
    "--score-table": (_score_table, False, (0, 4, 32, 64, 2048)),
    "--results-json": (_results, False, (0, 1024)),
}
#: In KiB; what a command prints has less.
LIMITS: dict[str, tuple[int, ...]] = {
    "save": (24, 40, 80),
    "save --no-save-keys": (24, 40),
    "build-index Flat": (24, 64, 160),
    "build-index IVF8": (24, 64, 160),
    "tune": (24, 64),
    "compress --pca": (24, 40),
    "import": (24, 40, 80),
    "--score-table": (24, 64),
}


def cases() -> Iterator[Case]:
    """A disk of a few sizes for each command, then a limit of the files' sizes."""
    for name, (command, inside, sizes) in COMMANDS.items():
        for size in sizes:
            enough = size == sizes[-1]
            play = partial(_full, command=command, inside=inside, size=size * 1024, enough=enough)
            done = f"{name} with {size} KiB free"
            yield Case("writing", f"disk: {done}", done, MUST, play)
    for name, limits in LIMITS.items():
        command, inside, _ = COMMANDS[name]
        for limit in limits:
            play = partial(_limited, command=command, inside=inside, limit=limit * 1024)
            done = f"{name} where no file may exceed {limit} KiB"
            yield Case("writing", f"limit: {done}", done, MUST, play)
    yield Case(
        "writing",
        "disk: figures of an evaluation whose last write fails",
        "--results-json onto a disk that is full by then",
        "a message, and the figures printed all the same",
        _figures,
    )
    yield Case(
        "writing",
        "disk: n-grams cannot be kept",
        "n-grams counted for a datastore on a full disk",
        "evaluation works, with a warning",
        _unkept,
    )


def fill(disk: Path, free: int) -> None:
    """Leaves so many bytes of a disk free."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        left = os.statvfs(disk)
        size = left.f_bavail * left.f_frsize - free
        if size > 0:
            os.posix_fallocate(file.fileno(), 0, size)


def _prepared(stage: Stage, inside: bool, size: int) -> Path:
    disk = stage.disk(8 * 2**20)
    if inside:
        shutil.copytree(stage.world.store, disk / "store")
        # The index is made anew over an old one, which must survive.
    fill(disk, size)
    return disk


def _full(stage: Stage, *, command: Command, inside: bool, size: int, enough: bool) -> str:
    disk = _prepared(stage, inside, size)
    before = os.statvfs(disk).f_bavail
    changes = ["disk/new/*", "disk/*.npz", "disk/*.json", "disk/store/knn.*"]
    words, there = command(stage, disk), snapshot(disk)
    ran = stage.run(words, changes=[*changes, "disk/store/calibration*"])
    if ran.code and any(snapshot(disk).get(name) != state for name, state in there.items()):
        raise BadOutcome("what was there has changed")
    return _judged(disk, ran.code == 0, enough, before) or check_message(ran, FULL)


def _judged(disk: Path, worked: bool, enough: bool, before: int) -> str:
    if worked:
        return "it fitted"
    if enough:
        raise BadOutcome("failed although there was room")
    after = os.statvfs(disk).f_bavail
    if after < before - 1:
        raise BadOutcome(f"{(before - after) * PAGE:,} bytes not given back")
    if (disk / "new").exists():
        raise BadOutcome("half of it was published")
    return ""


def _limited(stage: Stage, *, command: Command, inside: bool, limit: int) -> str:
    folder = stage.folder / "disk"
    folder.mkdir()
    if inside:
        shutil.copytree(stage.world.store, folder / "store")

    words = command(stage, folder)
    changes = ["disk/new/*", "disk/*.npz", "disk/*.json"]
    ran = stage.run(words, changes=changes, limits={resource.RLIMIT_FSIZE: limit})
    if ran.code == 0:
        return "it fitted"
    if (folder / "new").exists():
        raise BadOutcome("half of it was published")
    return check_message(ran, FULL)


def _figures(stage: Stage) -> str:
    disk = _prepared(stage, False, 0)
    words = stage.world.knn(stage.world.store, "--results-json", disk / "r.json")
    ran = stage.start(words).wait()
    check_manners(ran)
    if ran.code == 0:
        raise BadOutcome("was accepted, but nothing can have been written")
    if "perplexity" not in ran.out.lower():
        raise BadOutcome(f"the figures are lost: {ran.last}")
    return check_message(ran, FULL) + "; figures printed"


def _unkept(stage: Stage) -> str:
    disk = stage.disk(2**20)
    store = disk / "store"
    shutil.copytree(stage.bare(), store)
    fill(disk, 0)
    words = ("--experts", "ngram", "--ngram-lmbda", "0.2", "--dstore-filename", store)
    stage.works(stage.world.evaluate(*words), says="not kept")
    return "works, and says that the counts are not kept"
