"""Entries of an index as codes: what is put together of them is what FAISS itself would have made.

The oracle is FAISS: an index of the same training to which the keys were added.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import faiss
import numpy as np
import pytest
from stores import random_entries

from fairseq_knnlm.index import codes as module
from fairseq_knnlm.index.codes import assemble, can_be_cut, codes_of, encode
from fairseq_knnlm.index.library import METRICS

WIDTH, ROWS = 32, 2400
RECIPES = (
    *("Flat", "SQ8", "PQ4np", "PCA16,SQ8"),
    *("IVF64,Flat", "IVF64,SQ8", "IVF16,PQ4np", "IVF1,PQ8x4", "IVF300,Flat", "OPQ8,IVF16,PQ8x4np"),
    *("IVF64,PQ16x4fs", "IVF64,PQ16x4fsr", "PCAR16,IVF64,PQ8x4fsr", "PCAR30,IVF16,PQ15x4fs"),
    *("PCAR16,IVF64,RaBitQfs", "IVF64,RaBitQfs4", "PCAR16,IVF64,RaBitQ", "IVF16_HNSW8,PQ8x4"),
)
WHOLE = (
    *("HNSW32", "IVF64,PQ16x4fs,RFlat", "IVF64,PQ8+8", "PQ16x4fs", "IDMap,Flat", "NSG16"),
    *("IVF64,PQ16x4fs_64", "IVF64,Flat,Refine(Flat)"),
)


@cache
def keys() -> np.ndarray:
    """Keys of which some are the same, so that there are ties."""
    made = random_entries(ROWS, WIDTH)[0]
    made[1000:1100] = made[:100]
    made[2000:2040] = made[7]
    return made


@cache
def trained_bytes(recipe: str, metric: str) -> np.ndarray:
    index = faiss.index_factory(WIDTH, recipe, METRICS[metric])
    index.train(keys()[:600])
    made: np.ndarray = faiss.serialize_index(index)
    return made


def trained(recipe: str, metric: str = "l2") -> Any:
    return faiss.deserialize_index(trained_bytes(recipe, metric))


def same(one: Any, other: Any) -> bool:
    """Whether FAISS writes the same bytes of both."""
    return bool(np.array_equal(faiss.serialize_index(one), faiss.serialize_index(other)))


def all_lists(index: Any) -> Any:
    if (ivf := faiss.try_extract_index_ivf(index)) is not None:
        ivf.nprobe = ivf.nlist
    return index


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_codes_make_the_index_that_keys_would(recipe: str, metric: str) -> None:
    """To the byte; and it answers alike, ties included, up to all rows."""
    expected = trained(recipe, metric)
    expected.add(keys())
    made = trained(recipe, metric)
    assert can_be_cut(made)
    codes, ids = encode(made, keys()), np.arange(ROWS)
    assert made.ntotal == 0
    assert codes.shape == (ROWS, made.sa_code_size())
    parts = [(codes[a:b], ids[a:b]) for a, b in ((0, 1), (1, 1), (1, 2047))]
    parts.append((codes[2047:], range(2047, ROWS)))
    assert assemble(made, parts) is made
    assert same(made, expected)
    for k in (1, 10, ROWS):
        for found, true in zip(
            all_lists(made).search(keys()[:20], k),
            all_lists(expected).search(keys()[:20], k),
            strict=True,
        ):
            assert np.array_equal(found, true)


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_index_gives_back_its_codes(recipe: str) -> None:
    index = trained(recipe)
    index.add(keys())
    codes = codes_of(index, ROWS)
    assert np.array_equal(codes, encode(trained(recipe), keys()))
    assert same(assemble(trained(recipe), [(codes, np.arange(ROWS))]), index)


def test_full_keys_are_codes_as_they_are() -> None:
    """By hand: a Flat index's code is the key's bytes; behind lists, after the list's number."""
    assert np.array_equal(encode(trained("Flat"), keys()).view("<f4"), keys())
    index = trained("IVF300,Flat")
    codes = encode(index, keys())
    assert np.array_equal(np.ascontiguousarray(codes[:, 2:]).view("<f4"), keys())
    centroids = index.quantizer.reconstruct_n(0, 300)
    nearest = ((keys()[:, None].astype("f8") - centroids) ** 2).sum(axis=2).argmin(axis=1)
    assert np.array_equal(np.ascontiguousarray(codes[:, :2]).view("<u2").ravel(), nearest)


@pytest.mark.parametrize("recipe", WHOLE)
def test_what_keeps_more_than_codes_is_not_cut(recipe: str) -> None:
    assert not can_be_cut(faiss.index_factory(WIDTH, recipe))


def test_whether_it_can_be_cut_is_known_before_training() -> None:
    assert can_be_cut(faiss.index_factory(WIDTH, "PCAR32,IVF64,PQ16x4fsr"))
    assert can_be_cut(faiss.index_factory(WIDTH, "OPQ16,IVF64,PQ16"))


@pytest.mark.parametrize("recipe", ["IVF4,PQ16x4fs", "IVF4,RaBitQfs", "IVF4,SQ8"])
@pytest.mark.parametrize("group", [1, 50, 2**16])
def test_lists_of_any_size(recipe: str, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those around whole blocks of 32 above all, which FAISS's own ``merge_from`` runs over."""
    monkeypatch.setattr(module, "GROUP", group)
    rng = np.random.default_rng(0)
    home = encode(trained(recipe), keys())[:, 0]
    rows = [np.flatnonzero(home == number) for number in range(4)]
    sizes = [[s, t, 0, 33] for s in (0, 1, 31, 32, 33, 63, 64, 65) for t in (0, 32, 96)]
    for held in [*sizes, *rng.integers(0, 140, (10, 4)).tolist()]:
        chosen = rng.permutation(np.concatenate([r[:n] for r, n in zip(rows, held, strict=True)]))
        expected, made = trained(recipe), trained(recipe)
        expected.add(keys()[chosen])
        half = len(chosen) // 2
        both = (chosen[:half], np.arange(half)), (chosen[half:], np.arange(half, len(chosen)))
        assemble(made, [(encode(made, keys()[some]), ids) for some, ids in both])
        assert same(made, expected), held


@pytest.mark.parametrize("recipe", ["Flat", "IVF64,Flat", "IVF64,PQ16x4fs", "IVF64,RaBitQfs"])
def test_what_is_left_out_was_never_there(recipe: str) -> None:
    """Codes of some rows, numbered on, make the index of these keys alone."""
    left = np.r_[0:5, 40:41, 1032:1500, 1600:ROWS]
    expected, made = trained(recipe), trained(recipe)
    expected.add(keys()[left])
    codes = encode(made, keys())
    assert same(assemble(made, [(codes[left], np.arange(len(left)))]), expected)


@pytest.mark.parametrize("recipe", ["Flat", "IVF64,PQ16x4fs", "IVF64,SQ8"])
def test_nothing_makes_an_empty_index(recipe: str) -> None:
    assert same(assemble(trained(recipe), []), trained(recipe))


def test_codes_that_fit_no_index_are_refused() -> None:
    made = trained("IVF64,SQ8")
    codes = encode(made, keys())
    codes[5, 0] = 64
    with pytest.raises(ValueError, match="list 64 of 64"):
        assemble(made, [(codes, np.arange(ROWS))])
    flat = trained("Flat")
    with pytest.raises(ValueError, match="ids other than"):
        assemble(flat, [(encode(flat, keys()), np.arange(ROWS)[::-1])])


@pytest.mark.parametrize("ids", [[0, 1, 3], [0, 1, 1], [-1, 0, 1]])
def test_an_index_of_other_ids_gives_no_codes(ids: list[int]) -> None:
    index = trained("IVF64,SQ8")
    index.add_with_ids(keys()[:3], np.array(ids))
    with pytest.raises(ValueError, match="ids"):
        codes_of(index, 3)
    with pytest.raises(ValueError, match="in the place of"):
        codes_of(index, 4)
