"""The FAISS index: searches against brute force, files that belong together, devices, recipes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from conftest import must
from msgspec.structs import asdict, replace
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

from fairseq_knnlm.errors import ConfigError, IndexFileError
from fairseq_knnlm.files import seal, write_sealed
from fairseq_knnlm.index import device as module
from fairseq_knnlm.index import trial
from fairseq_knnlm.index.card import IndexCard, card_path, read_card
from fairseq_knnlm.index.device import gpu_obstacle, place
from fairseq_knnlm.index.search import SearchIndex
from fairseq_knnlm.index.specification import check_factory
from fairseq_knnlm.index.storage import load, save

ROWS, WIDTH, K = 1000, 8, 10
OURS = "d" * 64


def keys() -> np.ndarray:
    return random_entries(ROWS, WIDTH)[0]


def queries(rows: int = 30) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.manual_seed(9))


def made(recipe: str, **how: Any) -> tuple[Any, IndexCard]:
    return build_index(keys(), recipe, **{"queries": 20, "k": K, **how})


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index that ``saved`` is a copy of; nobody changes it."""
    path = tmp_path_factory.mktemp("built") / "knn.index"
    save(*made("IVF16,PQ4x4", nprobe=4), path, OURS)
    return path


@pytest.fixture
def saved(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(built, tmp_path / "knn.index"))


def loaded(path: Path, **how: Any) -> SearchIndex:
    return load(path, **{"datastore": OURS, "rows": ROWS, "width": WIDTH, **how})


@pytest.mark.parametrize("recipe", ["Flat", "IVF16,PQ4x4fs", "OPQ4,IVF16,PQ4x4"])
def test_save_and_load_keep_index_and_card(tmp_path: Path, recipe: str) -> None:
    path = tmp_path / "knn.index"
    index, card = made(recipe)
    assert save(index, card, path, OURS) == read_card(path)
    assert {file.name for file in tmp_path.iterdir()} == {"knn.index"}
    found = loaded(path)
    assert replace(found.card, datastore="", bytes=0, chunks=()) == card
    written = faiss.serialize_index(index).tobytes()
    assert (found.card.datastore, found.card.bytes) == (OURS, len(written))
    assert path.read_bytes().startswith(written)
    before, after = SearchIndex(index, card).search(queries(), K), found.search(queries(), K)
    assert torch.equal(before[1], after[1])
    torch.testing.assert_close(before[0], after[0])


def as_before(path: Path) -> None:
    """Makes an index what version 1 was: FAISS's bytes, and beside them the card."""
    card = read_card(path)
    assert card is not None
    path.write_bytes(path.read_bytes()[: card.bytes])
    fields = {**asdict(card), "seconds": 1.5}
    del fields["threads"]
    write_sealed(card_path(path), "fairseq-knnlm index", 1, fields)


@pytest.mark.parametrize("at", [0.0, 0.3, 0.7, 0.999])
def test_an_altered_byte_is_told(saved: Path, at: float) -> None:
    """In FAISS's bytes, in the card, in its end."""
    content = bytearray(saved.read_bytes())
    content[int(at * len(content))] ^= 1
    saved.write_bytes(bytes(content))
    with pytest.raises(IndexFileError, match=r"damaged|has no card") as caught:
        loaded(saved)
    assert_helps(caught, "knn.index", "build_index.py")
    with pytest.raises(IndexFileError):
        loaded(saved, foreign=True)


@pytest.mark.parametrize("spoil", [truncate, lengthen])
def test_another_length_is_told(saved: Path, spoil: Callable[[Path], None]) -> None:
    spoil(saved)
    with pytest.raises(IndexFileError, match="has no card"):
        loaded(saved)
    with pytest.raises(IndexFileError, match="damaged"):
        loaded(saved, foreign=True)


def test_an_index_of_the_first_version_opens(saved: Path) -> None:
    before = loaded(saved).search(queries(), K)
    as_before(saved)
    after = loaded(saved)
    assert after.card.nprobe == 4
    assert torch.equal(before[1], after.search(queries(), K)[1])
    save(*made("Flat"), saved, OURS)
    assert not card_path(saved).exists()
    assert loaded(saved).card.exact


@pytest.mark.parametrize("name", ["knn.index", "knn.index.json"])
@pytest.mark.parametrize("spoil", [truncate, alter, lengthen])
def test_damage_of_the_first_version_is_told(
    saved: Path, name: str, spoil: Callable[[Path], None]
) -> None:
    as_before(saved)
    spoil(saved.with_name(name))
    if (spoil, name) == (lengthen, "knn.index.json"):
        spoil = alter
        alter(saved.with_name(name))
    with pytest.raises(IndexFileError, match="damaged") as caught:
        loaded(saved)
    assert_helps(caught, name, "build_index.py")


@pytest.mark.parametrize("what", ["nothing", "folder", "dangling link"])
def test_an_index_without_its_card_is_refused(saved: Path, what: str) -> None:
    as_before(saved)
    card = card_path(saved)
    card.unlink()
    if what == "folder":
        card.mkdir()
    elif what == "dangling link":
        card.symlink_to("nowhere")
    with pytest.raises(IndexFileError, match="has no card") as caught:
        loaded(saved)
    assert_helps(caught, "--indexfile", "build_index.py")
    assert loaded(saved, foreign=True).card.nprobe == 32


@pytest.mark.parametrize(
    "field", ["metric", "rows", "width", "nprobe", "recall", "bytes", "chunks"]
)
@pytest.mark.parametrize("value", ["x", -1, None, [], 1e400])
def test_a_card_of_other_types_or_numbers_is_refused(
    saved: Path, field: str, value: object
) -> None:
    """Though its seal is right."""
    if (field, value) == ("recall", None):
        return
    card = read_card(saved)
    assert card is not None
    content = seal("fairseq-knnlm index", 2, {**asdict(card), field: value})
    text = json.dumps(content).encode()
    tail = text + len(text).to_bytes(8, "little") + b"kNNcard1"
    saved.write_bytes(saved.read_bytes()[: card.bytes] + tail)
    with pytest.raises(IndexFileError, match="damaged"):
        loaded(saved)


@pytest.mark.parametrize("fails", ["storage.write_file", "storage.checksums", "card.seal"])
def test_saving_that_fails_leaves_the_old_index_and_card(
    saved: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    before = saved.read_bytes()
    index, card = made("Flat")
    monkeypatch.setattr(f"fairseq_knnlm.index.{fails}", fail)
    with pytest.raises(OSError, match="disk full"):
        save(index, card, saved, OURS)
    assert saved.read_bytes() == before
    assert [file.name for file in saved.parent.iterdir()] == ["knn.index"]


@pytest.mark.slow
def test_a_full_disk_is_told_at_the_last_byte(tmp_path: Path) -> None:
    """By the limit of a process to the files it writes; FAISS alone passes over the last few."""
    index, _ = made("Flat")
    size = len(faiss.serialize_index(index))
    program = (
        "import pathlib, resource, sys\n"
        "import faiss\n"
        "from fairseq_knnlm.index.storage import write_file\n"
        "index = faiss.IndexFlatL2(8)\n"
        "index.add(__import__('numpy').zeros((1000, 8), 'f4'))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)\n"
        "try:\n"
        "    write_file(index, pathlib.Path(sys.argv[1]))\n"
        "except OSError as error:\n"
        "    print(error.strerror)\n"
    )
    said = must(sys.executable, "-c", program, tmp_path / "x", size - 1)
    assert "File too large" in said
    assert not must(sys.executable, "-c", program, tmp_path / "x", size).strip()


# Indexes that another program built


def foreign(path: Path, index: Any) -> Path:
    faiss.write_index(index, str(path))
    return path


def lists_with_ids(ids: np.ndarray) -> Any:
    index = faiss.index_factory(WIDTH, "IVF4,Flat")
    index.train(keys())
    index.add_with_ids(keys(), ids)
    return index


@pytest.mark.parametrize("wrong", [-1, ROWS, 2**40])
def test_ids_beyond_the_datastore_are_refused(tmp_path: Path, wrong: int) -> None:
    ids = np.arange(ROWS)
    ids[7] = wrong
    path = foreign(tmp_path / "x.index", lists_with_ids(ids))
    with pytest.raises(IndexFileError, match="does not hold the rows") as caught:
        loaded(path, foreign=True)
    assert_helps(caught, f"{wrong:,}")


def test_a_metric_that_is_neither_is_refused(tmp_path: Path) -> None:
    index = faiss.IndexFlat(WIDTH, faiss.METRIC_L1)
    index.add(keys())
    with pytest.raises(IndexFileError, match="compares keys in another way"):
        loaded(foreign(tmp_path / "x.index", index), foreign=True)


@pytest.mark.parametrize("content", [b"", b"no index at all", b"IxF2" + b"\xff" * 100])
def test_an_index_that_is_none_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "knn.index").write_bytes(content)
    with pytest.raises(IndexFileError, match="has no card"):
        loaded(tmp_path / "knn.index")
    with pytest.raises(IndexFileError, match="damaged"):
        loaded(tmp_path / "knn.index", foreign=True)


def test_a_foreign_file_that_crashes_faiss_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashing = tmp_path / "crash.py"
    crashing.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setattr(trial, "__file__", str(crashing))
    with pytest.raises(IndexFileError, match="SIGSEGV"):
        loaded(foreign(tmp_path / "x.index", lists_with_ids(np.arange(ROWS))), foreign=True)


@pytest.mark.parametrize(
    "factory", ["PCA0,IVF4,Flat", "HNSW0", "A" * 150, "PQ8x0", "IMI2x20", "", "\xfc", "A" * 10**6]
)
def test_recipes_that_crash_faiss_are_refused(factory: str) -> None:
    with pytest.raises(IndexFileError, match="FAISS cannot make the index") as caught:
        check_factory(factory, 16)
    assert_helps(caught, "--recipe auto")


@pytest.mark.parametrize("factory", ["HNSW8", "IVF4,PQ4x4,RFlat", "PQ4x12", "IMI2x4,Flat"])
def test_recipes_that_work_are_let_pass(factory: str) -> None:
    check_factory(factory, 16)


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
    path = foreign(saved, lists_with_ids(np.arange(ROWS)))
    loaded(path, foreign=True)
    with pytest.raises(IndexFileError, match="another datastore"):
        loaded(path, foreign=True, **shape)


def test_an_index_that_somebody_else_built(tmp_path: Path) -> None:
    quantizer = faiss.IndexFlatIP(WIDTH)
    index = faiss.IndexIVFFlat(quantizer, WIDTH, 64, faiss.METRIC_INNER_PRODUCT)
    index.train(keys())
    index.add(keys())
    faiss.write_index(index, str(tmp_path / "knn.index"))
    assert read_card(tmp_path / "knn.index", foreign=True) is None
    found = loaded(tmp_path / "knn.index", foreign=True)
    assert (found.card.metric, found.card.nprobe, found.card.exact) == ("ip", 32, False)
    assert found.index.nprobe == 32


@pytest.mark.parametrize("recipe", ["Flat", "IVF16,Flat", "IVF16,PQ4x4", "OPQ4,IVF16,PQ4x4"])
def test_a_mapped_index_finds_the_same(recipe: str, tmp_path: Path) -> None:
    path = tmp_path / "knn.index"
    save(*made(recipe), path, OURS)
    pair = [loaded(path, mapped=mapped).search(queries(), K) for mapped in (False, True)]
    assert torch.equal(pair[0][1], pair[1][1])
    assert torch.equal(pair[0][0], pair[1][0])


@pytest.mark.slow
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
        "from fairseq_knnlm.index.storage import load\n"
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


def test_a_copy_is_as_good(saved: Path, tmp_path: Path) -> None:
    """It does not know where it lies."""
    other = tmp_path / "elsewhere"
    other.mkdir()
    shutil.copy(saved, other / saved.name)
    assert loaded(other / "knn.index").card == loaded(saved).card


@pytest.mark.parametrize("module", ["card", "recipes", "specification"])
def test_what_an_index_is_can_be_read_without_faiss(module: str) -> None:
    """Nor torch: both take seconds to load."""
    code = f"import sys, fairseq_knnlm.index.{module}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(run.stdout.split()) & {"torch", "fairseq", "faiss"}
