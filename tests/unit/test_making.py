"""A datastore that is made block by block is the same whoever made which, and in which order."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from stores import alter, assert_helps, origin, random_entries, write_store

from fairseq_knnlm.datastore import open_datastore
from fairseq_knnlm.datastore.making import Making, Plan, is_in_the_making, read_plan
from fairseq_knnlm.errors import DatastoreError

PLAN = Plan(6, "float16", origin(), [0, 40, 41, 75, 100])


def make(making: Making, block: int) -> None:
    keys, values = random_entries(100, 6)
    rows = making.plan.rows(block)
    writer = making.writer(block)
    writer.write(np.arange(len(rows)), keys[rows.start : rows.stop], values[rows.start : rows.stop])
    writer.publish()


def made(path: Path, order: list[int]) -> Making:
    making = Making(path, PLAN)
    for block in order:
        make(making, block)
    return making


def test_the_same_in_any_order(tmp_path: Path) -> None:
    first = open_datastore(made(tmp_path / "first", [0, 1, 2, 3]).join())
    keys, values = random_entries(100, 6)
    assert np.array_equal(np.array(first.keys), keys.astype(np.float16))
    assert np.array_equal(first.values, values)
    assert first.breaks.tolist() == [0]
    for seed in range(4):
        order = random.Random(seed).sample(range(4), 4)
        other = open_datastore(made(tmp_path / f"order-{seed}", order).join())
        assert other.fingerprint == first.fingerprint


def test_it_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    made(tmp_path / "store", [2, 0])
    with pytest.raises(DatastoreError, match="no datastore at"):
        open_datastore(tmp_path / "store")
    making = Making(tmp_path / "store", PLAN)
    assert (making.there(), making.missing()) == ([0, 2], [1, 3])
    assert making.check(making.there()) == [0, 2]
    with pytest.raises(DatastoreError) as caught:
        making.join()
    assert_helps(caught, "expected: 4 blocks", "found:    2 missing, the first is 000001")
    for block in making.missing():
        make(making, block)
    whole = open_datastore(made(tmp_path / "whole", [0, 1, 2, 3]).join())
    assert open_datastore(making.join()).fingerprint == whole.fingerprint
    assert not is_in_the_making(making.path)


def test_a_block_that_was_stopped_leaves_nothing(tmp_path: Path) -> None:
    making = made(tmp_path / "store", [0])
    left = making.path / "blocks" / ".000001.partial-killed"
    left.mkdir()
    make(making, 1)
    assert {path.name for path in (making.path / "blocks").iterdir()} == {"000000", "000001"}


@pytest.mark.parametrize("file", ["keys.npy", "values.npy", "manifest.json"])
def test_a_damaged_block_is_made_again(tmp_path: Path, file: str) -> None:
    making = made(tmp_path / "store", [0, 1, 2, 3])
    alter(making.folder(1) / file)
    assert making.check(making.there()) == [0, 2, 3]
    assert making.missing() == [1]
    make(making, 1)
    whole = open_datastore(made(tmp_path / "whole", [0, 1, 2, 3]).join())
    assert open_datastore(making.join(), verify=True).fingerprint == whole.fingerprint


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"origin": replace(origin(), model="c" * 64)}, "expected: origin.model aaaa"),
        ({"origin": replace(origin(), versions={"torch": "9"})}, "origin.versions.torch"),
        ({"key_dtype": "float32"}, "found:    key_dtype float32"),
        ({"starts": [0, 50, 100]}, "starts [0, 50, 100]"),
        ({"width": 7}, "width 7"),
    ],
)
def test_another_making_is_refused(tmp_path: Path, change: dict[str, object], says: str) -> None:
    making = made(tmp_path / "store", [0])
    with pytest.raises(DatastoreError) as caught:
        Making(making.path, replace(PLAN, **change))
    assert_helps(caught, "another making", says)
    assert making.there() == [0]


def test_blocks_of_two_makings_in_one_folder(tmp_path: Path) -> None:
    ours = made(tmp_path / "ours", [0, 1, 2])
    other = Making(tmp_path / "other", replace(PLAN, origin=replace(origin(), model="c" * 64)))
    make(other, 3)
    other.folder(3).rename(ours.folder(3))
    for look in (ours.join, lambda: ours.check([3])):
        with pytest.raises(DatastoreError) as caught:
            look()
        assert_helps(caught, str(ours.folder(3)), "checkpoint")
    assert not (ours.path / "manifest.json").exists()
    longer = Making(tmp_path / "longer", replace(PLAN, starts=[0, 40, 41, 74, 100]))
    make(longer, 3)
    ours.folder(3).rename(tmp_path / "gone")
    longer.folder(3).rename(ours.folder(3))
    with pytest.raises(DatastoreError, match="rows 25"):
        ours.join()


@pytest.mark.parametrize("there", ["a datastore", "a file", "other files"])
def test_nothing_is_begun_where_something_is(tmp_path: Path, there: str) -> None:
    path = tmp_path / "store"
    if there == "a datastore":
        write_store(path, *random_entries(9, 6))
    elif there == "a file":
        path.touch()
    else:
        path.mkdir()
        (path / "thesis.tex").touch()
    with pytest.raises((DatastoreError, OSError)):
        Making(path, PLAN)
    assert not (path / "making.json").exists()


def test_what_is_being_made_is_read_with_care(tmp_path: Path) -> None:
    making = made(tmp_path / "store", [])
    assert read_plan(making.path) == PLAN
    alter(making.path / "making.json")
    with pytest.raises(DatastoreError, match=r"making\.json is damaged"):
        Making(making.path, PLAN)


def test_one_joins_and_the_others_find_it_done(tmp_path: Path) -> None:
    making = made(tmp_path / "store", [0, 1, 2, 3])
    other = Making(making.path, PLAN)
    assert making.join() == other.join() == making.path
    assert len(open_datastore(making.path)) == 100


def test_more_blocks_onto_a_datastore(tmp_path: Path) -> None:
    base = open_datastore(made(tmp_path / "store", [0, 1, 2, 3]).join())
    keys, values = random_entries(30, 6)
    plan = replace(PLAN, starts=[0, 20, 30], number=4, onto=base.fingerprint)
    making = Making(base.path, plan)
    assert len(open_datastore(base.path)) == 100  # readers see what was there
    for block in plan.blocks:
        rows = plan.rows(block)
        writer = making.writer(block)
        part = slice(rows.start, rows.stop)
        writer.write(np.arange(len(rows)), keys[part], values[part])
        writer.publish()
    found = open_datastore(making.join())
    assert np.array_equal(found.values[100:], values)
    assert found.breaks.tolist() == [0, 100]
    assert found.manifest.before == [base.fingerprint]


def test_several_kinds_of_processors_share_the_work(tmp_path: Path) -> None:
    """The blocks are theirs, and whoever joins them makes the same datastore."""
    seals = set()
    for order in (["a", "b"], ["b", "a"]):
        path = tmp_path / "".join(order)
        for kind in order:
            known = {**PLAN.origin.versions, "processor": kind}
            plan = replace(PLAN, origin=replace(PLAN.origin, versions=known))
            making = Making(path, plan)
            for block in {"a": [0, 3], "b": [1, 2]}[kind]:
                make(making, block)
        store = open_datastore(making.join())
        seals.add(store.fingerprint)
        kinds = [open_datastore(block.path).manifest.origin.versions for block in store.blocks]
        assert [kind["processor"] for kind in kinds] == ["a", "b", "b", "a"]
    assert len(seals) == 1
    with pytest.raises(DatastoreError, match="of another making"):
        Making(tmp_path / "more", PLAN)
        Making(tmp_path / "more", replace(PLAN, origin=replace(PLAN.origin, split="other")))
