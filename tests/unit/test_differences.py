"""How entries that are computed again are compared, with a model that is a table of keys."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from stores import CUTS, assert_helps, origin, plant, random_entries, write_cut, write_store

from fairseq_knnlm.datastore import Datastore, Origin, open_datastore, outline
from fairseq_knnlm.datastore.forgetting import forget
from fairseq_knnlm.errors import DatastoreError
from fairseq_knnlm.runs.differences import Computed
from fairseq_knnlm.runs.findings import Finding
from fairseq_knnlm.runs.origins import reading_flags, words
from fairseq_knnlm.runs.recompute import check_can_be_computed, recomputed

#: All that the last digits depend on is known, and the same.
KNOWN = {"torch": "2", "fairseq": "1", "fairseq_knnlm": "0", "processor": "p"}
READ = {"tokens_per_sample": 1, "max_tokens": 64, "batch_size": None, "precision": "float32"}
MADE = replace(origin(), versions=KNOWN, context=READ)


class Table:
    """A text of 100 tokens in blocks of one, whose keys are known.

    Attributes:
        computed: the blocks of text that were asked for.
    """

    def __init__(self, made: Origin = MADE, add: float = 0.0, shift: int = 0) -> None:
        self.origin = made
        self.width = 6
        self.edges = np.arange(101)
        self.keys, self.tokens = random_entries(100, 6)
        self.keys = np.roll(self.keys * (1 + add), shift, axis=0)
        self.tokens = np.roll(self.tokens, shift)
        self.computed: list[range] = []

    def values(self, texts: range) -> np.ndarray:
        return self.tokens[texts.start : texts.stop]

    def compute(self, texts: range, *, whole: bool) -> Iterator[Computed]:
        assert whole is (len(texts) == 100)
        self.computed.append(texts)
        for start in range(texts.start, texts.stop, 7):
            rows = np.arange(start, min(start + 7, texts.stop))
            yield Computed(rows, self.keys[rows], self.tokens[rows])


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Datastore:
    monkeypatch.setattr("stores.origin", lambda *_: MADE)
    return write_cut(tmp_path / "store")


def found(store: Datastore, text: Any, share: float = 1.0, seed: int = 0) -> dict[str, Finding]:
    again = recomputed(outline(store.path), lambda _: text, share, seed)
    return {finding.path.name: finding for finding in again}


def test_what_is_unchanged_is_confirmed(store: Datastore) -> None:
    text = Table()
    assert {name: one.summary.partition(" (")[0] for name, one in found(store, text).items()} == {
        f"{number:06d}": f"{stop - start} entries computed again: the same, bit for bit"
        for number, (start, stop) in enumerate(pairwise(CUTS))
    }
    assert {(texts.start, texts.stop) for texts in text.computed} == {(0, 40), (40, 41), (41, 100)}


@pytest.mark.parametrize(("share", "count"), [(0.001, 1), (0.34, 1), (0.5, 2), (0.7, 2), (1, 3)])
def test_a_share_is_drawn_by_seed(store: Datastore, share: float, count: int) -> None:
    drawn = {tuple(found(store, Table(), share, seed)) for seed in range(12)}
    assert all(len(names) == count for names in drawn)
    assert {name for names in drawn for name in names} == {"000000", "000001", "000002"}
    assert [*found(store, Table(), share, 3)] == [*found(store, Table(), share, 3)]


def flip(row: int) -> Any:
    """Changes the last bit of one number."""

    def change(keys: np.ndarray) -> None:
        keys.view(np.uint16)[row, 2] ^= 1

    return change


def test_one_bit_of_one_key(store: Datastore) -> None:
    plant(store, 2, "keys.npy", flip(17))
    findings = found(open_datastore(store.path), Table())
    (error,) = findings["000002"].errors
    assert "is not what this checkpoint makes of this text" in str(error)
    assert "1 other keys, the first in row 17, apart by up to 0.00" in str(error)
    assert not findings["000000"].errors and not findings["000001"].errors


def test_one_value(store: Datastore) -> None:
    def change(values: np.ndarray) -> None:
        values[[5, 9]] += 1

    plant(store, 0, "values.npy", change)
    (error,) = found(open_datastore(store.path), Table())["000000"].errors
    assert "2 other values, the first in row 5" in str(error)


def test_how_far_keys_are_apart(store: Datastore) -> None:
    (error,) = found(store, Table(add=0.25))["000000"].errors
    assert "40 other keys, the first in row 0, apart by up to 0.2 of their length" in str(error)


@pytest.mark.parametrize(
    ("versions", "context", "says"),
    [
        ({"processor": "q"}, {}, "processor p then, q now"),
        ({"torch": "3"}, {}, "torch 2 then, 3 now"),
        ({}, {"max_tokens": 32}, "max_tokens 64 then, 32 now"),
    ],
)
def test_rounding_is_no_fault_where_it_is_to_be_expected(
    store: Datastore, versions: dict[str, str], context: dict[str, int], says: str
) -> None:
    now = replace(MADE, versions={**KNOWN, **versions}, context={**READ, **context})
    said = found(store, Table(now, add=1e-3))["000002"]
    assert not said.errors
    assert "the same but for rounding: 59 other keys" in said.summary and says in said.summary
    (error,) = found(store, Table(now, add=0.02))["000002"].errors
    assert says in str(error)
    assert "bit for bit" in found(store, Table(now))["000002"].summary
    (error,) = found(store, Table(MADE, add=1e-3))["000002"].errors
    assert "then" not in str(error)


def test_datastores_of_before_do_not_say_how_they_were_made(tmp_path: Path) -> None:
    keys, values = random_entries(100, 6)
    flat = write_store(tmp_path / "flat", keys, values, dtype="float16")
    (said,) = found(flat, Table(add=1e-3)).values()
    assert "torch unknown then, 2 now" in said.summary and "max_tokens unknown then" in said.summary
    assert not said.errors


def test_a_flat_datastore_is_one_block(tmp_path: Path) -> None:
    keys, values = random_entries(100, 6)
    flat = write_store(tmp_path / "flat", keys, values)
    (said,) = found(flat, Table(), 0.01).values()
    assert "100 entries computed again: the same, bit for bit (keys in float32" in said.summary


def test_without_keys_the_values_are_compared(tmp_path: Path) -> None:
    store = write_cut(tmp_path / "store", key_dtype=None)
    findings = found(store, Table())
    assert all("bit for bit (values alone)" in one.summary for one in findings.values())
    plant(store, 1, "values.npy", lambda values: values.fill(3))
    assert found(open_datastore(store.path), Table())["000002"].errors == ()


def test_blocks_are_found_where_others_were_forgotten(store: Datastore) -> None:
    """The first one is gone, so that nobody says where the others began; one token says nothing."""
    forget(store.path, [(0, 40)])
    text = Table()
    findings = found(store, text)
    assert "bit for bit" in findings["000002"].summary
    assert "1 blocks that were drawn" in findings["blocks"].summary
    assert text.computed == [range(41, 100)]


def test_blocks_of_another_text_are_named(store: Datastore) -> None:
    """Half of the text is another one."""
    text = Table()
    text.tokens[:40] = 49
    findings = found(store, text)
    assert "1 blocks that were drawn are not of the text in --data" in findings["blocks"].summary
    assert "000000" in findings["blocks"].summary and "000000" not in findings
    with pytest.raises(DatastoreError) as caught:
        found(store, None)
    assert_helps(caught, "is of the text in --data")


def test_another_model_or_dictionary_is_refused(store: Datastore) -> None:
    for other, says in (({"model": "c" * 64}, "checkpoint"), ({"dictionary": "c" * 64}, "diction")):
        with pytest.raises(DatastoreError) as caught:
            found(store, Table(replace(MADE, **other)))
        assert_helps(caught, says)


def test_what_does_not_say_its_text_is_refused(store: Datastore) -> None:
    check_can_be_computed(store)
    for origin_ in (replace(MADE, split=""), replace(MADE, context={})):
        other = replace(store.manifest, origin=origin_)
        with pytest.raises(DatastoreError) as caught:
            check_can_be_computed(Datastore(store.path, other, None, store.values, "", store.path))
        assert_helps(caught, "cannot be computed again")


def test_flags_that_read_the_same_text() -> None:
    context = {"tokens_per_sample": 128, "context_window": 32, "sample_break_mode": "eos"}
    context |= {"max_tokens": 4096, "batch_size": 3, "add_bos_token": 1, "precision": "float16"}
    made = replace(MADE, context=context)
    assert " ".join(words(reading_flags(made))) == (
        "--knn-keytype last_ffn_input --gen-subset train --tokens-per-sample 160 "
        "--context-window 32 --sample-break-mode eos --max-tokens 4096 --batch-size 3 "
        "--add-bos-token --fp16"
    )
