"""Datastores and indexes that are damaged, of another making, or wrong in what they hold."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fault_cases import sealed
from fault_cases.stage import BadOutcome, Case, Stage, check_close, check_manners, check_message
from fault_cases.world import INDEX, K, knnlm, write_old

FILES = ("manifest.json", "keys.npy", "values.npy", "knn.index", "calibration.json", "ngram.npz")
REFUSED = "refused with a message that names the file"


def _flip(where: float) -> Callable[[Path], None]:
    def spoil(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[min(int(len(data) * where), len(data) - 1)] ^= 1
        file.write_bytes(bytes(data))

    return spoil


def _cut(keep: float, less: int = 0) -> Callable[[Path], None]:
    def spoil(file: Path) -> None:
        os.truncate(file, int(file.stat().st_size * keep) - less)

    return spoil


def _grow(file: Path) -> None:
    with file.open("ab") as end:
        end.write(b"x")


def _zero(file: Path) -> None:
    size = file.stat().st_size
    with file.open("r+b") as data:
        data.seek(size // 2)
        data.write(bytes(min(64, size // 4)))


def _linked(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


SPOILS: dict[str, Callable[[Path], None]] = {
    "a bit of its head flipped": _flip(0.01),
    "a bit in its middle flipped": _flip(0.5),
    "a bit near its end flipped": _flip(0.97),
    "its last two bytes cut off": _cut(1.0, 2),
    "half of it cut off": _cut(0.5),
    "emptied": _cut(0.0),
    "a byte added": _grow,
    "64 bytes zeroed": _zero,
    "a dangling link in its place": _linked,
    "a folder in its place": _folder,
}


def cases() -> Iterator[Case]:
    """Bytes, then indexes, then what a datastore holds."""
    for file in FILES:
        for name, spoil in SPOILS.items():
            spoilt = partial(_damaged, file=file, spoil=spoil)
            yield Case("reading", f"{file}: {name}", f"{file}: {name}", REFUSED, spoilt)
    yield from _gone()
    for kind, rows in (("index", INDEXES), ("content", CONTENTS), ("import", OLD)):
        for name, done, must, play in rows:
            yield Case("reading", f"{kind}: {name}", done, must, play)


def _damaged(stage: Stage, *, file: str, spoil: Callable[[Path], None]) -> str:
    """Both ``verify`` and an evaluation that reads the file find it."""
    store = stage.store()
    spoil(store / file)
    name = file.split(".")[0]
    verified = stage.refused(knnlm("verify", "--dstore", store), name)
    if file == "ngram.npz" and not (store / file).is_file():
        # Counts that are not there are made anew.
        right = stage.works(_reads(stage, stage.store("right"), file)).loss
        stage.works(_reads(stage, store, file), loss=right, changes=["store/ngram.npz"])
        return f"{verified}; counted anew in an evaluation"
    stage.refused(_reads(stage, store, file), name)
    return verified


def _reads(stage: Stage, store: Path, file: str) -> list[object]:
    """An evaluation that reads it."""
    if file == "calibration.json":
        return stage.world.calibrated(store)
    if file == "ngram.npz":
        weights = ("--experts", "ngram", "--ngram-lmbda", "0.2")
        return stage.world.evaluate(*weights, "--dstore-filename", store)
    return stage.world.knn(store)


def _gone() -> Iterator[Case]:
    def play(stage: Stage, file: str) -> str:
        store = stage.store()
        (store / file).unlink()
        return stage.refused(stage.world.knn(store), file.split(".")[0])

    for file in ("manifest.json", "keys.npy", "values.npy", "knn.index"):
        yield Case(
            "reading", f"{file}: removed", f"{file} removed", REFUSED, partial(play, file=file)
        )


# Indexes


def _foreign(stage: Stage, make: Callable[[Any, np.ndarray], Any], name: str = "f.index") -> Path:
    """An index file that FAISS itself has written, made of the datastore's keys."""
    import faiss

    keys = np.load(stage.world.store / "keys.npy").astype(np.float32)
    path = stage.folder / name
    faiss.write_index(make(faiss, keys), str(path))
    return path


def _flat(faiss: Any, keys: np.ndarray) -> Any:
    index = faiss.IndexFlatL2(keys.shape[1])
    index.add(keys)
    return index


def _with_ids(ids: Callable[[int], np.ndarray]) -> Callable[[Any, np.ndarray], Any]:
    def make(faiss: Any, keys: np.ndarray) -> Any:
        index = faiss.index_factory(keys.shape[1], "IVF4,Flat")
        index.train(keys)
        index.add_with_ids(keys, ids(len(keys)))
        return index

    return make


def _inner(faiss: Any, keys: np.ndarray) -> Any:
    index = faiss.IndexFlatIP(keys.shape[1])
    index.add(keys)
    return index


def _manhattan(faiss: Any, keys: np.ndarray) -> Any:
    index = faiss.IndexFlat(keys.shape[1], faiss.METRIC_L1)
    index.add(keys)
    return index


def _narrow(faiss: Any, keys: np.ndarray) -> Any:
    return _flat(faiss, np.ascontiguousarray(keys[:, :8]))


def _short(faiss: Any, keys: np.ndarray) -> Any:
    return _flat(faiss, keys[:100])


def _untrained(faiss: Any, keys: np.ndarray) -> Any:
    return faiss.index_factory(keys.shape[1], "IVF4,Flat")


def _refuses_foreign(
    stage: Stage, *, make: Callable[[Any, np.ndarray], Any], says: str, place: str = "flag"
) -> str:
    path = _foreign(stage, make)
    store = stage.store()
    if place == "flag":
        return stage.refused(stage.world.knn(store, "--indexfile", path), says)
    for old in store.glob("knn.index*"):
        old.unlink()
    shutil.move(path, store / "knn.index")
    return stage.refused(stage.world.knn(store), says)


def _takes_foreign(stage: Stage) -> str:
    """An exact index of somebody else's is as good as exact search."""
    path, store = _foreign(stage, _flat), stage.store()
    ran = stage.works(stage.world.knn(store, "--indexfile", path))
    _exact(stage, store, ran.loss)
    return f"accepted, with the loss of exact search, {ran.loss}"


def _exact(stage: Stage, store: Path, loss: float | None) -> None:
    """Compares a loss with that of an exact index."""
    path = stage.folder / "exact.index"
    stage.works(knnlm("build-index", "--dstore", store, "--recipe", "Flat", "--indexfile", path))
    right = stage.works(stage.world.knn(store, "--indexfile", path)).loss
    assert right is not None
    check_close(loss, right)


def _bytes_for_index(stage: Stage, *, data: Callable[[bytes], bytes], flag: bool) -> str:
    import faiss

    store = stage.store()
    flat = faiss.serialize_index(_flat(faiss, np.load(store / "keys.npy").astype(np.float32)))
    path = stage.folder / "x.index"
    path.write_bytes(data(flat.tobytes()))
    if flag:
        return stage.refused(stage.world.knn(store, "--indexfile", path), "index")
    for old in store.glob("knn.index*"):
        old.unlink()
    shutil.move(path, store / "knn.index")
    stage.refused(knnlm("verify", "--dstore", store), "index")
    return stage.refused(stage.world.knn(store), "index")


def _card_of_another(stage: Stage) -> str:
    """The card of an index of the same datastore that visits more lists."""
    store, other = stage.store(), stage.folder / "other.index"
    recipe = ("--recipe", "IVF4,Flat", "--probe", "3")
    stage.works(knnlm("build-index", "--dstore", store, *recipe, "--indexfile", other))
    beside = other.with_name("other.index.json")
    if beside.exists():
        shutil.copy(beside, store / "knn.index.json")
    else:
        start, _ = sealed.trailer(store / "knn.index") or (0, 0)
        first, _ = sealed.trailer(other) or (0, 0)
        ours = (store / "knn.index").read_bytes()[:start]
        (store / "knn.index").write_bytes(ours + other.read_bytes()[first:])
    stage.refused(knnlm("verify", "--dstore", store), "knn.index")
    return stage.refused(stage.world.knn(store), "knn.index")


def _card_gone(stage: Stage, *, how: str) -> str:
    """Without its card an index must not be opened, whatever stands in the card's place."""
    store = stage.store()
    index, beside = store / "knn.index", store / "knn.index.json"
    if not beside.exists():
        start, _ = sealed.trailer(index) or (0, 0)
        index.write_bytes(index.read_bytes()[:start])
    else:
        beside.unlink()
    if how == "a folder":
        beside.mkdir()
    elif how == "a dangling link":
        beside.symlink_to("nowhere")
    elif how == "an empty file":
        beside.touch()
    stage.refused(knnlm("verify", "--dstore", store), "index")
    stage.refused(stage.world.calibrated(store, "--experts", "knn"), "index")
    return stage.refused(stage.world.knn(store), "index")


def _index_of_another(stage: Stage) -> str:
    """An index with as many keys of the same width, of another datastore."""
    store, other = stage.store(), stage.folder / "other"
    stage.works(stage.world.save(other, "--dstore-fp32"))
    stage.works(knnlm("build-index", "--dstore", other, *INDEX))
    for file in other.glob("knn.index*"):
        shutil.copy(file, store / file.name)
    stage.refused(knnlm("verify", "--dstore", store), "another datastore")
    return stage.refused(stage.world.knn(store), "another datastore")


def _named_index_of_another(stage: Stage) -> str:
    store, other = stage.store(), stage.folder / "other"
    stage.works(stage.world.save(other, "--dstore-fp32"))
    stage.works(knnlm("build-index", "--dstore", other, *INDEX))
    flags = ("--indexfile", other / "knn.index")
    return stage.refused(stage.world.knn(store, *flags), "another datastore")


def _moved_index(stage: Stage) -> str:
    """An index goes on being one in another place, with all that belongs to it."""
    store, place = stage.store(), stage.folder / "elsewhere"
    place.mkdir()
    for file in store.glob("knn.index*"):
        shutil.move(file, place / file.name)
    words = stage.world.knn(store, "--indexfile", place / "knn.index")
    stage.works(words, loss=stage.world.losses["knn"])
    return "works, with the same loss"


INDEXES: tuple[tuple[str, str, str, Callable[[Stage], str]], ...] = (
    *(
        (f"card gone, {how}", f"the card taken away, {how} in its place", REFUSED, play)
        for how in ("nothing", "a folder", "a dangling link", "an empty file")
        for play in (partial(_card_gone, how=how),)
    ),
    ("card of another", "another index's card in the place of its own", REFUSED, _card_of_another),
    ("of another datastore", "another datastore's index", REFUSED, _index_of_another),
    ("of another, named", "the same by --indexfile", REFUSED, _named_index_of_another),
    ("moved", "moved, and named by --indexfile", "works, the same loss", _moved_index),
    (
        "foreign",
        "an exact index that FAISS wrote, by --indexfile",
        "works, the loss of exact search",
        _takes_foreign,
    ),
    *(
        (f"foreign, {name}, {place}", f"{name}, {how}", REFUSED, play)
        for name, make, says in (
            ("negative ids", _with_ids(lambda n: -np.arange(1, n + 1)), "ids|index"),
            ("ids beyond the store", _with_ids(lambda n: np.arange(n) + 1), "ids|index"),
            ("huge ids", _with_ids(lambda n: np.arange(n) + 2**40), "ids|index"),
            ("ids twice", _with_ids(lambda n: np.zeros(n, np.int64)), "ids|index"),
            ("metric L1", _manhattan, "metric|index"),
            ("another width", _narrow, "width|index"),
            ("fewer keys", _short, "keys|index"),
            ("untrained", _untrained, "index|keys"),
        )
        for place, how in (("flag", "by --indexfile"), ("store", "in the datastore"))
        for play in (partial(_refuses_foreign, make=make, says=says, place=place),)
    ),
    *(
        (f"{name}, {place}", f"{name} as the index, {how}", REFUSED, play)
        for name, data in (
            ("garbage", lambda data: os.urandom(len(data))),
            ("an empty file", lambda data: b""),
            ("four letters", lambda data: data[:4]),
            ("half an index", lambda data: data[: len(data) // 2]),
            ("zeros", lambda data: data[:4] + bytes(len(data) - 4)),
            ("a huge count", lambda data: data[:8] + b"\xff" * 8 + data[16:]),
            ("ones", lambda data: data[:4] + b"\xff" * (len(data) - 4)),
        )
        for place, how in (("flag", "by --indexfile"), ("store", "in the datastore"))
        for play in (partial(_bytes_for_index, data=data, flag=place == "flag"),)
    ),
)


# What a datastore holds


def _rewritten(stage: Stage, file: str, change: Callable[[np.ndarray], None]) -> Path:
    """A datastore of other numbers whose checksums and seal are right, and its index anew."""
    store = stage.bare()
    array = np.load(store / file)
    change(array)
    np.save(store / file, array)
    manifest = json.loads((store / "manifest.json").read_text())
    data = (store / file).read_bytes()
    manifest["files"][file] = {
        "bytes": len(data),
        "chunks": [hashlib.sha256(data).hexdigest()[:16]],
    }
    sealed.MANIFEST.write(store, sealed.sealed(manifest))
    return store


def _put(rows: slice, value: float) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array[rows] = value

    return change


def _wrong_content(
    stage: Stage, *, file: str, change: Callable[[np.ndarray], None], says: str
) -> str:
    store = _rewritten(stage, file, change)
    verified = stage.refused(knnlm("verify", "--dstore", store), says)
    if file == "keys.npy":
        stage.refused(knnlm("build-index", "--dstore", store, *INDEX), says, changes=["store/*"])
    return verified


def _wrong_content_evaluated(
    stage: Stage, *, file: str, change: Callable[[np.ndarray], None], says: str
) -> str:
    """With an index of the right keys, so that evaluation comes to read the wrong ones."""
    right, store = stage.world.store, _rewritten(stage, file, change)
    import faiss

    keys = np.load(right / "keys.npy").astype(np.float32)
    path = stage.folder / "x.index"
    faiss.write_index(_flat(faiss, keys), str(path))
    flags = ("--indexfile", path, "--knn-sim-func", "l2")
    return stage.refused(stage.world.knn(store, *flags), says)


def _shrinks(stage: Stage, *, words: Callable[[Path], list[object]]) -> str:
    """The file of the keys becomes shorter once it is mapped."""
    store = stage.store()

    def before() -> None:
        class Shrinking(mmap.mmap):
            """A map whose file becomes shorter as soon as it is mapped."""

            def __new__(cls, handle: int, *args: Any, **kwargs: Any) -> Shrinking:
                mapped = super().__new__(cls, handle, *args, **kwargs)
                if Path(f"/proc/self/fd/{handle}").readlink().name == "keys.npy":
                    os.truncate(store / "keys.npy", 4096)
                return mapped

        mmap.mmap = Shrinking  # type: ignore[misc, assignment]

    says = "keys|short|shrank|shrunk|changed|truncated|mapped|went away"
    ran = stage.start(words(store), before=before).wait()
    if ran.code == 0:
        raise BadOutcome(f"was accepted with loss {ran.loss}")
    check_manners(ran)
    return check_message(ran, says)


NAN, VALUES = "NaN|infin|finite", "value|token"
CONTENTS: tuple[tuple[str, str, str, Callable[[Stage], str]], ...] = (
    *(
        (f"{name}, {how}", f"{name} in {file}, seal right; {how}", REFUSED, play)
        for name, file, change, says in (
            ("a key NaN", "keys.npy", _put(slice(5, 6), np.nan), NAN),
            ("keys infinite", "keys.npy", _put(slice(5, 9), np.inf), NAN),
            ("all keys NaN", "keys.npy", _put(slice(None), np.nan), NAN),
            ("a value at V", "values.npy", _put(slice(5, 6), 128), VALUES),
            ("values of 65,535", "values.npy", _put(slice(None), 65535), VALUES),
        )
        for how, play in (
            ("verify", partial(_wrong_content, file=file, change=change, says=says)),
            ("evaluate", partial(_wrong_content_evaluated, file=file, change=change, says=says)),
        )
        # One entry is perhaps never read.
        if not (name in ("a key NaN", "a value at V") and how == "evaluate")
    ),
    (
        "keys shrink, build-index",
        "keys.npy cut while build-index has it mapped",
        "one message, no SIGBUS",
        partial(_shrinks, words=lambda store: knnlm("build-index", "--dstore", store, *INDEX)),
    ),
    (
        "keys shrink, compress",
        "keys.npy cut while compress has it mapped",
        "one message, no SIGBUS",
        partial(
            _shrinks,
            words=lambda store: knnlm("compress", "--dstore", store, "--out", "o", "--pca", "8"),
        ),
    ),
    (
        "keys shrink, verify",
        "keys.npy cut while verify has it mapped",
        "one message, no SIGBUS",
        partial(_shrinks, words=lambda store: knnlm("verify", "--dstore", store)),
    ),
)


# Files of urvashik/knnlm


def _import(
    stage: Stage,
    *,
    keys: Callable[[np.ndarray], None] = lambda _: None,
    values: Callable[[np.ndarray], None] = lambda _: None,
    size: int | str | None = None,
    flags: tuple[object, ...] = (),
    says: str,
) -> str:
    source = stage.world.store
    k, v = np.load(source / "keys.npy"), np.load(source / "values.npy").astype(np.int64)
    keys(k)
    values(v)
    write_old(stage.folder / "old", k, v)
    size = len(v) if size is None else size
    words = knnlm("import", "--dstore", "old", f"--dstore-size={size}", "--dstore-fp16")
    return stage.refused([*words, "--out", "new", "--vocabulary", "128", *flags], says)


def _import_hole(stage: Stage, *, rows: slice) -> str:
    return _import(stage, keys=_put(rows, 0), values=_put(rows, 0), says="zero|fill")


def _imports(stage: Stage) -> str:
    """The same entries give the same loss."""
    old, rows = stage.world.old, stage.world.rows
    words = knnlm("import", "--dstore", old, "--dstore-size", rows, "--dstore-fp16")
    stage.works([*words, "--out", "new", "--vocabulary", "128"])
    stage.works(knnlm("build-index", "--dstore", "new", *INDEX))
    stage.works(stage.world.knn("new"), loss=stage.world.losses["knn"])
    return "works, with the same loss"


def _too_old(stage: Stage) -> str:
    old, rows = stage.world.old, stage.world.rows
    flags = ("--dstore-size", rows - 1, "--dstore-fp16")
    words = stage.world.evaluate("--knnlm", "--dstore-filename", old, *flags, *K)
    return stage.refused(words, "--dstore-size")


OLD: tuple[tuple[str, str, str, Callable[[Stage], str]], ...] = (
    ("in order", "files of urvashik/knnlm imported", "the same loss", _imports),
    ("another size", "their size one too small", REFUSED, _too_old),
    *(
        (name, name, "refused with a message that names it", play)
        for name, play in (
            ("keys NaN", partial(_import, keys=_put(slice(7, 8), np.nan), says=NAN)),
            ("keys infinite", partial(_import, keys=_put(slice(7, 8), -np.inf), says=NAN)),
            ("zero rows at the end", partial(_import_hole, rows=slice(-20, None))),
            ("zero rows in the middle", partial(_import_hole, rows=slice(900, 1000))),
            ("zero rows at the start", partial(_import_hole, rows=slice(0, 50))),
            ("values below 0", partial(_import, values=_put(slice(3, 4), -4), says=VALUES)),
            ("values at V", partial(_import, values=_put(slice(3, 4), 128), says=VALUES)),
            ("size 0", partial(_import, size=0, says="--dstore-size")),
            ("size -5", partial(_import, size=-5, says="--dstore-size")),
            ("size 10^18", partial(_import, size=10**18, says="--dstore-size")),
            ("size of 400 digits", partial(_import, size=10**400, says="--dstore-size")),
            ("vocabulary 0", partial(_import, flags=("--vocabulary", 0), says="--vocabulary")),
            ("vocabulary -1", partial(_import, flags=("--vocabulary=-1",), says="--vocabulary")),
        )
    ),
)
