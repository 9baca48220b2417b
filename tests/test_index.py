"""The FAISS index: searches against brute force, files that belong together, devices, recipes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from conftest import must
from stores import (
    alter,
    assert_helps,
    build_index,
    clustered,
    lengthen,
    random_entries,
    share,
    truncate,
)

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

ROWS, WIDTH, K = 1000, 8, 10
OURS = "d" * 64


def keys() -> np.ndarray:
    return random_entries(ROWS, WIDTH)[0]


def queries(rows: int = 30) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.manual_seed(9))


def made(recipe: str, **how: Any) -> tuple[Any, IndexCard]:
    return build_index(keys(), recipe, **{"queries": 20, "k": K, **how})


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


@pytest.mark.parametrize("recipe", ["Flat", "IVF16,Flat", "IVF16,PQ4x4", "OPQ4,IVF16,PQ4x4"])
def test_a_mapped_index_finds_the_same(recipe: str, tmp_path: Path) -> None:
    path = tmp_path / "knn.index"
    save(*made(recipe), path, OURS)
    pair = [loaded(path, mapped=mapped).search(queries(), K) for mapped in (False, True)]
    assert torch.equal(pair[0][1], pair[1][1])
    assert torch.equal(pair[0][0], pair[1][0])


def test_a_mapped_index_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    """Measured in a process of its own: 64 MiB of codes, and what is not backed by a file."""
    rows = 2**16
    index = faiss.index_factory(1024, "IVF1,SQ8")
    index.train(np.zeros((100, 1024), "f4"))
    index.add(np.zeros((rows, 1024), "f4"))
    path = tmp_path / "knn.index"
    save(index, IndexCard("IVF1,SQ8", "l2", rows, 1024, 1, False), path, OURS)
    program = (
        "import sys, pathlib\n"
        "from fairseq_knnlm.index import load\n"
        "def memory():\n"
        "    status = pathlib.Path('/proc/self/status').read_text()\n"
        "    return int(status.split('RssAnon:')[1].split()[0])\n"
        "before = memory()\n"
        "index = load(pathlib.Path(sys.argv[1]), datastore='d' * 64, rows=2**16, width=1024,\n"
        "             mapped=sys.argv[2] == 'mapped')\n"
        "print(memory() - before)\n"
    )
    grown = {how: int(must(sys.executable, "-c", program, path, how)) for how in ("read", "mapped")}
    assert grown["read"] > 60_000  # KiB
    assert grown["mapped"] < 10_000


def test_packed_codes_cannot_be_mapped(tmp_path: Path) -> None:
    save(*made("IVF16,PQ4x4fs"), tmp_path / "knn.index", OURS)
    with pytest.raises(IndexFileError, match="cannot be mapped") as caught:
        loaded(tmp_path / "knn.index", mapped=True)
    assert_helps(caught, "--mmap-index", "IndexIVFPQFastScan")


@pytest.mark.parametrize(
    ("exact", "recall", "coverage", "faithful"),
    [
        (True, None, None, True),
        (False, 0.9, 1.0, True),
        (False, 0.73, 0.8, True),
        (False, 0.71, 0.8, False),
        (False, None, None, False),
    ],
)
def test_distances_are_trusted_where_codes_lose_little(
    exact: bool, recall: float | None, coverage: float | None, faithful: bool
) -> None:
    card = IndexCard("", "l2", 1, 1, 0, exact, recall=recall, coverage=coverage)
    assert card.faithful is faithful


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


def test_a_copy_of_index_and_card_is_as_good(saved: Path, tmp_path: Path) -> None:
    """Neither knows where it lies."""
    other = tmp_path / "elsewhere"
    other.mkdir()
    for file in (saved, card_path(saved)):
        shutil.copy(file, other / file.name)
    assert loaded(other / "knn.index").card == loaded(saved).card
