"""Paths that cannot be written: each kind, for each flag that names one."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from fault_cases.stage import Case, SkippedCase, Stage, mount
from fault_cases.world import BLOCKS, INDEX, K, knnlm

MUST = "refused before work starts, naming the flag or the path; nothing changed"


def _folder(stage: Stage) -> str:
    (stage.folder / "folder").mkdir()
    (stage.folder / "folder" / "precious").write_text("mine")
    return "folder"


def _below_a_file(stage: Stage) -> str:
    (stage.folder / "file").write_text("mine")
    return "file/new.npz"


def _device(stage: Stage) -> str:
    """A device of its own, since a fault would replace it by a file; a pipe where not allowed."""
    path = stage.folder / "device"
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        os.mkfifo(path)
    return "device"


def _dangling(stage: Stage) -> str:
    (stage.folder / "link").symlink_to("nowhere/there")
    return "link"


def _read_only(stage: Stage) -> str:
    place = stage.folder / "readonly"
    try:
        mount(place, "ro,size=4k")
        stage._mounts.append(place)
    except SkippedCase:
        if os.geteuid() == 0:
            raise
        place.chmod(0o555)
    return "readonly/new"


def _file(stage: Stage) -> str:
    (stage.folder / "precious").write_text("mine")
    return "precious"


PATHS: dict[str, Callable[[Stage], str]] = {
    "a folder": _folder,
    "below a file": _below_a_file,
    "300 letters": lambda _: "x" * 300,
    "a device": _device,
    "a dangling link": _dangling,
    "a read-only place": _read_only,
    "below /proc": lambda _: "/proc/new/file",
    "the folder itself": lambda _: ".",
    "the root": lambda _: "/",
    "an empty name": lambda _: "",
    "a long name below a new folder": lambda _: "new/" + "y" * 256,
}
#: A folder that is to be made must not be there, in any form.
FOLDERS = {**PATHS, "a file": _file}


def _results(stage: Stage, path: str) -> list[object]:
    return stage.world.evaluate("--results-json", path)


def _score_table(stage: Stage, path: str) -> list[object]:
    return stage.world.evaluate("--score-table", path)


def _index(stage: Stage, path: str) -> list[object]:
    return knnlm("build-index", "--dstore", stage.store(), *INDEX, "--indexfile", path)


def _plot(stage: Stage, path: str) -> list[object]:
    table = stage.world.tables / "knn.npz"
    return knnlm("tune", "--dstore", stage.store(), "--score-table", table, "--plot", path)


def _tune_table(stage: Stage, path: str) -> list[object]:
    words = knnlm("tune", "--dstore", stage.store(), "--score-table", path, "--data")
    return [*words, stage.world.data, "--path", stage.world.checkpoint(), *K, *BLOCKS]


def _save(stage: Stage, path: str) -> list[object]:
    words = knnlm("save", stage.world.data, "--path", stage.world.checkpoint())
    return [*words, "--dstore", path, *BLOCKS]


def _dstore_mmap(stage: Stage, path: str) -> list[object]:
    return stage.world.save(path)


def _no_keys(stage: Stage, path: str) -> list[object]:
    return stage.world.save(path, "--no-save-keys", "--recipe", "IVF8,SQ8")


def _compress(stage: Stage, path: str) -> list[object]:
    return knnlm("compress", "--dstore", stage.store(), "--out", path, "--pca", 8)


def _import(stage: Stage, path: str) -> list[object]:
    old = ("--dstore", stage.world.old, "--dstore-size", stage.world.rows, "--dstore-fp16")
    return knnlm("import", *old, "--out", path)


FLAGS: dict[str, tuple[Callable[[Stage, str], list[object]], dict[str, Callable[[Stage], str]]]] = {
    "--results-json": (_results, PATHS),
    "--score-table": (_score_table, PATHS),
    "--indexfile": (_index, PATHS),
    "--plot": (_plot, PATHS),
    "tune --score-table": (_tune_table, PATHS),
    "--dstore-mmap": (_dstore_mmap, FOLDERS),
    "save --dstore": (_save, FOLDERS),
    "--no-save-keys": (_no_keys, FOLDERS),
    "compress --out": (_compress, FOLDERS),
    "import --out": (_import, FOLDERS),
}


def cases() -> Iterator[Case]:
    """Every path with every flag, then two outputs of one name."""
    for flag, (command, paths) in FLAGS.items():
        for name, plant in paths.items():
            play = partial(_refused, command=command, plant=plant, flag=flag)
            yield Case("writing", f"{flag} {name}", f"{flag}: {name}", MUST, play)
    for name, both in TWICE.items():
        done = f"{name}, one path for both"
        yield Case("writing", f"one name: {name}", done, MUST, partial(_twice, command=both))


#: Flags that name a path by another flag.
SAME = {"--no-save-keys": ("--dstore-mmap",)}


def _refused(
    stage: Stage,
    *,
    command: Callable[[Stage, str], list[object]],
    plant: Callable[[Stage], str],
    flag: str,
) -> str:
    path = plant(stage)
    words = command(stage, path)
    about = [
        flag.split()[-1],
        *SAME.get(flag, ()),
        "cannot be (written|used)",
        "exists",
        "file name too long",
    ]
    return stage.refused(words, "|".join(about), patience=30)


def _both_results(stage: Stage) -> list[object]:
    return stage.world.evaluate("--results-json", "same", "--score-table", "./same")


def _table_and_store(stage: Stage) -> list[object]:
    return stage.world.save("same", "--score-table", "same", split="test")


def _results_and_store(stage: Stage) -> list[object]:
    return stage.world.save("same", "--results-json", "same", split="test")


def _results_in_store(stage: Stage) -> list[object]:
    store = stage.store()
    return stage.world.knn(store, "--results-json", Path(store, "manifest.json"))


def _table_on_index(stage: Stage) -> list[object]:
    store = stage.store()
    return stage.world.knn(store, "--score-table", store / "knn.index")


def _table_on_checkpoint(stage: Stage) -> list[object]:
    checkpoint = stage.folder / "model.pt"
    checkpoint.write_bytes(stage.world.checkpoint().read_bytes())
    return stage.world.evaluate("--score-table", "model.pt", model=checkpoint)


def _index_on_keys(stage: Stage) -> list[object]:
    store = stage.store()
    return knnlm("build-index", "--dstore", store, *INDEX, "--indexfile", store / "keys.npy")


def _plot_on_table(stage: Stage) -> list[object]:
    store, table = stage.store(), stage.folder / "t.npz"
    table.write_bytes((stage.world.tables / "knn.npz").read_bytes())
    return knnlm("tune", "--dstore", store, "--score-table", table, "--plot", table)


def _plot_on_calibration(stage: Stage) -> list[object]:
    store = stage.store()
    table = stage.world.tables / "knn.npz"
    plot = store / "calibration.json"
    return knnlm("tune", "--dstore", store, "--score-table", table, "--plot", plot)


def _out_is_in(stage: Stage) -> list[object]:
    store = stage.store()
    return knnlm("compress", "--dstore", store, "--out", store, "--pca", 8)


TWICE: dict[str, Callable[[Stage], list[object]]] = {
    "--results-json and --score-table": _both_results,
    "--dstore-mmap and --score-table": _table_and_store,
    "--dstore-mmap and --results-json": _results_and_store,
    "--results-json and the manifest that is read": _results_in_store,
    "--score-table and the index that is read": _table_on_index,
    "--score-table and the checkpoint that is read": _table_on_checkpoint,
    "--indexfile and the keys that are read": _index_on_keys,
    "--plot and the table that is read": _plot_on_table,
    "--plot and the calibration": _plot_on_calibration,
    "compress --out and --dstore": _out_is_in,
}


def _twice(stage: Stage, *, command: Callable[[Stage], list[object]]) -> str:
    return stage.refused(command(stage), r"same|exists|written|inside|read|belongs|replace")
