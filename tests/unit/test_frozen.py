"""Files of earlier versions, as the code of the time wrote them, open and mean what they meant.

What they hold is written beside them in decimal (tests/data/README.md). Neighbours are compared
with brute force over these numbers, seals with the rule in docs/format.md.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT

from fairseq_knnlm.calibration.stored import read_calibration
from fairseq_knnlm.calibration.table import read_table
from fairseq_knnlm.datastore import Datastore, open_datastore, read_documents
from fairseq_knnlm.datastore.legacy import open_legacy
from fairseq_knnlm.datastore.making import Making, Plan
from fairseq_knnlm.errors import KnnlmError
from fairseq_knnlm.experts.ngram_file import load_counts
from fairseq_knnlm.mixture.mixers import Gate
from fairseq_knnlm.retrieval.opening import open_retriever
from fairseq_knnlm.runs.append import plan_onto
from fairseq_knnlm.runs.build_index import extend_index
from fairseq_knnlm.runs.changing import compact_store, forget_parts
from fairseq_knnlm.runs.options import SavingOptions

DATA = ROOT / "tests" / "data"
LISTED = np.loadtxt(DATA / "entries.txt")
VALUES, KEYS = LISTED[:, 0].astype(int), LISTED[:, 1:]
K = 10
WITH_KEYS = ["v1-first", "v1-calibration2", "v1-landed"]
WITHOUT = ["v2-card1", "v2-landed"]
COMPRESSED = ["v3-pca", "v3-merge", "v3-both", "v3-landed"]
#: The versions of manifest and card, and the name of whatever holds the card.
CARDS = {
    "v1-first": (1, 1),
    "v2-card1": (2, 1),
    "v1-landed": (1, 2),
    "v2-landed": (2, 2),
    "v3-landed": (3, 2),
    "v4-blocks": (4, 3),
}
#: What counts of the one in blocks: rows of the text without 10:20, 38:42 and 60:70.
LEFT = np.r_[0:10, 20:38, 42:60, 70:96]


def queries(count: int = 20) -> np.ndarray:
    """Between the keys: no distance comes twice."""
    rng = np.random.default_rng(3)
    return (KEYS[:count] + rng.normal(size=(count, 8))).astype("f4")


def nearest(keys: np.ndarray, asked: np.ndarray, k: int = K) -> tuple[np.ndarray, np.ndarray]:
    """Distances and rows of the nearest keys, by brute force in double precision."""
    distances = ((asked[:, None].astype("f8") - keys) ** 2).sum(axis=2)
    rows = np.argsort(distances, axis=1)[:, :k]
    return np.take_along_axis(distances, rows, axis=1), rows


def assert_finds(store: Datastore, keys: np.ndarray, values: np.ndarray) -> None:
    """The datastore's index finds what brute force does among these keys."""
    found = open_retriever(store, K).search(torch.from_numpy(queries()), K)
    distances, rows = nearest(keys, queries())
    assert np.array_equal(found.ids.numpy(), rows)
    assert np.array_equal(found.values.numpy(), values[rows])
    np.testing.assert_allclose(found.distances.numpy(), distances, rtol=5e-3)


def listed(name: str) -> dict[str, np.ndarray]:
    """The arrays of a compressed datastore, from its listing."""
    arrays: dict[str, np.ndarray] = {}
    for part in (DATA / f"{name}.txt").read_text().split("# ")[1:]:
        head, _, numbers = part.partition("\n")
        arrays[head.split()[0]] = np.loadtxt(numbers.splitlines())
    return arrays


def version(file: Path) -> int:
    return int(json.loads(file.read_text())["version"])


def card_in(index: Path) -> dict[str, Any]:
    """The card behind an index, by docs/format.md."""
    content = index.read_bytes()
    assert content[-8:] == b"kNNcard1"
    length = int.from_bytes(content[-16:-8], "little")
    card: dict[str, Any] = json.loads(content[-16 - length : -16])
    return card


@pytest.mark.parametrize("name", CARDS)
def test_they_are_of_the_versions_that_they_are_kept_for(name: str) -> None:
    manifest, card = CARDS[name]
    assert version(DATA / name / "manifest.json") == manifest
    beside = DATA / name / "knn.index.json"
    assert beside.exists() == (card == 1)
    assert (version(beside) if card == 1 else card_in(DATA / name / "knn.index")["version"]) == card


@pytest.mark.parametrize("name", WITH_KEYS)
def test_keys_and_values_are_those_that_were_saved(name: str) -> None:
    store = open_datastore(DATA / name, verify=True)
    assert np.array_equal(store.full_keys(), KEYS)
    assert np.array_equal(store.values, VALUES)
    assert (store.manifest.key_dtype, store.manifest.value_dtype) == ("float16", "uint16")
    assert store.breaks.tolist() == [0]


@pytest.mark.parametrize("name", WITHOUT)
def test_without_keys_there_are_values_and_neighbours(name: str) -> None:
    store = open_datastore(DATA / name, verify=True)
    assert store.keys is None
    assert np.array_equal(store.values, VALUES)
    assert_finds(store, KEYS, VALUES)


@pytest.mark.parametrize("name", ["v1-first", "v1-landed"])
@pytest.mark.parametrize("similarity", ["l2", "do_not_recomp_l2"])
def test_neighbours_are_those_of_brute_force(name: str, similarity: str) -> None:
    store = open_datastore(DATA / name)
    asked = torch.from_numpy(queries())
    found = open_retriever(store, K, similarity=similarity).search(asked, K)
    distances, rows = nearest(KEYS, queries())
    assert np.array_equal(found.ids.numpy(), rows)
    np.testing.assert_allclose(found.distances.numpy(), distances, rtol=1e-4)


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_ones_hold_what_is_listed(name: str) -> None:
    store, arrays = open_datastore(DATA / name, verify=True), listed(name)
    for array, there in (
        ("keys", store.keys),
        ("values", store.values),
        ("projection", store.projection),
        ("weights", store.weights),
    ):
        assert (array in arrays) == (there is not None), array
        if there is not None:
            np.testing.assert_allclose(np.asarray(there, "f8"), arrays[array], rtol=1e-8)
    assert store.manifest.query_width == 8
    if name != "v3-pca":  # merged entries are those of before, each with its value
        assert arrays["weights"].sum() == len(VALUES)
        assert set(arrays["values"]) == set(VALUES)
    if name == "v3-merge":
        pairs = {tuple(entry) for entry in LISTED}
        assert {tuple(entry) for entry in np.c_[arrays["values"], arrays["keys"]]} < pairs


def test_a_compressed_one_finds_what_brute_force_does() -> None:
    store, arrays = open_datastore(DATA / "v3-landed"), listed("v3-landed")
    found = open_retriever(store, K).search(torch.from_numpy(queries()), K)
    distances, rows = nearest(arrays["keys"], queries() @ arrays["projection"])
    assert np.array_equal(found.ids.numpy(), rows)
    np.testing.assert_allclose(found.distances.numpy(), distances, rtol=1e-3)
    assert found.log_weights is not None
    np.testing.assert_allclose(found.log_weights.exp().numpy(), arrays["weights"][rows], rtol=1e-6)


def test_in_blocks_is_what_was_not_forgotten() -> None:
    """Which is all of a text up to row 64, cut before row 40, and of one that was added there."""
    store = open_datastore(DATA / "v4-blocks", verify=True)
    assert [block.rows for block in store.blocks] == [40, 24, 32]
    assert np.array_equal(store.full_keys()[:], KEYS[LEFT])
    assert np.array_equal(store.values, VALUES[LEFT])
    assert store.breaks.tolist() == [0, 10, 28, 46]  # those of 0, 20, 42 and 70
    assert len(store.manifest.before) == 2  # once more text came, once some was forgotten


def test_in_blocks_nothing_is_found_that_was_forgotten() -> None:
    """Not even by those who ask for its very keys."""
    store, gone = open_datastore(DATA / "v4-blocks"), np.setdiff1d(np.arange(96), LEFT)
    assert_finds(store, KEYS[LEFT], VALUES[LEFT])
    asked = KEYS[gone].astype("f4")
    found = open_retriever(store, K).search(torch.from_numpy(asked), K)
    distances, _ = nearest(KEYS[LEFT], asked)
    np.testing.assert_allclose(found.distances.numpy(), distances, rtol=1e-4)
    assert distances.min() > 0


def test_a_block_and_its_piece_go_on_holding_all() -> None:
    """By docs/format.md, in NumPy alone: a code is the number of a list, and here the key."""
    for number, (start, stop) in enumerate([(0, 40), (40, 64), (64, 96)]):
        folder = DATA / f"v4-blocks/blocks/{number:06d}"
        assert version(folder / "manifest.json") == 1
        assert np.array_equal(open_datastore(folder).full_keys(), KEYS[start:stop])
        (piece,) = folder.glob("piece-*.npy")
        with piece.open("rb") as file:
            codes = np.load(file)
        assert codes.shape == (stop - start, 1 + 8 * 4)
        assert np.array_equal(codes[:, 1:].copy().view("<f4"), KEYS[start:stop])


def begins_by_hand(values: np.ndarray) -> list[int]:
    """A line ends with 2, and an empty one is a 2 at its beginning."""
    ends = [(values[row - 2 : row + 1] == 2).tolist() for row in range(2, len(values))]
    return [0, *(row for row, ended in enumerate(ends, 2) if ended == [True, True, False])]


def test_documents_begin_after_empty_lines() -> None:
    found = read_documents(open_datastore(DATA / "v1-landed"))
    assert found is not None
    assert found.starts.tolist() == begins_by_hand(VALUES)
    assert len(found) > 3


def test_documents_in_blocks() -> None:
    """Of two texts; what is left of a document begins with its first row that is left."""
    found = read_documents(open_datastore(DATA / "v4-blocks"))
    assert found is not None
    begins = [*begins_by_hand(VALUES[:64]), *(64 + row for row in begins_by_hand(VALUES[64:]))]
    assert found.starts.tolist() == sorted({int((row > LEFT).sum()) for row in begins})


def test_n_grams_are_counted_as_before() -> None:
    store = open_datastore(DATA / "v1-landed")
    model = load_counts(DATA / "v1-landed/ngram.npz", store.fingerprint)
    tokens = VALUES.tolist()
    for order in (1, 2, 3):
        grams = {tuple(tokens[at : at + order]) for at in range(len(tokens) - order + 1)}
        assert len(model.orders[order - 1].keys) == len(grams)
    assert (model.order, model.tokens) == (3, len(VALUES))
    assert model.orders[2].counts[:-1].sum() == len(VALUES) - 2


def test_the_calibration_of_the_version_before() -> None:
    """Its gate has the weights 1 / (1 + 2 ** x) and the rest, x being a distance less 1."""
    store = open_datastore(DATA / "v1-calibration2")
    found = read_calibration(DATA / "v1-calibration2/calibration.json", [store.fingerprint])
    assert found is not None
    assert [mixture.perplexity for mixture in found.mixtures] == [100.0, 90.0, 80.0]
    gate = found.best.mixer
    assert isinstance(gate, Gate)
    distances = torch.tensor([[1.0], [3.0], [-1.0]])
    weights = gate.log_weights({"knn_distances": distances}).exp()[:, 0].detach()
    np.testing.assert_allclose(weights, [1 / 2, 1 / 5, 4 / 5], rtol=1e-6)


def test_the_calibration_that_landed() -> None:
    store = open_datastore(DATA / "v1-landed")
    found = read_calibration(DATA / "v1-landed/calibration.json", [store.fingerprint])
    assert found is not None
    assert found.best.mixer.kind == "fixed"
    assert found.best.mixer.log_weights({}).exp().tolist() == [0.75, 0.25]
    assert [mixture.choice_perplexity for mixture in found.mixtures] == [101.0, 91.0, 96.0]


def test_the_score_table_that_landed() -> None:
    table = read_table(DATA / "table-v2.npz")
    assert table["lm"].tolist() == [-1.0, -2.0, -3.0]
    assert table["knn"].tolist() == [[-2.0, -3.0], [-4.0, -5.0], [-6.0, -7.0]]
    assert table.card["k"] == 10


def test_files_of_the_published_code() -> None:
    """Which are numbers and nothing else, whatever their names say."""
    assert np.array_equal(np.fromfile(DATA / "published_keys.npy", "<f4"), KEYS.ravel())
    store = open_legacy(DATA / "published", 96, fp16=False, vocabulary=20)
    assert np.array_equal(store.full_keys(), KEYS)
    assert np.array_equal(store.values, VALUES)


@pytest.fixture
def living(tmp_path: Path) -> Path:
    """A copy of a datastore of the first version, to be changed."""
    shutil.copytree(DATA / "v1-landed", tmp_path / "store")
    return tmp_path / "store"


def test_more_of_one_in_blocks_is_forgotten(tmp_path: Path) -> None:
    """What is left is found, also when blocks are new; the folders hold nothing else then."""
    living = tmp_path / "store"
    shutil.copytree(DATA / "v4-blocks", living)
    before = open_datastore(living).fingerprint
    forget_parts(living, [], [(5, 12), (46, 72)])  # the whole last block
    left = LEFT[np.r_[0:5, 12:46]]
    for change in (lambda: None, lambda: compact_store(living)):
        change()
        store = open_datastore(living, verify=True)
        assert np.array_equal(store.values, VALUES[left])
        assert_finds(store, KEYS[left], VALUES[left])
    assert store.manifest.before[2] == before
    held = [len(np.load(file)) for file in living.rglob("values.npy")]
    assert sum(held) == len(left)


def test_rows_of_the_first_version_are_forgotten(living: Path) -> None:
    """What is left is found as in a datastore built without them, also when files are new."""
    forgotten = forget_parts(living, [], [(10, 20), (90, 96)])
    assert forgotten.index_serves
    left = np.r_[0:10, 20:90]
    for change in (lambda: None, lambda: compact_store(living)):
        change()
        store = open_datastore(living, verify=True)
        assert np.array_equal(store.values, VALUES[left])
        assert_finds(store, KEYS[left], VALUES[left])
    assert store.manifest.before[0] == open_datastore(DATA / "v1-landed").fingerprint


@pytest.mark.parametrize(
    ("name", "rows"), [("v1-first", ...), ("v1-landed", ...), ("v4-blocks", LEFT)]
)
def test_entries_are_added(name: str, rows: Any, tmp_path: Path) -> None:
    living = tmp_path / "store"
    shutil.copytree(DATA / name, living)
    before = open_datastore(living)
    more = (queries(30)[:, ::-1] * 64).round() / 64
    plan = Plan(width=8, key_dtype="float16", origin=before.manifest.origin, starts=[0, 20, 30])
    making = Making(living, plan_onto(living, plan, SavingOptions(block_rows=20)))
    for block in making.plan.blocks:
        new = making.plan.rows(block)
        writer = making.writer(block)
        writer.write(np.arange(len(new)), more[new.start : new.stop], np.full(len(new), 5))
        writer.publish()
    making.join(extend_index)
    store = open_datastore(living, verify=True)
    keys = np.concatenate([KEYS[rows], more.astype(np.float16)])
    assert np.array_equal(store.full_keys()[:], keys)
    assert before.fingerprint in store.manifest.before
    assert_finds(store, keys, np.concatenate([VALUES[rows], np.full(30, 5)]))


def renumber(file: Path, number: int) -> None:
    """Gives a sealed file another version, and the seal that docs/format.md says."""
    content = json.loads(file.read_text())
    content["version"] = number
    del content["fingerprint"]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["fingerprint"] = hashlib.sha256(canonical.encode()).hexdigest()
    file.write_text(json.dumps(content))


def renumber_archive(file: Path, number: int) -> None:
    """Gives an archive's card another version."""
    with np.load(file, allow_pickle=False) as archive:
        arrays = dict(archive)
    card = json.loads(str(arrays.pop("card")[0]))
    card["version"] = number
    np.savez(file, card=np.array([json.dumps(card)]), **arrays)


def read_all(folder: Path) -> None:
    """Whatever is in a copy of the files."""
    store = open_datastore(folder)
    open_retriever(store, K)
    read_documents(store)
    load_counts(folder / "ngram.npz", store.fingerprint)
    read_calibration(folder / "calibration.json", [store.fingerprint])


@pytest.mark.parametrize(
    ("file", "number", "spoil"),
    [
        ("manifest.json", 5, renumber),
        ("calibration.json", 4, renumber),
        ("documents.npz", 3, renumber_archive),
        ("documents.npz", 0, renumber_archive),
        ("ngram.npz", 2, renumber_archive),
        ("ngram.npz", 0, renumber_archive),
    ],
)
def test_versions_that_nobody_wrote_are_refused(
    living: Path, file: str, number: int, spoil: Callable[[Path, int], None]
) -> None:
    read_all(living)
    spoil(living / file, number)
    with pytest.raises(KnnlmError, match=rf"(?s){file}.*version {number}"):
        read_all(living)


def test_a_card_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    shutil.copytree(DATA / "v1-first", tmp_path / "store")
    renumber(tmp_path / "store/knn.index.json", 4)
    with pytest.raises(KnnlmError, match=r"(?s)knn.index.json.*version 4"):
        open_retriever(open_datastore(tmp_path / "store"), K)


def test_the_first_calibration_is_refused() -> None:
    store = open_datastore(DATA / "v1-first")
    with pytest.raises(KnnlmError, match="tune") as caught:
        read_calibration(DATA / "v1-first/calibration.json", [store.fingerprint])
    assert "version 1" in str(caught.value)


@pytest.mark.parametrize("number", [1, 4])
def test_score_tables_of_other_versions_are_refused(tmp_path: Path, number: int) -> None:
    path = tmp_path / "table.npz"
    shutil.copy(DATA / "table-v2.npz", path)
    renumber_archive(path, number)
    for table in (path, DATA / "table-v1.npz"):
        with pytest.raises(KnnlmError, match="another version") as caught:
            read_table(table)
    assert "--score-table" in str(caught.value)
