"""Building an index: what it finds, how that is measured, how a build that was stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from msgspec.structs import replace
from stores import alter, assert_helps, brute_force, build_index, clustered, random_entries, share

from fairseq_knnlm.errors import IndexFileError
from fairseq_knnlm.files import write_sealed
from fairseq_knnlm.index import build as module
from fairseq_knnlm.index import snapshots
from fairseq_knnlm.index.build import BuildOptions, IndexBuilder, build, plan
from fairseq_knnlm.index.card import IndexCard
from fairseq_knnlm.index.recall import TrueNeighbours
from fairseq_knnlm.index.recipes import choose
from fairseq_knnlm.index.search import SearchIndex
from fairseq_knnlm.index.snapshots import Snapshots

ROWS, WIDTH, K = 1000, 8, 10


def keys() -> np.ndarray:
    return random_entries(ROWS, WIDTH)[0]


def queries(rows: int = 30) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.manual_seed(9))


def made(recipe: str, **how: Any) -> tuple[Any, IndexCard]:
    return build_index(keys(), recipe, **{"queries": 20, "k": K, **how})


def truth_of(xb: np.ndarray, asked: int, metric: str = "l2", step: int = 333) -> TrueNeighbours:
    """What is true of all keys, which are shown a few at a time and not in their order."""
    drawn = np.random.default_rng(0).choice(len(xb), asked, replace=False)
    truth = TrueNeighbours(xb[drawn], drawn, K, metric)
    for start in reversed(range(0, len(xb), step)):
        truth.see(xb[start : start + step], np.arange(start, min(start + step, len(xb))))
    return truth


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_flat_is_brute_force(metric: str, dtype: str) -> None:
    xb = keys().astype(dtype)
    index, card = build_index(xb, "auto", metric=metric)
    distances, ids = SearchIndex(index, card).search(queries(), K)
    expected, true = brute_force(xb, queries().numpy(), K, metric)
    assert (card.factory, card.exact, card.nprobe) == ("Flat", True, 0)
    assert np.array_equal(ids.numpy(), true)
    np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_adding_in_chunks_is_adding_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 7 * WIDTH * 4)
    index, _ = made("Flat")
    assert np.array_equal(faiss.rev_swig_ptr(index.get_xb(), ROWS * WIDTH), keys().ravel())


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_all_lists_find_everything_and_few_find_most(metric: str) -> None:
    _, true = brute_force(keys(), queries().numpy(), K, metric)
    found = {}
    for nprobe in (1, 8, 16):
        index, card = made("IVF16,Flat", metric=metric, nprobe=nprobe)
        assert card.nprobe == nprobe
        assert not card.exact
        found[nprobe] = share(SearchIndex(index, card).search(queries(), K)[1].numpy(), true)
    assert found[16] == 1.0
    assert 0.1 < found[1] < found[8] < 1.0
    assert found[8] > 0.8


def test_two_builds_are_the_same() -> None:
    (one, card), (other, _) = made("IVF16,PQ4x4", nprobe=4), made("IVF16,PQ4x4", nprobe=4)
    pair = [SearchIndex(index, card).search(queries(), K) for index in (one, other)]
    assert torch.equal(pair[0][1], pair[1][1])


def test_more_than_there_is_comes_back_as_minus_one() -> None:
    index, card = made("Flat")
    _, ids = SearchIndex(index, card).search(queries(2), ROWS + 3)
    assert ids[:, ROWS:].tolist() == [[-1] * 3] * 2
    assert ids[:, :ROWS].min() == 0


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("recipe", ["IVF16,Flat", "IVF16,PQ4x4fs", "SQ4"])
def test_recall_is_that_of_brute_force(recipe: str, metric: str) -> None:
    """All keys are asked, so that no sample stands between; each without itself."""
    index, card = made(recipe, metric=metric, nprobe=2)
    searcher = SearchIndex(index, card)
    truth = truth_of(keys(), ROWS, metric)
    _, true = brute_force(keys(), keys(), K + 1, metric)
    _, found = searcher.search(torch.from_numpy(keys()), K + 1)
    shares = [
        len(set([r for r in t if r != row][:K]) & set(f)) / K
        for row, (t, f) in enumerate(zip(true.tolist(), found.tolist(), strict=True))
    ]
    assert truth.recall(searcher) == pytest.approx(np.mean(shares), abs=1e-3)
    assert truth.recall(searcher) < 1


def test_an_exact_index_finds_all() -> None:
    index, card = made("Flat")
    assert card.recall == 1.0
    truth = truth_of(keys(), 50)
    assert truth.recall(SearchIndex(index, card)) == 1.0


@pytest.mark.parametrize("recipe", ["IVF64,Flat", "PCAR8,IVF64,Flat", "IVF64,Flat,Refine(Flat)"])
def test_coverage_is_the_recall_of_full_keys(recipe: str) -> None:
    """Where keys are not compressed, what lies in the visited lists is what is found."""
    xb = clustered()
    index, card = build_index(xb, recipe)
    truth = truth_of(xb, 100)
    coverage = truth.coverage(index)
    assert coverage.shape == (64,)
    assert coverage[-1] == 1.0
    for nprobe in (1, 2, 7, 64):
        found = truth.recall(SearchIndex(index, replace(card, nprobe=nprobe)))
        assert found == pytest.approx(coverage[nprobe - 1], abs=1e-3)


@pytest.mark.parametrize("recall", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("rows", [clustered, keys])
def test_the_chosen_nprobe_covers_what_is_asked_and_no_more(
    rows: Callable[[], np.ndarray], recall: float
) -> None:
    xb = rows()
    index, card = build_index(xb, "IVF64,PQ4x4fsr", queries=100, k=K, recall=recall)
    assert card.coverage is not None
    assert card.coverage >= recall
    assert index.nprobe == card.nprobe
    if card.nprobe > 1:
        fewer = build_index(xb, "IVF64,PQ4x4fsr", queries=100, k=K, nprobe=card.nprobe - 1)[1]
        assert fewer.coverage is not None
        assert fewer.coverage < recall


def test_an_index_of_unknown_recall_has_the_papers_nprobe() -> None:
    _, card = build_index(clustered(), "IVF64,Flat")
    assert (card.nprobe, card.recall, card.coverage) == (32, None, None)


@pytest.mark.parametrize("lists", [1, 5])
def test_the_chosen_nprobe_is_within_the_lists(lists: int) -> None:
    _, card = made(f"IVF{lists},Flat")
    assert 1 <= card.nprobe <= lists


def test_the_card_says_what_was_measured() -> None:
    _, card = made("IVF16,PQ4x4", nprobe=4, queries=50)
    assert (card.factory, card.metric, card.rows, card.width) == ("IVF16,PQ4x4", "l2", ROWS, WIDTH)
    assert card.recall is not None
    assert 0 < card.recall < 1
    assert card.recall_at == K
    assert card.faiss == faiss.__version__
    assert card.coverage is not None
    assert card.describe() == (
        f"IVF16,PQ4x4, nprobe 4 (covers {card.coverage:.2f}), recall@{K} {card.recall:.2f}"
    )
    assert made("Flat")[1].describe() == "Flat"


@pytest.mark.parametrize("recipe", ["IVF16,Nonsense", "PQ3", "IVF100000,Flat"])
def test_what_faiss_refuses_is_told(recipe: str) -> None:
    with pytest.raises(IndexFileError) as caught:
        made(recipe)
    assert_helps(caught, recipe)


@pytest.mark.parametrize("recipe", ["IDMap,Flat", "RFlat"])
def test_what_faiss_refuses_is_told_without_its_source(recipe: str) -> None:
    """The first is a bare RuntimeError from add; the second names a C++ signature."""
    with pytest.raises(IndexFileError) as caught:
        build_index(random_entries(300, 8)[0], recipe)
    assert "std::" not in str(caught.value)


# Out of order, and in parts


def test_rows_in_any_order_give_the_same_neighbours() -> None:
    """As when an index is filled from a forward pass that does not follow the text."""
    xb, recipe = keys(), choose("IVF16,PQ4x4fsr", ROWS, WIDTH)
    builder = IndexBuilder(recipe, WIDTH, ROWS, BuildOptions(queries=20, k=K, nprobe=4))
    everything = np.arange(ROWS)
    builder.train(xb, everything)
    for rows in np.array_split(np.random.default_rng(2).permutation(ROWS), 9):
        builder.see(xb[rows], rows)
        builder.add(xb[rows], rows)
    index, card = builder.finish()
    expected, same = made("IVF16,PQ4x4fsr", nprobe=4)
    pair = [SearchIndex(*made).search(queries(), K) for made in ((index, card), (expected, same))]
    torch.testing.assert_close(pair[0][0], pair[1][0])
    assert share(pair[0][1].numpy(), pair[1][1].numpy()) > 0.99  # but for ties
    assert card.recall == pytest.approx(same.recall, abs=0.05)  # other keys are asked


class Stopped(Exception):
    pass


def build_in_parts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int | None, **how: Any
) -> tuple[Any, IndexCard]:
    """Builds with a snapshot after each of ten chunks, and perhaps stops before the next."""
    recipe, options = choose("IVF16,PQ4x4fsr", ROWS, WIDTH), BuildOptions(queries=20, k=K, **how)
    monkeypatch.setattr(module, "CHUNK_BYTES", 100 * WIDTH * 4)
    monkeypatch.setattr(snapshots, "INTERVAL", 0.0)
    add, done = IndexBuilder.add, []

    def add_and_stop(self: IndexBuilder, xb: np.ndarray, rows: np.ndarray) -> None:
        if len(done) == stop_after:
            raise Stopped
        done.append(rows)
        add(self, xb, rows)

    monkeypatch.setattr(IndexBuilder, "add", add_and_stop)
    shots = Snapshots(folder, plan(recipe, options, "a" * 64))
    try:
        return build(keys(), recipe, options, snapshots=shots, progress=False)
    finally:
        monkeypatch.setattr(IndexBuilder, "add", add)


def test_a_build_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without losing or repeating a key: the result is that of a build in one go."""
    with pytest.raises(Stopped):
        build_in_parts(tmp_path, monkeypatch, 3)
    assert {file.name for file in tmp_path.iterdir()} == {"300.index", "snapshot.json"}
    with pytest.raises(Stopped):
        build_in_parts(tmp_path, monkeypatch, 4)
    assert {file.name for file in tmp_path.iterdir()} == {"700.index", "snapshot.json"}
    index, card = build_in_parts(tmp_path, monkeypatch, 3)  # that many were left
    expected, same = made("IVF16,PQ4x4fsr")
    pair = [SearchIndex(*made).search(queries(), K) for made in ((index, card), (expected, same))]
    assert torch.equal(pair[0][1], pair[1][1])
    assert card == same


@pytest.mark.parametrize("spoil", ["plan", "index", "card", "count", "bit", "version"])
def test_a_snapshot_that_does_not_fit_is_passed_over(
    spoil: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(Stopped):
        build_in_parts(tmp_path, monkeypatch, 3)
    if spoil == "index":
        (tmp_path / "300.index").write_bytes(b"none")
    elif spoil == "bit":
        alter(tmp_path / "300.index")
    elif spoil == "version":
        plan_of = json.loads((tmp_path / "snapshot.json").read_text())["plan"]
        fields = {"plan": plan_of, "rows": 300}
        write_sealed(tmp_path / "snapshot.json", snapshots.FORMAT, 1, fields)
    elif spoil == "card":
        (tmp_path / "snapshot.json").write_text("{}")
    elif spoil == "count":
        faiss.write_index(made("IVF16,PQ4x4fsr")[0], str(tmp_path / "300.index"))
    seed = 1 if spoil == "plan" else 0
    index, card = build_in_parts(tmp_path, monkeypatch, None, seed=seed)
    assert "starting anew" in caplog.text
    expected, same = made("IVF16,PQ4x4fsr", seed=seed)
    pair = [SearchIndex(*made).search(queries(), K) for made in ((index, card), (expected, same))]
    assert torch.equal(pair[0][1], pair[1][1])


def test_a_snapshot_that_finds_the_disk_full_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshots, "write_file", full)
    _, card = build_in_parts(tmp_path, monkeypatch, None)
    assert card.rows == ROWS
    assert "No space left" in caplog.text
    assert not list(tmp_path.iterdir())


def test_snapshots_are_cleared_and_may_be_left_out(tmp_path: Path) -> None:
    shots = Snapshots(tmp_path / "work", {})
    assert shots.latest() is None
    shots.take(made("Flat")[0], ROWS)  # too soon
    assert not (tmp_path / "work").exists()
    (tmp_path / "work").mkdir()
    shots.clear()
    assert not (tmp_path / "work").exists()
