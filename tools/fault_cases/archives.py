"""Archives of arrays that are wrong: score tables, n-gram counts, beginnings of documents."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fault_cases.stage import Case, Stage
from fault_cases.world import knnlm

Arrays = dict[str, np.ndarray]
MUST = "refused with a message that names what is wrong"


def cases() -> Iterator[Case]:
    """Score tables for ``tune`` and ``report``, then n-grams, then documents."""
    for name, says, change in TABLES:
        play = partial(_table, says=says, change=change)
        yield Case("reading", f"table: {name}", f"a score table: {name}", MUST, play)
    for name, says, change in NGRAMS:
        play = partial(_ngrams, says=says, change=change)
        yield Case("reading", f"n-grams: {name}", f"n-gram counts: {name}", MUST, play)
    for name, says, change in DOCUMENTS:
        play = partial(_documents, says=says, change=change)
        yield Case("reading", f"documents: {name}", f"documents.npz: {name}", MUST, play)


def load(path: Path) -> Arrays:
    """The members of an archive."""
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def pack(arrays: Arrays) -> bytes:
    """An archive of arrays."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=True)
    return buffer.getvalue()


def with_card(arrays: Arrays, change: Callable[[dict[str, Any]], object]) -> Arrays:
    """The arrays with another card."""
    card = json.loads(str(arrays["card"][0]))
    change(card)
    return {**arrays, "card": np.array([json.dumps(card)])}


def _table(stage: Stage, *, says: str, change: Callable[[Arrays], Arrays | bytes]) -> str:
    """Both commands that read a table refuse it."""
    store, path = stage.store(), stage.folder / "t.npz"
    found = change(load(stage.world.tables / "valid.npz"))
    path.write_bytes(found if isinstance(found, bytes) else pack(found))
    tuned = stage.refused(knnlm("tune", "--dstore", store, "--score-table", path), says)
    stage.refused(knnlm("report", "--dstore", store, "--score-table", path), says)
    return tuned


def _ngrams(stage: Stage, *, says: str, change: Callable[[Arrays], Arrays | bytes]) -> str:
    store = stage.store()
    path = store / "ngram.npz"
    found = change(load(path))
    path.write_bytes(found if isinstance(found, bytes) else pack(found))
    words = ("--experts", "ngram", "--ngram-lmbda", "0.2", "--dstore-filename", store)
    refused = stage.refused(stage.world.evaluate(*words), says)
    stage.refused(knnlm("verify", "--dstore", store), f"{says}|ngram")
    return refused


def _documents(stage: Stage, *, says: str, change: Callable[[Arrays], Arrays | bytes]) -> str:
    """Also who takes them along refuses them; made anew they are right again."""
    store = stage.store()
    path = store / "documents.npz"
    found = change(load(path))
    path.write_bytes(found if isinstance(found, bytes) else pack(found))
    says = rf"(?s)(?=.*documents\.npz).*({says})"
    refused = stage.refused(knnlm("verify", "--dstore", store), says)
    if change not in UNTOLD:
        out = stage.folder / "out"
        stage.refused(knnlm("compress", "--dstore", store, "--out", out, "--pca", "4"), says)
    anew = ("verify", "--dstore", store, "--documents")
    stage.works(knnlm(*anew), changes=["store/documents.npz"])
    return refused


# Ways to spoil


def _without(name: str) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {key: arrays[key] for key in arrays if key != name}


def _as_type(name: str, dtype: str) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {**arrays, name: arrays[name].astype(dtype)}


def _cut(name: str, rows: int = 1) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {**arrays, name: arrays[name][:-rows]}


def _rows(rows: int) -> Callable[[Arrays], Arrays]:
    def change(arrays: Arrays) -> Arrays:
        return {name: a if name == "card" else a[:rows] for name, a in arrays.items()}

    return change


def _put(name: str, value: float, where: Any = 3) -> Callable[[Arrays], Arrays]:
    def change(arrays: Arrays) -> Arrays:
        array = arrays[name].copy()
        array[where] = value
        return {**arrays, name: array}

    return change


def _card(**fields: Any) -> Callable[[Arrays], Arrays]:
    return lambda arrays: with_card(arrays, lambda card: card.update(fields))


def _card_without(field: str) -> Callable[[Arrays], Arrays]:
    return lambda arrays: with_card(arrays, lambda card: card.pop(field))


def _card_text(text: str) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {**arrays, "card": np.array([text])}


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Arrays], bytes]:
    return lambda arrays: change(pack(arrays))


def _twice(name: str) -> Callable[[Arrays], bytes]:
    """A member that is there twice, of different content."""

    def change(arrays: Arrays) -> bytes:
        buffer = io.BytesIO(pack(arrays))
        with zipfile.ZipFile(buffer, "a") as archive:
            member = io.BytesIO()
            np.save(member, np.zeros_like(arrays[name]))
            archive.writestr(f"{name}.npy", member.getvalue())
        return buffer.getvalue()

    return change


def _objects(name: str) -> Callable[[Arrays], Arrays]:
    """Pickled objects, which nobody should load."""
    return lambda arrays: {**arrays, name: arrays[name].astype(object)}


def _misnamed(arrays: Arrays) -> bytes:
    """A header that promises ten billion rows."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array)
            data = member.getvalue()
            if name == "lm":
                data = data.replace(b"'shape': (%d,)" % len(array), b"'shape': (9%09d,)" % 0)
            archive.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def _garbled(data: bytes) -> bytes:
    return data[: len(data) // 2] + b"\x01" * 200 + data[len(data) // 2 + 200 :]


#: What only who reads the values can tell.
_moved, _another_end = _put("starts", 4, 1), _card(eos=7)
UNTOLD = (_moved, _another_end)
ARCHIVES: tuple[tuple[str, str, Callable[[Arrays], Arrays | bytes]], ...] = (
    ("empty file", "npz", _bytes(lambda data: b"")),
    ("half a file", "npz", _bytes(lambda data: data[: len(data) // 2])),
    ("200 bytes garbled", "npz", _bytes(_garbled)),
    ("no archive", "npz", _bytes(lambda data: b"hello" * 100)),
    ("no members", "card|lm|npz", lambda arrays: {}),
    ("bytes behind its end", "npz", _bytes(lambda data: data + b"x" * 100)),
    ("no card", "card", _without("card")),
    ("card no JSON", "card|JSON", _card_text("hello")),
    ("card a list", "card|object|kind", _card_text("[]")),
    ("card of 200,000 brackets", "card|deep|JSON", _card_text("[" * 200_000)),
    ("card with NaN", "NaN|card", _card_text('{"format": NaN}')),
    ("card twice", "card|twice|npz", _twice("card")),
    ("card of another kind", "kind|format", _card(format="cake")),
    ("card of a newer version", "version", _card(version=99)),
    ("card of version '2'", "version", _card(version="2")),
    ("card without version", "version", _card_without("version")),
)
TABLES: tuple[tuple[str, str, Callable[[Arrays], Arrays | bytes]], ...] = (
    *ARCHIVES,
    *((f"without {name}", name, _without(name)) for name in ("lm", "row", "knn", "token")),
    *((f"{name} twice", f"{name}|twice|npz", _twice(name)) for name in ("lm", "knn")),
    ("lm as integers", "lm", _as_type("lm", "i4")),
    ("lm as float64", "lm", _as_type("lm", "f8")),
    ("lm as text", "lm", _as_type("lm", "U8")),
    ("row as floats", "row", _as_type("row", "f8")),
    ("knn as float64", "knn", _as_type("knn", "f8")),
    ("lm of objects", "lm|pickle|object", _objects("lm")),
    ("knn of objects", "knn|pickle|object", _objects("knn")),
    ("lm a row short", "lm|rows", _cut("lm")),
    ("knn a row short", "knn|rows", _cut("knn")),
    ("distances a row short", "knn_distances|rows", _cut("knn_distances")),
    ("ten billion rows promised", "lm|rows|npz|memory", _misnamed),
    ("knn a column short", "knn|columns|settings", lambda a: {**a, "knn": a["knn"][:, 1:]}),
    ("knn of one dimension", "knn|columns|settings", lambda a: {**a, "knn": a["knn"][:, 0]}),
    *((f"of {n} rows", "rows|tokens", _rows(n)) for n in (0, 1, 5, 9)),
    ("lm NaN", "lm|NaN", _put("lm", np.nan)),
    ("lm all NaN", "lm|NaN", _put("lm", np.nan, slice(None))),
    ("lm above 0", "lm|probabilit", _put("lm", 1.5)),
    ("lm infinite", "lm|probabilit|infinit", _put("lm", np.inf)),
    ("knn above 0", "knn|probabilit", _put("knn", 2.0)),
    ("knn infinite", "knn|probabilit|infinit", _put("knn", np.inf)),
    ("rows below 0", "row", _put("row", -7)),
    ("rows twice", "row", _put("row", 5, slice(None))),
    ("of another datastore", "datastore", _card(datastores=["f" * 64])),
    ("datastores a number", "datastores", _card(datastores=7)),
    ("model a number", "model", _card(model=7)),
    ("split a number", "split", _card(split=7)),
    *(
        (f"card without {field}", field.rstrip("s"), _card_without(field))
        for field in ("datastores", "model", "experts", "features", "split", "described")
    ),
    ("experts a list", "experts", _card(experts=["knn"])),
    ("experts nobody knows", "experts|oracle", _card(experts={"oracle": [{"t": 1}]})),
    ("settings no objects", "experts|settings", _card(experts={"knn": [7]})),
    (
        "temperature below 0",
        "temperature|settings|experts",
        lambda arrays: with_card(
            arrays, lambda card: card["experts"]["knn"][0].update(temperature=-1)
        ),
    ),
    ("features a number", "features", _card(features=7)),
    ("features that are not there", "features|oracle", _card(features=["oracle"])),
)
NGRAMS: tuple[tuple[str, str, Callable[[Arrays], Arrays | bytes]], ...] = (
    *ARCHIVES,
    *((f"without {name}", name, _without(name)) for name in ("keys_1", "counts_1", "keys_5")),
    ("keys_2 as floats", "keys_2", _as_type("keys_2", "f8")),
    ("counts_2 as floats", "counts_2", _as_type("counts_2", "f8")),
    ("keys_2 of objects", "keys_2|pickle|object", _objects("keys_2")),
    ("keys_2 one short", "keys_2|counts_2", _cut("keys_2")),
    ("counts_2 one short", "counts_2|keys_2", _cut("counts_2")),
    ("keys_1 twice", "keys_1|twice|npz", _twice("keys_1")),
    ("keys_2 below 0", "keys_2|keys", _put("keys_2", -1, 0)),
    ("keys_2 out of order", "keys_2|order|ascend", _put("keys_2", 0, -1)),
    ("keys_1 beyond the vocabulary", "keys_1|vocabulary", _put("keys_1", 10**6, -1)),
    ("counts_1 below 0", "counts_1|counts", _put("counts_1", -3)),
    ("counts_5 below 0", "counts_5|counts", _put("counts_5", -3)),
    ("another count", "counts|tokens|damaged|altered", _put("counts_5", 7)),
    ("no end", "counts_1|counts", _put("counts_1", 9, -1)),
    ("order 0", "order", _card(order=0)),
    ("order 9", "order|keys_6", _card(order=9)),
    ("order 10^9", "order", _card(order=10**9)),
    ("order as text", "order", _card(order="5")),
    ("vocabulary 0", "vocabulary", _card(vocabulary=0)),
    ("vocabulary -1", "vocabulary", _card(vocabulary=-1)),
    ("vocabulary 10^18", "vocabulary", _card(vocabulary=10**18)),
    ("another vocabulary", "vocabulary", _card(vocabulary=129)),
    ("tokens 0", "tokens|counts", _card(tokens=0)),
    ("tokens -5", "tokens", _card(tokens=-5)),
    ("of another datastore", "datastore", _card(datastore="f" * 64)),
    ("datastore a number", "datastore", _card(datastore=7)),
    ("card without datastore", "datastore", _card_without("datastore")),
    ("an unknown field", "colour", _card(colour=1)),
)
DOCUMENTS: tuple[tuple[str, str, Callable[[Arrays], Arrays | bytes]], ...] = (
    *ARCHIVES,
    ("without starts", "starts", _without("starts")),
    ("starts as int32", "starts", _as_type("starts", "i4")),
    ("starts as floats", "starts", _as_type("starts", "f8")),
    ("starts of objects", "starts|pickle|object", _objects("starts")),
    ("starts twice", "starts|twice|npz", _twice("starts")),
    ("no starts", "starts", lambda arrays: {**arrays, "starts": arrays["starts"][:0]}),
    ("the first not 0", "starts", _put("starts", 1, 0)),
    ("a start below 0", "starts|ascend", _put("starts", -5)),
    ("a start beyond the last row", "starts", _put("starts", 10**12, -1)),
    ("starts out of order", "starts|ascend", _put("starts", 1, -1)),
    ("a start within a line", "values", _moved),
    ("an array of another", "lm", lambda arrays: {**arrays, "lm": arrays["starts"]}),
    ("rows 0", "rows", _card(rows=0)),
    ("another number of rows", "rows", _card(rows=10**6)),
    ("rows as text", "rows", _card(rows="5")),
    ("eos -1", "eos", _card(eos=-1)),
    ("another eos", "values", _another_end),
    ("a boundary of nothing", "boundary", _card(boundary="")),
    ("a boundary of a million characters", "boundary", _card(boundary="w" * 10**6)),
    ("a boundary as a number", "boundary", _card(boundary=7)),
    ("of another datastore", "datastore", _card(datastore="f" * 64)),
    ("datastore a number", "datastore", _card(datastore=7)),
    ("card without datastore", "datastore", _card_without("datastore")),
    ("an unknown field", "colour", _card(colour=1)),
)
