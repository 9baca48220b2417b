"""The FAISS index: searches against brute force, files that belong together, devices, recipes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from stores import alter, assert_helps, lengthen, random_entries, truncate

from fairseq_knnlm import index as module
from fairseq_knnlm.errors import ConfigError, IndexFileError
from fairseq_knnlm.index import (
    IndexCard,
    SearchIndex,
    card_path,
    gpu_obstacle,
    load,
    place,
    read_card,
    save,
)
from fairseq_knnlm.indexing import Exam, build, choose_nprobe
from fairseq_knnlm.recipes import Recipe, choose, lists_of

ROWS, WIDTH, K = 1000, 8, 10
OURS = "d" * 64


def keys() -> np.ndarray:
    return random_entries(ROWS, WIDTH)[0]


def queries(rows: int = 30) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.manual_seed(9))


def brute_force(xb: np.ndarray, xq: np.ndarray, k: int, metric: str) -> tuple[np.ndarray, ...]:
    """(distances, ids) of the k nearest, in float64, best first."""
    xb, xq = xb.astype(np.float64), xq.astype(np.float64)
    scores = xq @ xb.T if metric == "ip" else -((xq[:, None] - xb[None]) ** 2).sum(axis=2)
    ids = np.argsort(-scores, axis=1)[:, :k]
    best = np.take_along_axis(scores, ids, axis=1)
    return (best if metric == "ip" else -best), ids


def made(recipe: str, **how: Any) -> tuple[Any, IndexCard]:
    return build(keys(), recipe, progress=False, **{"recall_queries": 20, "recall_at": K, **how})


def share(found: np.ndarray, true: np.ndarray) -> float:
    pairs = zip(found.tolist(), true.tolist(), strict=True)
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in pairs]))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_flat_is_brute_force(metric: str, dtype: str) -> None:
    xb = keys().astype(dtype)
    index, card = build(xb, "auto", metric=metric, progress=False)
    distances, ids = SearchIndex(index, card).search(queries(), K)
    expected, true = brute_force(xb, queries().numpy(), K, metric)
    assert (card.factory, card.exact, card.nprobe) == ("Flat", True, 0)
    assert np.array_equal(ids.numpy(), true)
    np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_adding_in_chunks_is_adding_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fairseq_knnlm.indexing.CHUNK_BYTES", 7 * WIDTH * 4)
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
def test_the_exam_is_recall_against_brute_force(recipe: str, metric: str) -> None:
    """All keys are asked, so that no sample stands between; each without itself."""
    index, card = made(recipe, metric=metric, nprobe=2)
    searcher = SearchIndex(index, card)
    exam = Exam(keys(), ROWS, K, metric, np.random.default_rng(0))
    _, true = brute_force(keys(), keys(), K + 1, metric)
    _, found = searcher.search(torch.from_numpy(keys()), K + 1)
    shares = [
        len((set(t) & set(f)) - {row}) / len(set(t) - {row})
        for row, (t, f) in enumerate(zip(true.tolist(), found.tolist(), strict=True))
    ]
    assert exam.recall(searcher) == pytest.approx(np.mean(shares), abs=1e-3)
    assert exam.recall(searcher) < 1


def test_an_exact_index_passes_the_exam() -> None:
    index, card = made("Flat")
    assert card.recall == 1.0
    exam = Exam(keys(), 50, K, "l2", np.random.default_rng(0))
    assert exam.recall(SearchIndex(index, card)) == 1.0


def clustered(rows: int = 3000) -> np.ndarray:
    """200 clusters: a few lists hold all that is near."""
    rng = np.random.default_rng(1)
    centres = 10 * rng.normal(size=(200, WIDTH))
    return (centres[rng.integers(200, size=rows)] + rng.normal(size=(rows, WIDTH))).astype("f4")


@pytest.mark.parametrize(("rows", "enough"), [(clustered, 0.95), (keys, 0.9)])
def test_the_chosen_nprobe_finds_enough(rows: Callable[[], np.ndarray], enough: float) -> None:
    """It costs little where keys lie in clusters, and finds what is near in any case."""
    xb = rows()
    index, card = build(xb, "IVF64,Flat", progress=False, recall_queries=0)
    assert (card.nprobe, card.recall) == (32, None)  # unmeasured, the paper's
    exam = Exam(xb, 100, K, "l2", np.random.default_rng(0))
    chosen = choose_nprobe(index, card, exam, 64)
    recall = {
        nprobe: exam.recall(SearchIndex(index, replace(card, nprobe=nprobe)))
        for nprobe in (chosen, 64)
    }
    assert recall[64] == 1.0
    assert recall[chosen] >= enough
    if rows is clustered:
        assert chosen <= 16


@pytest.mark.parametrize("lists", [1, 5])
def test_the_chosen_nprobe_is_within_the_lists(lists: int) -> None:
    _, card = made(f"IVF{lists},Flat")
    assert 1 <= card.nprobe <= lists


def test_the_card_says_what_was_measured() -> None:
    _, card = made("IVF16,PQ4x4", nprobe=4, recall_queries=50)
    assert (card.factory, card.metric, card.rows, card.width) == ("IVF16,PQ4x4", "l2", ROWS, WIDTH)
    assert card.recall is not None
    assert 0 < card.recall < 1
    assert card.recall_at == K
    assert card.faiss == faiss.__version__
    assert card.describe() == f"IVF16,PQ4x4, nprobe 4, recall@{K} {card.recall:.2f}"
    assert made("Flat")[1].describe() == "Flat"


@pytest.mark.parametrize("recipe", ["IVF16,Nonsense", "PQ3", "IVF100000,Flat"])
def test_what_faiss_refuses_is_told(recipe: str) -> None:
    with pytest.raises(IndexFileError) as caught:
        made(recipe)
    assert_helps(caught, recipe)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    index, card = made("IVF16,PQ4x4", nprobe=4)
    save(index, card, tmp_path / "knn.index", OURS)
    return tmp_path / "knn.index"


def loaded(path: Path, **how: Any) -> SearchIndex:
    return load(path, **{"datastore": OURS, "rows": ROWS, "width": WIDTH, **how})


@pytest.mark.parametrize("recipe", ["Flat", "IVF16,PQ4x4fs", "OPQ4,IVF16,PQ4x4"])
def test_save_and_load_keep_index_and_card(tmp_path: Path, recipe: str) -> None:
    path = tmp_path / "knn.index"
    index, card = made(recipe)
    assert save(index, card, path, OURS) == read_card(path)
    assert {file.name for file in tmp_path.iterdir()} == {"knn.index", "knn.index.json"}
    found = loaded(path)
    assert replace(found.card, datastore="", bytes=0, chunks=()) == card
    assert (found.card.datastore, found.card.bytes) == (OURS, path.stat().st_size)
    before, after = SearchIndex(index, card).search(queries(), K), found.search(queries(), K)
    assert torch.equal(before[1], after[1])
    torch.testing.assert_close(before[0], after[0])


@pytest.mark.parametrize("name", ["knn.index", "knn.index.json"])
@pytest.mark.parametrize("spoil", [truncate, alter, lengthen])
def test_damage_is_told(saved: Path, name: str, spoil: Callable[[Path], None]) -> None:
    spoil(saved.with_name(name))
    with pytest.raises(IndexFileError, match="damaged") as caught:
        loaded(saved)
    assert_helps(caught, name, "build_index.py")


def test_an_index_that_is_none_is_told(tmp_path: Path) -> None:
    """Without a card nothing but FAISS looks at it."""
    (tmp_path / "knn.index").write_bytes(b"no index at all")
    with pytest.raises(IndexFileError, match="damaged"):
        loaded(tmp_path / "knn.index")


def test_no_index_there(tmp_path: Path) -> None:
    with pytest.raises(IndexFileError, match="no index at") as caught:
        loaded(tmp_path / "knn.index")
    assert_helps(caught, "build_index.py")


def test_an_index_of_another_datastore_is_refused(saved: Path) -> None:
    with pytest.raises(IndexFileError, match="another datastore") as caught:
        loaded(saved, datastore="e" * 64)
    assert_helps(caught, "eeeeeeeeeeee...", "dddddddddddd...")


@pytest.mark.parametrize("shape", [{"rows": ROWS + 1}, {"width": WIDTH + 1}])
def test_an_index_of_another_shape_is_refused(saved: Path, shape: dict[str, int]) -> None:
    """All that can be said of an index without a card."""
    card_path(saved).unlink()
    loaded(saved)
    with pytest.raises(IndexFileError, match="another datastore"):
        loaded(saved, **shape)


def test_an_index_that_somebody_else_built(tmp_path: Path) -> None:
    quantizer = faiss.IndexFlatIP(WIDTH)
    index = faiss.IndexIVFFlat(quantizer, WIDTH, 64, faiss.METRIC_INNER_PRODUCT)
    index.train(keys())
    index.add(keys())
    faiss.write_index(index, str(tmp_path / "knn.index"))
    assert read_card(tmp_path / "knn.index") is None
    found = loaded(tmp_path / "knn.index")
    assert (found.card.metric, found.card.nprobe, found.card.exact) == ("ip", 32, False)
    assert found.index.nprobe == 32


def test_a_new_index_never_lies_beside_an_old_card(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving that ends halfway leaves an index without a card, which is checked by its shape."""

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module, "write_sealed", fail)
    with pytest.raises(OSError, match="disk full"):
        save(*made("Flat"), saved, OURS)
    assert read_card(saved) is None
    assert loaded(saved).card.exact


@pytest.mark.parametrize("nprobe", [0, -1, 17])
def test_nprobe_beyond_the_lists_is_refused(saved: Path, nprobe: int) -> None:
    with pytest.raises(ConfigError, match="1 to 16"):
        loaded(saved, nprobe=nprobe)


def test_nprobe_given_wins(saved: Path) -> None:
    assert loaded(saved).index.nprobe == 4
    assert loaded(saved, nprobe=16).index.nprobe == 16
    assert loaded(saved, nprobe=16).card.nprobe == 16


def test_nprobe_reaches_the_lists_behind_transforms_and_refinement() -> None:
    for recipe in ("OPQ4,IVF16,Flat", "IVF16,PQ4x4fs,Refine(SQ8)"):
        index, card = made(recipe, nprobe=3)
        SearchIndex(index, replace(card, nprobe=5))
        assert faiss.extract_index_ivf(index).nprobe == 5


# Devices

needs_no_gpu = pytest.mark.skipif(module._gpus() > 0, reason="this machine has a GPU for FAISS")


@needs_no_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:0,1"])
def test_a_gpu_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match="is not here") as caught:
        place(*made("Flat"), device, K)
    assert_helps(caught, device, "--knn-device cpu", "faiss-gpu")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:-1", "", "cuda0"])
def test_a_device_that_is_none_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match="--knn-device names no device"):
        place(*made("Flat"), device, K)


@needs_no_gpu
def test_auto_without_a_gpu_is_the_cpu() -> None:
    index, card = made("Flat")
    assert place(index, card, "auto", K).index is index
    assert not module.wants_gpu("auto")
    assert module.wants_gpu("cuda")
    assert not module.wants_gpu("cpu")


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("Flat", None),
        ("IVF4,Flat", None),
        ("IVF4,SQ8", None),
        ("IVF4,PQ4", None),
        ("OPQ4,IVF4,PQ4", None),
        ("IVF4,PQ4x4fs", "IVF4,PQ4x4fs has no GPU version"),
        ("IVF4,PQ4x4fs,RFlat", "IVF4,PQ4x4fs,RFlat has no GPU version"),
        ("IVF4,Flat,Refine(SQ8)", "IVF4,Flat,Refine(SQ8) has no GPU version"),
        ("HNSW8", "HNSW8 has no GPU version"),
        ("IVF4,PQ4x4", "4 codes of 4 bits"),
    ],
)
def test_what_keeps_an_index_off_the_gpu(recipe: str, reason: str | None) -> None:
    index = faiss.index_factory(WIDTH, recipe)
    card = IndexCard(recipe, "l2", 0, WIDTH, nprobe=4, exact=False)
    assert gpu_obstacle(index, card, K) == reason


def test_code_sizes_and_counts_that_gpus_lack() -> None:
    odd = faiss.index_factory(10, "IVF4,PQ5")
    card = IndexCard("IVF4,PQ5", "l2", 0, 10, nprobe=4, exact=False)
    assert gpu_obstacle(odd, card, K) == "5 codes of 8 bits"
    flat = faiss.index_factory(10, "IVF4,Flat")
    assert gpu_obstacle(flat, card, 2048) is None
    assert "at most 2048" in str(gpu_obstacle(flat, card, 2049))
    assert "at most 2048" in str(gpu_obstacle(flat, replace(card, nprobe=4096), K))


def test_an_index_no_gpu_can_search_is_refused_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a GPU were there: the index is looked at before anything is moved."""
    monkeypatch.setattr(module, "_gpus", lambda: 1)
    index, card = made("IVF16,PQ4x4fs")
    with pytest.raises(IndexFileError, match="cannot be searched on cuda") as caught:
        place(index, card, "cuda", K)
    assert_helps(caught, "IVF16,PQ4x4fs has no GPU version", "--knn-device cpu")
    assert place(index, card, "auto", K).index is index


@pytest.mark.gpu
@pytest.mark.skipif(module._gpus() == 0, reason="needs a CUDA device and faiss-gpu")
@pytest.mark.parametrize("recipe", ["Flat", "IVF16,Flat", "IVF16,SQ8", "IVF16,PQ4"])
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_a_gpu_finds_what_the_cpu_finds(recipe: str, metric: str, tmp_path: Path) -> None:
    xb = clustered()
    index, card = build(xb, recipe, metric=metric, nprobe=8, progress=False, recall_queries=0)
    save(index, card, tmp_path / "knn.index", OURS)
    asked = torch.from_numpy(xb[:50] + 0.1)
    how = {"rows": len(xb), "k": K}
    expected, true = loaded(tmp_path / "knn.index", **how).search(asked, K)
    found = loaded(tmp_path / "knn.index", device="cuda", **how)
    for xq in (asked, asked.cuda()):
        distances, ids = found.search(xq, K)
        assert distances.device == ids.device == xq.device
        assert share(ids.cpu().numpy(), true.numpy()) > (0.9 if "PQ" in recipe else 0.99)
        tolerance = 0.05 if "PQ" in recipe else 1e-3
        torch.testing.assert_close(distances.cpu(), expected, rtol=tolerance, atol=tolerance)


# Recipes


@pytest.mark.parametrize(
    ("rows", "width", "gpu", "expected"),
    [
        (1, 4, False, "Flat"),
        (65_535, 1024, False, "Flat"),
        (65_535, 1024, True, "Flat"),
        (65_536, 1024, False, "IVF512,PQ256x4fs"),
        (2_000_000, 256, False, "IVF4096,PQ128x4fs"),
        (100_000_000, 1024, False, "IVF32768,PQ256x4fs"),
        (2_000_000, 255, False, "IVF4096,SQ8"),
        (2_000_000, 1024, True, "IVF4096,PQ64"),
        (2_000_000, 48, True, "IVF4096,PQ48"),
        (2_000_000, 250, True, "IVF4096,PQ2"),
    ],
)
def test_auto_goes_by_size_and_device(rows: int, width: int, gpu: bool, expected: str) -> None:
    recipe = choose("auto", rows, width, gpu=gpu)
    assert recipe.factory == expected
    assert recipe.nprobe == 0  # measured
    assert recipe.train_rows == 50 * lists_of(expected)


@pytest.mark.parametrize("rows", [65_536, 10**6, 10**9])
@pytest.mark.parametrize("width", [2, 7, 24, 128, 512])
@pytest.mark.parametrize("gpu", [False, True])
def test_faiss_knows_every_automatic_recipe(rows: int, width: int, gpu: bool) -> None:
    recipe = choose("auto", rows, width, gpu=gpu)
    index = faiss.index_factory(width, recipe.factory)
    assert recipe.train_rows <= rows
    assert faiss.extract_index_ivf(index).nlist == lists_of(recipe.factory)
    if gpu:
        card = IndexCard(recipe.factory, "l2", rows, width, nprobe=32, exact=False)
        assert gpu_obstacle(index, card, 1024) is None


def test_the_papers_recipe() -> None:
    assert choose("paper", 103_225_485, 1024) == Recipe("IVF4096,PQ64", 32, 1_000_000)


@pytest.mark.parametrize(("rows", "width"), [(10**6, 100), (10**6, 32), (4095, 64)])
def test_the_papers_recipe_does_not_fit_everything(rows: int, width: int) -> None:
    with pytest.raises(IndexFileError, match="the paper's index does not fit") as caught:
        choose("paper", rows, width)
    assert_helps(caught, f"{rows:,} keys of width {width}", "--recipe auto")


@pytest.mark.parametrize(
    ("factory", "lists"),
    [
        ("Flat", 0),
        ("PQ16x4fs", 0),
        ("IVF4096,PQ64", 4096),
        ("OPQ64_128,IVF1024,PQ64x4fs,Refine(SQ8)", 1024),
        ("IVF65536_HNSW32,Flat", 65536),
        ("IVF256(Flat),PQ8", 256),
    ],
)
def test_factory_strings_are_taken_as_they_are(factory: str, lists: int) -> None:
    assert lists_of(factory) == lists
    recipe = choose(factory, 10**6, 128)
    assert (recipe.factory, recipe.nprobe) == (factory, 0)
    assert recipe.train_rows == max(50 * lists, 100_000)


def test_a_copy_of_index_and_card_is_as_good(saved: Path, tmp_path: Path) -> None:
    """Neither knows where it lies."""
    other = tmp_path / "elsewhere"
    other.mkdir()
    for file in (saved, card_path(saved)):
        shutil.copy(file, other / file.name)
    assert loaded(other / "knn.index").card == loaded(saved).card


@pytest.mark.parametrize("recipe", ["IDMap,Flat", "RFlat"])
def test_what_faiss_refuses_is_told_without_its_source(recipe: str) -> None:
    """The first is a bare RuntimeError from add; the second names a C++ signature."""
    with pytest.raises(IndexFileError) as caught:
        build(random_entries(300, 8)[0], recipe, progress=False)
    assert "std::" not in str(caught.value)
