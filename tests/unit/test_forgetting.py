"""What is left after forgetting is what a datastore would be that never held the rest."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stores import (
    Ranges,
    assert_helps,
    build_index,
    random_entries,
    write_compressed,
    write_cut,
    write_store,
)

from fairseq_knnlm.datastore import (
    Datastore,
    Documents,
    open_datastore,
    outline,
    read_documents,
    write_documents,
)
from fairseq_knnlm.datastore import into_blocks as conversion
from fairseq_knnlm.datastore.compacting import compact, next_number
from fairseq_knnlm.datastore.forgetting import forget, joined
from fairseq_knnlm.datastore.into_blocks import into_blocks
from fairseq_knnlm.datastore.making import Making, Plan
from fairseq_knnlm.errors import BusyError, DatastoreError
from fairseq_knnlm.files import Claim
from fairseq_knnlm.index.search import SearchIndex
from fairseq_knnlm.retrieval.local import LocalRetriever

KEYS, VALUES = random_entries(100, 6)
STARTS = [0, 3, 30, 55, 80, 97]


def flat(path: Path) -> Datastore:
    return with_documents(write_store(path, KEYS, VALUES, dtype="float16"))


def blocks(path: Path) -> Datastore:
    return with_documents(write_cut(path))


def with_documents(store: Datastore) -> Datastore:
    write_documents(store, Documents(np.array(STARTS), len(store), 2))
    return store


def all_but(gone: Ranges) -> list[int]:
    """Rows of the 100 that are in none of these ranges."""
    return [row for row in range(100) if not any(a <= row < b for a, b in gone)]


def neighbours(store: Datastore, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact distances and values of the k nearest to some queries."""
    keys = np.array(store.full_keys(), np.float32)
    index = SearchIndex(*build_index(keys, "Flat"))
    queries = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    found = LocalRetriever(index, store, "l2").search(queries, k)
    return found.distances.numpy(), found.values.numpy()


def assert_holds(path: Path, rows: Sequence[int]) -> None:
    """The datastore is one of these of the 100 entries, in every respect."""
    store = open_datastore(path, verify=True)
    assert len(store) == len(rows)
    assert np.array_equal(np.array(store.keys), KEYS[rows].astype(np.float16))
    assert np.array_equal(store.values, VALUES[rows])
    breaks = [0, *(n for n in range(1, len(rows)) if rows[n] != rows[n - 1] + 1)]
    assert store.breaks.tolist() == breaks
    found = read_documents(store)
    assert found is not None
    # For each entry the document it is from: numbers differ, who is together does not.
    homes = np.searchsorted(STARTS, rows, side="right")
    numbers = np.unique(homes, return_inverse=True)[1]
    assert found.document_of(np.arange(len(rows))).tolist() == numbers.tolist()


GONE: list[Ranges] = [
    [(0, 1)],
    [(99, 100)],
    [(0, 99)],
    [(10, 20)],
    [(30, 60)],
    [(38, 41)],  # the end of a block, and all of the next
    [(40, 41)],
    [(41, 100)],
    [(35, 40)],
    [(5, 9), (20, 31), (60, 61)],
    [(20, 31), (5, 25), (31, 33)],  # out of order, over each other, side by side
]


@pytest.mark.parametrize("gone", GONE)
@pytest.mark.parametrize("made", [flat, blocks])
def test_what_is_left(tmp_path: Path, gone: Ranges, made: Callable[[Path], Datastore]) -> None:
    """As of a datastore that was written without these rows; then its bytes are gone, too."""
    before, rows = made(tmp_path / "store"), all_but(gone)
    left = forget(before.path, gone)
    assert left.manifest.before[-1] != left.fingerprint
    assert before.fingerprint in left.manifest.before
    assert_holds(before.path, rows)
    other = write_store(tmp_path / "other", KEYS[rows], VALUES[rows], dtype="float16")
    expected, found = (
        neighbours(open_datastore(path), len(rows)) for path in (other.path, before.path)
    )
    assert all(map(np.array_equal, found, expected))
    had = bool(left.blocks) and any(block.stretch.forgotten for block in left.blocks)
    compacted = compact(before.path)
    assert had == (compacted is not None and compacted.fingerprint != left.fingerprint)
    assert_holds(before.path, rows)
    assert_gone(before.path, sorted(set(range(100)) - set(rows)))
    assert compact(before.path) is None


def assert_gone(path: Path, rows: Sequence[int]) -> None:
    """No file holds the key of such a row, nor several values in a row."""
    stored = VALUES.astype(np.uint16)
    patterns = [KEYS[row].astype(np.float16).tobytes() for row in rows]
    runs = (rows[n : n + 4] for n in range(len(rows) - 3))
    patterns += [stored[run].tobytes() for run in runs if run[-1] == run[0] + 3]
    files = [file for file in path.rglob("*") if file.is_file()]
    assert files
    for file in files:
        content = file.read_bytes()
        assert not any(pattern in content for pattern in patterns), file


@pytest.mark.parametrize("seed", range(6))
def test_again_and_again(tmp_path: Path, seed: int) -> None:
    """Rows are those of what is left each time; here and there it is compacted."""
    chance, rows = random.Random(seed), list(range(100))
    store = (flat if seed % 2 else blocks)(tmp_path / "store")
    for _ in range(8):
        ranges = []
        for _ in range(chance.randint(1, 3)):
            start = chance.randrange(len(rows))
            ranges.append((start, min(start + chance.randint(1, 9), len(rows))))
        if sum(b - a for a, b in joined(ranges)) < len(rows):
            forget(store.path, ranges)
            gone = {row for a, b in ranges for row in range(a, b)}
            rows = [row for n, row in enumerate(rows) if n not in gone]
        if chance.random() < 0.3:
            compact(store.path)
        assert_holds(store.path, rows)


def test_ranges_joined() -> None:
    assert joined([(5, 7), (1, 2), (2, 4), (6, 9)]) == [(1, 4), (5, 9)]
    assert joined([]) == []


@pytest.mark.parametrize("made", [flat, blocks])
@pytest.mark.parametrize(
    ("ranges", "says"),
    [
        ([(0, 100)], "nothing would be left"),
        ([(50, 100), (0, 50)], "all 100"),
        ([(0, 101)], "rows from 0 to 100"),
        ([(-1, 3)], "found:    -1:3"),
        ([(3, 3)], "found:    3:3"),
        ([(1, 2), (7, 3)], "found:    7:3"),
    ],
)
def test_what_cannot_be_forgotten(
    tmp_path: Path, made: Callable[[Path], Datastore], ranges: Ranges, says: str
) -> None:
    store = made(tmp_path / "store")
    with pytest.raises(DatastoreError) as caught:
        forget(store.path, ranges)
    assert says in str(caught.value)
    assert outline(store.path).fingerprint == store.fingerprint


def test_what_was_compressed_stays(tmp_path: Path) -> None:
    store = write_compressed(tmp_path / "store")
    for change in (lambda: forget(store.path, [(0, 1)]), lambda: into_blocks(store.path)):
        with pytest.raises(DatastoreError) as caught:
            change()
        assert_helps(caught, "was compressed", "--merge 4")
    assert compact(store.path) is None


def test_without_keys(tmp_path: Path) -> None:
    """Which are in the index alone."""
    store = write_cut(tmp_path / "store", key_dtype=None)
    forget(store.path, [(3, 50)])
    assert compact(store.path) is not None
    left = open_datastore(store.path)
    assert left.keys is None
    assert np.array_equal(left.values, VALUES[all_but([(3, 50)])])


# From flat to blocks


def inodes(path: Path) -> set[int]:
    return {file.stat().st_ino for file in path.rglob("*.np?")}


def test_flat_becomes_blocks_without_a_copy(tmp_path: Path) -> None:
    store = flat(tmp_path / "store")
    before = inodes(store.path)
    left = into_blocks(store.path)
    assert_holds(store.path, range(100))
    assert inodes(store.path) == before
    assert {file.name for file in store.path.iterdir()} == {"manifest.json", "blocks"}
    block = open_datastore(store.path / "blocks" / "000000", verify=True)  # openable by itself
    assert block.fingerprint == store.fingerprint == left.manifest.before[0]
    assert into_blocks(store.path).fingerprint == left.fingerprint


def test_a_copy_where_the_disk_has_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store = flat(tmp_path / "store")
    into_blocks(store.path)
    assert_holds(store.path, range(100))


def test_a_link_is_as_good_as_a_file(tmp_path: Path) -> None:
    store = flat(tmp_path / "store")
    (store.path / "keys.npy").rename(tmp_path / "elsewhere.npy")
    (store.path / "keys.npy").symlink_to(tmp_path / "elsewhere.npy")
    into_blocks(store.path)
    assert_holds(store.path, range(100))
    assert (tmp_path / "elsewhere.npy").exists()


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("step", ["_move", "write_manifest", "outline"])
@pytest.mark.parametrize("done", [False, True])
def test_killed_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, done: bool
) -> None:
    """Before or after each step: what is left opens, and the next call ends what was begun."""
    store = flat(tmp_path / "store")
    true = getattr(conversion, step)

    def killed(*args: Any) -> Any:
        if done:
            true(*args)
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(conversion, step, killed)
        into_blocks(store.path)
    assert_holds(store.path, range(100))
    left = into_blocks(store.path)
    assert_holds(store.path, range(100))
    assert {file.name for file in store.path.iterdir()} == {"manifest.json", "blocks"}
    assert [block.path.name for block in left.blocks] == ["000000"]


def test_one_at_a_time(tmp_path: Path) -> None:
    """Who forgets holds the claim to the manifest, as who joins blocks does."""
    store = flat(tmp_path / "store")
    held: list[Claim] = []

    def in_another_process() -> int:
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        try:
            Claim._held.clear()
            forget(store.path, [(0, 1)])
        except BusyError:
            os._exit(3)
        os._exit(0)

    held.append(Claim(store.path / "manifest.json"))
    assert in_another_process() == 3
    held.pop().release()
    assert len(outline(store.path)) == 100


# Compacting


def test_only_blocks_with_gaps_are_written(tmp_path: Path) -> None:
    store = blocks(tmp_path / "store")
    forget(store.path, [(3, 5)])
    compacted = compact(store.path)
    assert compacted is not None
    assert [block.path.name for block in compacted.blocks] == ["000003", "000001", "000002"]
    names = {path.name for path in (store.path / "blocks").iterdir()}
    assert names == {"000001", "000002", "000003"}


def test_what_was_left_of_others_is_removed(tmp_path: Path) -> None:
    store = blocks(tmp_path / "store")
    shutil.copytree(store.blocks[0].path, store.path / "blocks" / "000007")
    (store.path / "blocks" / ".000009.partial-x").mkdir()
    (store.path / "blocks" / "notes").mkdir()
    assert next_number(store.path) == 10
    assert compact(store.path) is not None
    names = {path.name for path in (store.path / "blocks").iterdir()}
    assert names == {"000000", "000001", "000002", "notes"}
    assert compact(store.path) is None


def test_what_is_being_added_is_left_alone(tmp_path: Path) -> None:
    """And goes on afterwards."""
    store = blocks(tmp_path / "store")
    plan = Plan(6, "float16", store.manifest.origin, [0, 5, 9], number=3, onto=store.fingerprint)
    making = Making(store.path, plan)
    for block in plan.blocks:
        rows = plan.rows(block)
        writer = making.writer(block)
        writer.write(np.arange(len(rows)), KEYS[rows], VALUES[rows])
        writer.publish()
    forget(store.path, [(0, 50)])
    compacted = compact(store.path)
    assert compacted is not None
    assert [block.path.name for block in compacted.blocks] == ["000005"]
    found = open_datastore(making.join())
    assert np.array_equal(found.values, VALUES[[*range(50, 100), *range(9)]])
    assert found.breaks.tolist() == [0, 50]


def test_damage_is_not_copied(tmp_path: Path) -> None:
    store = blocks(tmp_path / "store")
    left = forget(store.path, [(0, 3)])
    file = store.path / "blocks" / "000000" / "keys.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(DatastoreError, match="damaged"):
        compact(store.path)
    assert outline(store.path).fingerprint == left.fingerprint
