"""Where an index is searched: what keeps it off a GPU, and what a GPU finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from msgspec.structs import replace
from stores import (
    assert_helps,
    build_index,
    clustered,
    random_entries,
    share,
)

from fairseq_knnlm.errors import ConfigError, IndexFileError
from fairseq_knnlm.index import device as module
from fairseq_knnlm.index.card import IndexCard
from fairseq_knnlm.index.device import gpu_obstacle, place
from fairseq_knnlm.index.search import SearchIndex
from fairseq_knnlm.index.storage import load, save

ROWS, WIDTH, K = 1000, 8, 10
OURS = "d" * 64


def keys() -> np.ndarray:
    return random_entries(ROWS, WIDTH)[0]


def made(recipe: str, **how: Any) -> tuple[Any, IndexCard]:
    return build_index(keys(), recipe, **{"queries": 20, "k": K, **how})


def loaded(path: Path, **how: Any) -> SearchIndex:
    return load(path, **{"datastore": OURS, "rows": ROWS, "width": WIDTH, **how})


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
    ("device", "faiss_gpus", "torch_gpu", "expected"),
    [
        ("cuda", 0, True, "cuda:0"),
        ("cuda:2,3", 0, True, "cuda:2"),
        ("auto", 0, True, "cuda:0"),
        ("cuda", 1, True, None),
        ("cuda", 0, False, None),
        ("cpu", 0, True, None),
    ],
)
def test_a_gpu_that_only_torch_can_use(
    device: str,
    faiss_gpus: int,
    torch_gpu: bool,
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_gpus", lambda: faiss_gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_gpu)
    assert module.gpu_of_torch_alone(device) == expected


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
    xb = clustered(width=WIDTH)
    index, card = build_index(xb, recipe, metric=metric, nprobe=8)
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
