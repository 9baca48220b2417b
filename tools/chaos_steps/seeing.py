"""What a reader sees of a folder, and every byte that lies in it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairseq_knnlm.calibration.stored import read_calibration
from fairseq_knnlm.calibration.table import read_table
from fairseq_knnlm.datastore import Datastore, open_datastore, read_documents
from fairseq_knnlm.datastore.manifest import MANIFEST, read_manifest
from fairseq_knnlm.datastore.reader import was_replaced
from fairseq_knnlm.errors import DatastoreError, IndexFileError
from fairseq_knnlm.retrieval.opening import open_retriever

#: Neighbours that a reader asks for.
K = 8
#: What an evaluation writes, and a report that joins several.
RESULTS, TABLE = "joined.json", "joined.npz"
#: Times, what is over these too, and where things lie.
TIMES = ("seconds", "tokens_per_second", "search_seconds", "fingerprint", "receipt")

#: What is seen: digests by what they are of.
Seen = dict[str, str]


def seen(place: Path, pause: float = 0.0) -> Seen:
    """All that can be opened, as a reader has it: of the datastore ``store`` and of results.

    Args:
        place: the folder that commands run in.
        pause: seconds between opening the datastore and its index.

    Raises:
        KnnlmError: where something does not open.
    """
    found: Seen = {}
    store = place / "store"
    if (store / MANIFEST).exists():
        found |= _store(store, pause)
    if (calibration := store / "calibration.json").exists():
        read_calibration(calibration, [read_manifest(store)[1]])
        found["calibration"] = _digest(calibration.read_bytes())
    if (results := place / RESULTS).exists():
        found["results"] = _digest(_timeless(json.loads(results.read_text())))
    if (table := place / TABLE).exists():
        whole = read_table(table)
        columns = b"".join(column.tobytes() for column in whole.columns.values())
        found["table"] = _digest(_timeless(whole.card) + columns)
    return found


def _timeless(found: dict[str, Any]) -> bytes:
    """Results without what took how long."""
    left = {name: value for name, value in found.items() if name not in TIMES}
    return json.dumps(left, sort_keys=True).encode()


def _store(path: Path, pause: float) -> Seen:
    """As ``open_memory`` opens it: again, where it is changed meanwhile."""
    while True:
        store = open_datastore(path, verify=True)
        try:
            return _parts(store, pause)
        except (DatastoreError, IndexFileError, FileNotFoundError):
            if not was_replaced(path, store.fingerprint):
                raise


def _parts(store: Datastore, pause: float) -> Seen:
    time.sleep(pause)
    keys = np.empty(0) if store.keys is None else np.array(store.keys[:])
    documents = read_documents(store)
    found = {
        "values": _digest(np.array(store.values).tobytes()),
        "keys": _digest(keys.tobytes()),
        "breaks": _digest(store.breaks.tobytes()),
    }
    if documents is not None:
        found["documents"] = _digest(documents.starts.tobytes())
    time.sleep(pause)
    if store.index_path.exists():
        found["neighbours"] = _neighbours(store)
    return found


def _neighbours(store: Datastore) -> str:
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(20, store.manifest.width)).astype(np.float32)
    found = open_retriever(store, K).search(torch.from_numpy(queries), K)
    return _digest(found.ids.numpy().tobytes() + found.distances.numpy().tobytes())


def files(place: Path) -> dict[str, str]:
    """Every file below a folder, by its name, with a digest of its bytes.

    Of results, which say how long they took, the name alone.
    """
    return {
        str(file.relative_to(place)): ""
        if file.name in (RESULTS, TABLE)
        else _digest(file.read_bytes())
        for file in sorted(place.rglob("*"))
        if file.is_file()
    }


def differences(found: dict[str, str], expected: dict[str, str]) -> str:
    """Which names differ, in words."""
    words: list[str] = []
    sorts: tuple[tuple[str, Callable[[str], bool]], ...] = (
        ("missing", lambda name: name not in found),
        ("not to be expected", lambda name: name not in expected),
        ("other", lambda name: found.get(name) != expected.get(name)),
    )
    left = sorted({*found, *expected})
    for sort, belongs in sorts:
        these = [name for name in left if belongs(name)]
        left = [name for name in left if name not in these]
        words += [f"{sort}: {', '.join(these[:6])}"] if these else []
    return "; ".join(words) or "none"


def _digest(some: bytes) -> str:
    return hashlib.blake2b(some, digest_size=16).hexdigest()
