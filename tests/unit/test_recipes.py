"""Recipes by name, by size, by budget; FAISS must know all of them."""

from __future__ import annotations

import faiss
import pytest
from stores import assert_helps, random_entries

from fairseq_knnlm.errors import IndexFileError
from fairseq_knnlm.index.build import BuildOptions, build
from fairseq_knnlm.index.card import IndexCard
from fairseq_knnlm.index.device import gpu_obstacle
from fairseq_knnlm.index.library import METRICS
from fairseq_knnlm.index.recipes import Recipe, choose, lists_of


@pytest.mark.parametrize(
    ("rows", "width", "gpu", "expected"),
    [
        (1, 4, False, "Flat"),
        (65_535, 1024, False, "Flat"),
        (65_535, 1024, True, "Flat"),
        (65_536, 1024, False, "PCAR256,IVF256,PQ128x4fsr"),
        (2_000_000, 256, False, "PCAR256,IVF1024,PQ128x4fsr"),
        (100_000_000, 1024, False, "PCAR256,IVF8192,PQ128x4fsr"),
        (2_000_000, 255, False, "PCAR254,IVF1024,PQ127x4fsr"),
        (2_000_000, 1024, True, "IVF1024,PQ64"),
        (2_000_000, 48, True, "IVF1024,PQ48"),
        (2_000_000, 250, True, "IVF1024,PQ2"),
    ],
)
def test_auto_goes_by_size_and_device(rows: int, width: int, gpu: bool, expected: str) -> None:
    recipe = choose("auto", rows, width, gpu=gpu)
    assert recipe.factory == expected
    assert recipe.nprobe == 0  # measured
    if expected != "Flat":
        assert recipe.train_rows == max(50 * lists_of(expected), 100_000)


@pytest.mark.parametrize(
    ("width", "max_bytes", "expected"),
    [
        (1024, 72, "PCAR256,IVF1024,PQ128x4fsr"),
        (1024, 40, "PCAR256,IVF1024,PQ64x4fsr"),
        (1024, 136, "PCAR512,IVF1024,PQ256x4fsr"),
        (1024, 10**6, "PCAR1024,IVF1024,PQ512x4fsr"),
        (256, 38, "PCAR240,IVF1024,PQ60x4fsr"),
        (256, 9, "PCAR256,IVF1024,PQ2x4fsr"),
    ],
)
def test_auto_keeps_to_a_budget(width: int, max_bytes: int, expected: str) -> None:
    assert choose("auto", 10**6, width, max_bytes=max_bytes).factory == expected


def test_small_datastores_are_compressed_where_the_budget_or_the_use_says_so() -> None:
    assert choose("auto", 5000, 64, max_bytes=256).factory == "Flat"
    assert choose("auto", 5000, 64, max_bytes=255).factory == "PCAR64,IVF64,PQ32x4fsr"
    assert choose("auto", 5000, 64, lists=True).factory == "PCAR64,IVF64,PQ32x4fsr"


@pytest.mark.parametrize("gpu", [False, True])
def test_a_budget_below_the_row_numbers_is_refused(gpu: bool) -> None:
    with pytest.raises(IndexFileError, match="no index is that small") as caught:
        choose("auto", 10**6, 64, gpu=gpu, max_bytes=8)
    assert_helps(caught, "--max-bytes-per-key above 8")


def test_inner_products_are_not_centred() -> None:
    assert choose("auto", 10**6, 1024, metric="ip").factory == "IVF1024,PQ128x4fs"
    assert choose("auto", 10**6, 250, metric="ip").factory == "IVF1024,PQ125x4fs"


@pytest.mark.parametrize("rows", [65_536, 10**6, 10**9])
@pytest.mark.parametrize("width", [1, 2, 7, 24, 128, 512])
@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("max_bytes", [None, 20, 200])
def test_faiss_knows_every_automatic_recipe(
    rows: int, width: int, gpu: bool, metric: str, max_bytes: int | None
) -> None:
    recipe = choose("auto", rows, width, gpu=gpu, metric=metric, max_bytes=max_bytes)
    if recipe.factory == "Flat":
        return
    index = faiss.index_factory(width, recipe.factory, METRICS[metric])
    inner = faiss.extract_index_ivf(index)
    assert inner.nlist == lists_of(recipe.factory)
    if max_bytes:
        assert inner.code_size + 8 <= max_bytes
    if gpu:
        card = IndexCard(recipe.factory, "l2", rows, width, nprobe=32, exact=False)
        assert gpu_obstacle(index, card, 1024) is None


@pytest.mark.parametrize("width", [1, 3, 16, 40])
def test_automatic_recipes_find_most_of_what_is_near(width: int) -> None:
    """Whatever the width: nearly all lists are visited, so codes alone may err."""
    xb = random_entries(3000, width)[0]
    recipe = choose("auto", len(xb), width, lists=True)
    _, card = build(xb, recipe, BuildOptions(k=50, recall=0.99), progress=False)
    assert card.recall is not None
    assert card.recall > 0.6


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
