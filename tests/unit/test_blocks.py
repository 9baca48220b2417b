"""A datastore of several blocks reads as the one array that they are cut from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stores import (
    CUTS,
    Ranges,
    alter,
    assert_helps,
    build_index,
    kept,
    origin,
    random_entries,
    write_cut,
    write_store,
)

from fairseq_knnlm.datastore import (
    Manifest,
    Stretch,
    check_numbers,
    open_datastore,
    outline,
    read_manifest,
)
from fairseq_knnlm.datastore.manifest import write_manifest
from fairseq_knnlm.errors import DatastoreError
from fairseq_knnlm.files.sealed import seal
from fairseq_knnlm.index.search import SearchIndex
from fairseq_knnlm.retrieval.local import LocalRetriever

FORGOTTEN: dict[str, Sequence[Ranges]] = {
    "nothing": ((), (), ()),
    "the first": (((0, 3),), (), ()),
    "the last": ((), (), ((50, 59),)),
    "in the middle": (((4, 9), (20, 21)), (), ((1, 2), (30, 59))),
    "the last of a block": (((35, 40),), (), ()),
}


@pytest.mark.parametrize("forgotten", FORGOTTEN.values(), ids=FORGOTTEN)
@pytest.mark.parametrize("in_memory", [False, True])
def test_it_reads_as_what_is_left(
    tmp_path: Path, forgotten: Sequence[Ranges], in_memory: bool
) -> None:
    write_cut(tmp_path / "store", forgotten=forgotten)
    store = open_datastore(tmp_path / "store", in_memory=in_memory, verify=True)
    keys, values = random_entries(100, 6)
    rows = kept(forgotten)
    assert len(store) == len(rows)
    assert np.array_equal(store.values, values[rows])
    assert np.array_equal(np.array(store.keys), keys[rows].astype(np.float16))
    assert store.nbytes == len(rows) * (6 * 2 + 2)
    assert not list(check_numbers("keys.npy", store.full_keys(), 50))


@pytest.mark.parametrize("forgotten", FORGOTTEN.values(), ids=FORGOTTEN)
def test_where_a_text_breaks_off(tmp_path: Path, forgotten: Sequence[Ranges]) -> None:
    """A row is none where the row before it in the text is the row before it in the datastore."""
    store = write_cut(tmp_path / "store", forgotten=forgotten)
    rows = kept(forgotten)
    expected = [0, *(i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1)]
    assert store.breaks.tolist() == expected


def test_a_block_that_begins_a_text(tmp_path: Path) -> None:
    store = write_cut(tmp_path / "store")
    stretches = [Stretch(*_fields(block.stretch), breaks=[0, 30]) for block in store.blocks[:1]]
    stretches += [Stretch(*_fields(block.stretch), breaks=[0]) for block in store.blocks[1:]]
    manifest = Manifest(100, 6, "float16", "uint16", origin(), blocks=stretches)
    write_manifest(store.path / "manifest.json", manifest)
    assert open_datastore(store.path).breaks.tolist() == [0, 30, 40, 41]
    flat = write_store(tmp_path / "flat", *random_entries(9, 6))
    assert flat.breaks.tolist() == [0]
    assert flat.blocks == ()


def _fields(stretch: Stretch) -> tuple[str, int, str]:
    return stretch.name, stretch.rows, stretch.fingerprint


@pytest.mark.parametrize("forgotten", FORGOTTEN.values(), ids=FORGOTTEN)
def test_rows_of_a_block_and_of_the_whole(tmp_path: Path, forgotten: Sequence[Ranges]) -> None:
    store = write_cut(tmp_path / "store", forgotten=forgotten)
    left = kept(forgotten)
    assert [block.first for block in store.blocks] == np.searchsorted(left, CUTS[:-1]).tolist()
    for block, start in zip(store.blocks, CUTS, strict=False):
        rows = np.arange(block.first, block.stop)
        assert (start + block.own_rows(rows)).tolist() == left[rows].tolist()
        own = np.arange(block.rows + 1)
        expected = [(left[(left >= start)] < start + row).sum() for row in own]
        assert block.rows_before(own).tolist() == expected


def test_exact_distances_are_those_of_one_array(tmp_path: Path) -> None:
    store = write_cut(tmp_path / "store")
    keys, values = random_entries(100, 6)
    whole = write_store(tmp_path / "whole", keys, values, dtype="float16")
    index = SearchIndex(*build_index(keys.astype("f2").astype("f4"), "Flat"))
    queries = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    ours, theirs = (LocalRetriever(index, one, "l2").search(queries, 20) for one in (store, whole))
    assert torch.equal(ours.distances, theirs.distances)
    assert torch.equal(ours.values, theirs.values)


def test_fingerprints_are_of_the_content(tmp_path: Path) -> None:
    """And not of the folder, nor of when it was made."""
    one, same = write_cut(tmp_path / "one"), write_cut(tmp_path / "same")
    assert one.fingerprint == same.fingerprint == outline(one.path).fingerprint
    assert write_cut(tmp_path / "cut", [0, 50, 80, 100]).fingerprint != one.fingerprint


def damage(where: str) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        alter(path / "blocks" / "000001" / where)

    return spoil


def swap(path: Path) -> None:
    """Two blocks change places."""
    blocks = path / "blocks"
    (blocks / "000000").rename(blocks / "x")
    (blocks / "000002").rename(blocks / "000000")
    (blocks / "x").rename(blocks / "000002")


def another(path: Path) -> None:
    """A sound block of another text, of the same length."""
    shutil.rmtree(path / "blocks" / "000001")
    keys, values = random_entries(1, 6)
    write_store(path / "blocks" / "000001", keys, values, dtype="float16")


@pytest.mark.parametrize(
    "spoil",
    [
        damage("keys.npy"),
        damage("values.npy"),
        damage("manifest.json"),
        lambda path: shutil.rmtree(path / "blocks" / "000001"),
        lambda path: shutil.rmtree(path / "blocks"),
        swap,
        another,
    ],
)
def test_a_block_that_is_not_as_it_was_is_named(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    store = write_cut(tmp_path / "store")
    spoil(store.path)
    with pytest.raises(DatastoreError) as caught:
        open_datastore(store.path)
    assert_helps(caught, str(store.path / "blocks"))


SOUND = {"name": "000000", "rows": 10, "fingerprint": "a" * 64, "breaks": [0], "forgotten": []}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "twice": ({"blocks": [SOUND, SOUND], "rows": 20}, "comes twice"),
    "rows": ({"rows": 11}, "$.rows"),
    "out of bounds": ({"blocks": [{**SOUND, "forgotten": [[9, 11]]}]}, "blocks[0].forgotten"),
    "backwards": ({"blocks": [{**SOUND, "forgotten": [[5, 3]]}]}, "blocks[0].forgotten"),
    "touching": ({"blocks": [{**SOUND, "forgotten": [[1, 3], [3, 4]]}]}, "blocks[0].forgotten"),
    "all gone": ({"blocks": [{**SOUND, "forgotten": [[0, 10]]}]}, "nothing is left"),
    "a break outside": ({"blocks": [{**SOUND, "breaks": [10]}]}, "blocks[0].breaks"),
    "a path": ({"blocks": [{**SOUND, "name": "../../x"}]}, "blocks[0].name"),
    "arrays too": ({"files": {"values.npy": {"bytes": 1, "chunks": []}}}, "values.npy"),
    "compressed": ({"compressions": [{}]}, "compressions"),
    "unknown": ({"shards": 3}, "shards"),
    "missing": ({"before": None}, "before"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_a_manifest_that_contradicts_itself(tmp_path: Path, case: str) -> None:
    """Though its seal be right."""
    change, says = WRONG[case]
    content: dict[str, Any] = {
        "rows": 10,
        "width": 6,
        "key_dtype": "float16",
        "value_dtype": "uint16",
        "origin": {
            "model": "",
            "dictionary": "",
            "vocabulary": 50,
            "key_type": "last_ffn_input",
            "split": "",
            "context": {},
            "versions": {},
        },
        "blocks": [SOUND],
        "before": [],
    }
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(seal("fairseq-knnlm datastore", 4, content)))
    assert read_manifest(tmp_path)[0].rows == 10
    content |= change
    content = {name: value for name, value in content.items() if value is not None}
    file.write_text(json.dumps(seal("fairseq-knnlm datastore", 4, content)))
    with pytest.raises(DatastoreError) as caught:
        read_manifest(tmp_path)
    assert_helps(caught, says)


def test_who_opens_it_while_it_is_changed_sees_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block of the old manifest is removed after that was read, and before it is opened."""
    store = write_cut(tmp_path / "store")
    last = store.blocks[-1]
    fewer = Manifest(
        41, 6, "float16", "uint16", origin(), blocks=store.manifest.blocks[:2], before=["a" * 64]
    )
    read, changed = read_manifest, []

    def reading(path: Path) -> tuple[Manifest, str]:
        found = read(path)
        if path == store.path and not changed:
            changed.append(write_manifest(store.path / "manifest.json", fewer))
            shutil.rmtree(last.path)
        return found

    monkeypatch.setattr("fairseq_knnlm.datastore.reader.read_manifest", reading)
    assert len(open_datastore(store.path)) == 41
