"""The FAISS index on the disk: one file with its card, read as it was written."""

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
    lengthen,
    random_entries,
    truncate,
)

from fairseq_knnlm.errors import ConfigError, IndexFileError
from fairseq_knnlm.files import seal, write_sealed
from fairseq_knnlm.index.card import IndexCard, card_path, read_card
from fairseq_knnlm.index.search import SearchIndex
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


@pytest.mark.parametrize("fails", ["storage.write_file", "storage.checksums", "trailer.seal"])
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


def test_no_index_there(tmp_path: Path) -> None:
    with pytest.raises(IndexFileError, match="no index at") as caught:
        loaded(tmp_path / "knn.index")
    assert_helps(caught, "build_index.py")


def test_an_index_of_another_datastore_is_refused(saved: Path) -> None:
    with pytest.raises(IndexFileError, match="another datastore") as caught:
        loaded(saved, datastore="e" * 64)
    assert_helps(caught, "eeeeeeeeeeee...", "dddddddddddd...")


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


def test_faiss_that_is_not_there_is_told() -> None:
    code = (
        "import sys; sys.modules['faiss'] = None\n"
        "from fairseq_knnlm.errors import KnnlmError\n"
        "try:\n    import fairseq_knnlm.index.build\n"
        "except KnnlmError as error:\n    print(error)\n"
    )
    assert "pip install faiss-cpu" in must(sys.executable, "-c", code)
