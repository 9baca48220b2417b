"""The index of a datastore in blocks: trained once, a piece for each block, put together to search.

The oracles are FAISS, with keys added to the same training, and the index of one block.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from stores import (
    alter,
    assert_helps,
    lengthen,
    random_entries,
    truncate,
    write_blocks,
    write_store,
)

from fairseq_knnlm.datastore import Block, Datastore, open_datastore
from fairseq_knnlm.errors import BusyError, IndexFileError, KnnlmError
from fairseq_knnlm.index import build as build_module
from fairseq_knnlm.index import in_blocks
from fairseq_knnlm.index.build import BuildOptions
from fairseq_knnlm.index.card import IndexCard, read_card
from fairseq_knnlm.index.codes import codes_of
from fairseq_knnlm.index.pieces import open_piece, piece_path, training_in, training_of, write_piece
from fairseq_knnlm.index.search import SearchIndex
from fairseq_knnlm.index.storage import load, read_trained
from fairseq_knnlm.index.trailer import text_behind, trailing
from fairseq_knnlm.retrieval.opening import open_retriever
from fairseq_knnlm.runs import build_index as runs
from fairseq_knnlm.runs.build_index import build_index, extend_index

ROWS, WIDTH, K = 1200, 8, 10
CUTS = (400, 401, 900)
OPTIONS = BuildOptions(queries=20, k=K)
FAST = "PCAR8,IVF16,PQ4x4fsr"
RECIPES = ("Flat", "SQ8", "IVF16,Flat", "IVF16,PQ4x4", "IVF16,PQ4x4fs", FAST, "IVF16,RaBitQfs")
FORGOTTEN = (((0, 3), (100, 164)), (), ((0, 1), (498, 499)), ((150, 300),))


def keys() -> np.ndarray:
    made = random_entries(ROWS, WIDTH)[0]
    made[1000:1004] = made[5]  # ties
    return made


def blocks_store(
    path: Path, rows: int = ROWS, cuts: Sequence[int] = CUTS, forgotten: Any = None
) -> Datastore:
    return write_blocks(path, keys()[:rows], np.arange(rows) % 50, cuts, forgotten)


def built(store: Datastore, recipe: str = FAST, options: BuildOptions = OPTIONS) -> IndexCard:
    return build_index(store, store.index_path, options, recipe=recipe, device="cpu")


def opened(store: Datastore, **how: Any) -> SearchIndex:
    return load(
        store.index_path,
        datastore=store.fingerprint,
        rows=len(store),
        width=WIDTH,
        blocks=store.blocks,
        **how,
    )


def answers(searcher: SearchIndex, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return searcher.search(torch.randn(30, WIDTH, generator=torch.manual_seed(9)), k)


def assert_same(one: SearchIndex, other: SearchIndex) -> None:
    for k in (1, K, ROWS):
        for found, true in zip(answers(one, k), answers(other, k), strict=True):
            assert torch.equal(found, true)


def tree(path: Path) -> dict[str, bytes]:
    """All files, by their path."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def pieces(store: Datastore) -> list[str]:
    return sorted(str(f.relative_to(store.path)) for f in store.path.rglob("piece-*"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A datastore with its index, that ``store`` is a copy of; nobody changes it."""
    made = blocks_store(tmp_path_factory.mktemp("made") / "store")
    built(made)
    return made.path


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Datastore:
    return open_datastore(shutil.copytree(made, tmp_path / "store"))


# What is found


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_pieces_answer_as_one_index(tmp_path: Path, recipe: str, metric: str) -> None:
    """As that of the same keys in one block: the same neighbours, distances, nprobe and recall."""
    options = BuildOptions(queries=20, k=K, metric=metric)
    store = blocks_store(tmp_path / "store")
    one = write_store(tmp_path / "one", keys(), np.arange(ROWS) % 50)
    card, whole = built(store, recipe, options), built(one, recipe, options)
    assert card.in_pieces
    assert not whole.in_pieces
    for name in ("nprobe", "recall_at", "rows", "exact", "factory"):
        assert getattr(card, name) == getattr(whole, name), name
    for name in ("recall", "coverage"):  # of true neighbours that are as near, others may count
        ours, theirs = getattr(card, name), getattr(whole, name)
        assert ours == (theirs and pytest.approx(theirs, abs=0.02))
    assert_same(opened(store), opened(one))
    assert len(pieces(store)) == 4
    assert read_trained(store.index_path).ntotal == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_was_forgotten_is_not_found(tmp_path: Path, recipe: str) -> None:
    """The index is that of the remaining keys alone, numbered through."""
    built(blocks_store(tmp_path))
    store = blocks_store(tmp_path, forgotten=FORGOTTEN)
    built(store, recipe)
    left = np.array(store.keys)
    assert len(left) == ROWS - 3 - 64 - 2 - 150
    expected = read_trained(store.index_path)
    assert training_of(expected) == training_in(store.index_path, must_card(store.index_path).bytes)
    expected.add(left)
    assert_same(opened(store), SearchIndex(expected, opened(store).card))


def must_card(path: Path) -> IndexCard:
    card = read_card(path)
    assert card is not None
    return card


def test_forgetting_leaves_the_index_as_it_is(tmp_path: Path) -> None:
    """Nothing is built again, and what is forgotten is found no more."""
    whole = blocks_store(tmp_path)
    built(whole)
    before = tree(tmp_path)
    store = blocks_store(tmp_path, forgotten=FORGOTTEN)
    assert {name for name, content in tree(tmp_path).items() if before[name] != content} == {
        "manifest.json"
    }
    expected = read_trained(store.index_path)
    expected.add(np.array(store.keys))
    searcher = opened(store)
    assert_same(searcher, SearchIndex(expected, searcher.card))
    assert searcher.card.rows == len(store)


def test_an_index_goes_on_to_blocks_that_were_added(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = blocks_store(tmp_path, 900, CUTS[:2])
    built(store)
    trained = store.index_path.read_bytes()
    more = blocks_store(tmp_path)
    with pytest.raises(IndexFileError) as caught:
        opened(more)
    assert_helps(caught, f"the block {more.blocks[3].path} has no piece", "build")
    caplog.set_level("INFO")
    assert extend_index(more) == 1
    assert "3 of 4 blocks have their piece" in caplog.text
    assert store.index_path.read_bytes() == trained
    expected = read_trained(store.index_path)
    expected.add(keys())
    assert_same(opened(more), SearchIndex(expected, opened(more).card))
    assert extend_index(more) == 0


def test_a_retriever_opens_them(store: Datastore) -> None:
    found = open_retriever(store, K, device="cpu").search(torch.from_numpy(keys()[:5]), K)
    assert (found.distances[:, 0] == 0).all()
    assert found.ids[1, 0] == 1


def test_an_index_of_before_gives_its_piece(tmp_path: Path) -> None:
    """A whole index, emptied, is its training, and its codes are the piece of the one block."""
    one = write_store(tmp_path / "one", keys(), np.arange(ROWS) % 50)
    built(one)
    store = blocks_store(tmp_path / "store", cuts=())
    built(store)
    whole = faiss.read_index(str(one.index_path))
    training = training_of(read_trained(store.index_path))
    width = whole.sa_code_size()
    assert np.array_equal(
        codes_of(whole, ROWS), open_piece(store.blocks[0], training, width, everything=True)
    )
    whole.reset()
    faiss.extract_index_ivf(whole).nprobe = 1
    assert training_of(whole) == training


# How it is built


class Stopped(Exception):
    pass


def stop_before(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, times: int
) -> Callable[[], None]:
    """Has a function of a module raise when it is called for the n-th time; returns the mending."""
    real, calls = getattr(module, name), []

    def counting(*args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == times:
            raise Stopped
        return real(*args, **named)

    monkeypatch.setattr(module, name, counting)
    return lambda: monkeypatch.setattr(module, name, real)


STOPS: tuple[tuple[Any, str, int], ...] = (
    (in_blocks, "train_on", 1),
    (in_blocks, "write_pieces", 1),
    (in_blocks, "write_piece", 1),
    (in_blocks, "write_piece", 3),
    (in_blocks, "encode", 1),
    (in_blocks, "encode", 7),
    (in_blocks, "assemble", 1),
    (runs, "save", 1),
    (runs, "remove_pieces", 1),
)


@pytest.mark.parametrize(("module", "name", "times"), STOPS, ids=[f"{s[1]}-{s[2]}" for s in STOPS])
def test_a_build_that_was_stopped_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, times: int
) -> None:
    """Every byte is that of a build in one go, and none is left beside."""
    monkeypatch.setattr(build_module, "CHUNK_BYTES", 100 * WIDTH * 4)
    whole = blocks_store(tmp_path / "whole")
    built(whole)
    store = blocks_store(tmp_path / "store")
    mend = stop_before(monkeypatch, module, name, times)
    with pytest.raises(Stopped):
        built(store)
    mend()
    if name != "train_on":
        monkeypatch.setattr(faiss.IndexPreTransform, "train", None)  # is not called again
    built(store)
    assert tree(store.path) == tree(whole.path)


def test_a_build_that_was_killed_goes_on(tmp_path: Path) -> None:
    whole, store = blocks_store(tmp_path / "whole"), blocks_store(tmp_path / "store")
    built(whole)
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from fairseq_knnlm.datastore import open_datastore\n"
        "from fairseq_knnlm.index import pieces\n"
        "from fairseq_knnlm.index.build import BuildOptions\n"
        "from fairseq_knnlm.runs.build_index import build_index\n"
        "def kill(path):\n"
        "    if '000002' in str(path):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(path)\n"
        "real, pieces.checksums = pieces.checksums, kill\n"
        "store = open_datastore(Path(sys.argv[1]))\n"
        f"options = BuildOptions(queries=20, k={K})\n"
        f"build_index(store, store.index_path, options, recipe='{FAST}', device='cpu')\n"
    )
    command = [sys.executable, "-c", program, str(store.path)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -9
    assert len(pieces(store)) == 2
    assert list(store.blocks[2].path.glob(".piece-*partial-*"))
    built(store)
    assert tree(store.path) == tree(whole.path)


def test_what_is_there_is_not_made_again(
    store: Datastore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    before = tree(store.path)
    monkeypatch.setattr(in_blocks, "encode", None)
    built(store)
    assert "4 of 4 blocks have their piece" in caplog.text
    assert tree(store.path) == before


def test_a_damaged_piece_is_made_again(store: Datastore, caplog: pytest.LogCaptureFixture) -> None:
    before = tree(store.path)
    alter(store.path / pieces(store)[1])
    built(store)
    assert "made again" in caplog.text
    assert tree(store.path) == before


def test_pieces_of_another_training_go(store: Datastore) -> None:
    before = pieces(store)
    built(store, "IVF8,Flat")
    after = pieces(store)
    assert len(before) == len(after) == 4
    assert not set(before) & set(after)
    assert_same(opened(store), opened(store, everything=True))


def test_nothing_need_be_measured(tmp_path: Path) -> None:
    """Then the index is not put together, and the pieces are the same."""
    store, other = blocks_store(tmp_path / "store"), blocks_store(tmp_path / "other")
    card = built(store, options=BuildOptions(queries=0, k=K))
    assert (card.recall, card.nprobe) == (None, 16)
    built(other)
    assert [content for name, content in tree(store.path).items() if "piece-" in name] == [
        content for name, content in tree(other.path).items() if "piece-" in name
    ]


@pytest.mark.parametrize("recipe", ["HNSW8", "PQ4x4fs"])
def test_what_cannot_be_cut_is_one_file(store: Datastore, recipe: str) -> None:
    card = built(store, recipe)
    assert not card.in_pieces
    assert pieces(store) == []
    assert opened(store).index.ntotal == ROWS


def test_elsewhere_it_is_one_file(store: Datastore, tmp_path: Path) -> None:
    before = tree(store.path)
    path = tmp_path / "knn.index"
    card = build_index(store, path, OPTIONS, recipe="IVF16,PQ4x4fs", device="cpu")
    assert not card.in_pieces
    assert tree(store.path) == before
    retriever = open_retriever(store, K, index=path, device="cpu")
    assert retriever.search(torch.from_numpy(keys()[:5]), K).ids.shape == (5, K)


# What the files are


def test_numpy_reads_a_piece(tmp_path: Path) -> None:
    """A Flat index's are the keys themselves."""
    store = blocks_store(tmp_path)
    built(store, "Flat")
    codes = np.load(tmp_path / pieces(store)[0], allow_pickle=False)
    assert codes.dtype == np.uint8
    assert np.array_equal(codes.view("<f4"), keys()[:400])


def test_the_cards_say_what_they_are(tmp_path: Path) -> None:
    store = blocks_store(tmp_path)
    card = built(store)
    behind = text_behind(store.index_path)
    assert behind is not None
    fields = json.loads(behind[0])
    assert (fields["version"], fields["piece_bytes"], fields["rows"]) == (3, 3, ROWS)
    assert fields["datastore"] == store.fingerprint
    assert must_card(store.index_path) == card
    build_index(store, tmp_path / "other", OPTIONS, recipe="Flat", device="cpu")
    behind = text_behind(tmp_path / "other")
    assert behind is not None
    whole = json.loads(behind[0])
    assert whole["version"] == 2
    assert "piece_bytes" not in whole
    behind = text_behind(tmp_path / pieces(store)[2])
    assert behind is not None
    piece = json.loads(behind[0])
    assert piece["format"] == "fairseq-knnlm piece of an index"
    assert piece["block"] == store.blocks[2].fingerprint
    assert (piece["rows"], piece["training"][:16]) == (499, pieces(store)[2][-20:-4])


# What is refused


def remove(file: Path) -> None:
    file.unlink()


def shorten_much(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:7])


def to_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def nothing_behind(file: Path) -> None:
    """As ``numpy.save`` would write it, without a card."""
    np.save(file, np.load(file))


@pytest.mark.parametrize(
    "spoil", [remove, alter, truncate, lengthen, shorten_much, to_folder, nothing_behind]
)
@pytest.mark.parametrize("number", [0, 3])
def test_a_spoilt_piece_is_named(
    store: Datastore, spoil: Callable[[Path], None], number: int
) -> None:
    file = store.path / pieces(store)[number]
    spoil(file)
    with pytest.raises(IndexFileError) as caught:
        opened(store)
    assert_helps(caught, str(file.parent), "build")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"block": "e" * 64}, "another block"),
        ({"training": "e" * 64}, "another training"),
        ({"rows": 5}, "5 rows"),
        ({"more": 5}, "more"),
        ({"chunks": []}, "0 checksums"),
        ({"bytes": 5}, "one of 5 bytes"),
    ],
)
def test_a_piece_whose_card_says_otherwise(
    store: Datastore, change: dict[str, Any], says: str
) -> None:
    """Though its seal be right."""
    file = store.path / pieces(store)[0]
    behind = text_behind(file)
    assert behind is not None
    fields = json.loads(behind[0])
    content = {k: v for k, v in fields.items() if k not in ("format", "version", "fingerprint")}
    sealed = trailing(fields["format"], 1, {**content, **change})
    file.write_bytes(file.read_bytes()[: behind[1]] + sealed)
    with pytest.raises(IndexFileError) as caught:
        opened(store)
    assert_helps(caught, str(file), says)


def test_pieces_that_change_places(tmp_path: Path) -> None:
    store = blocks_store(tmp_path, cuts=(400, 800))
    built(store)
    first, second, _ = (tmp_path / piece for piece in pieces(store))
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    with pytest.raises(IndexFileError, match="a piece of another block"):
        opened(store)


def sealed_piece(block: Block, training: str, codes: np.ndarray) -> None:
    piece_path(block, training).unlink()
    write_piece(block, training, codes.shape[1], [codes])


def test_codes_that_no_list_takes(store: Datastore) -> None:
    """Sealed by whoever: FAISS is not asked to put them into a list that it has not."""
    training = training_of(read_trained(store.index_path))
    codes = np.full((400, 3), 255, np.uint8)
    sealed_piece(store.blocks[0], training, codes)
    with pytest.raises(IndexFileError) as caught:
        opened(store)
    assert_helps(caught, "list 255 of 16")
    sealed_piece(store.blocks[0], training, codes[:, :2])
    with pytest.raises(IndexFileError) as caught:
        opened(store)
    assert_helps(caught, "(400, 3)")


def test_pieces_are_not_mapped(store: Datastore) -> None:
    with pytest.raises(KnnlmError) as caught:
        open_retriever(store, K, device="cpu", mapped=True)
    assert_helps(caught, "--mmap-index", "--indexfile")


def test_pieces_are_of_blocks(store: Datastore, tmp_path: Path) -> None:
    one = write_store(tmp_path / "one", keys(), np.arange(ROWS) % 50)
    shutil.copy(store.index_path, one.index_path)
    with pytest.raises(IndexFileError) as caught:
        opened(one)
    assert_helps(caught, "in pieces", "without blocks")


def test_the_index_of_another_datastore_in_blocks(tmp_path: Path) -> None:
    store, other = blocks_store(tmp_path / "store"), blocks_store(tmp_path / "other", cuts=(7,))
    built(store)
    built(other, "IVF8,Flat")
    other.index_path.replace(store.index_path)
    with pytest.raises(IndexFileError) as caught:
        opened(store)
    assert_helps(caught, "has no piece of the index")


@pytest.mark.parametrize("spoil", [alter, truncate, lengthen, remove])
def test_a_spoilt_trained_part(store: Datastore, spoil: Callable[[Path], None]) -> None:
    spoil(store.index_path)
    with pytest.raises(IndexFileError) as caught:
        opened(store)
    assert_helps(caught, str(store.index_path), "build")


def test_a_piece_that_cannot_be_written_leaves_nothing(
    store: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(store.path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fairseq_knnlm.index.pieces._write_array", full)
    with pytest.raises(OSError, match="No space"):
        built(store, "IVF8,Flat")
    left = {name for name in tree(store.path) if not name.startswith(".knn.index.building/")}
    assert left == set(before)
    assert_same(opened(store), opened(store))


def test_full_keys_are_searched_on_a_gpu_of_torch(
    store: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where FAISS knows no GPU, an exact index in pieces too is checked, and the keys searched."""
    built(store, "Flat")
    expected = open_retriever(store, K, device="cpu")
    monkeypatch.setattr("fairseq_knnlm.retrieval.opening.gpu_of_torch_alone", lambda device: "cpu")
    found = open_retriever(store, K, device="auto")
    assert type(found) is type(expected)
    asked = torch.randn(9, WIDTH, generator=torch.manual_seed(2))
    assert torch.equal(found.search(asked, K).ids, expected.search(asked, K).ids)
    alter(store.path / pieces(store)[0])
    with pytest.raises(IndexFileError, match="damaged"):
        open_retriever(store, K, device="auto")


def test_a_piece_that_another_process_writes(store: Datastore) -> None:
    """Is left to it, and said."""
    piece = store.path / pieces(store)[0]
    piece.unlink()
    held = (
        "import sys\nfrom pathlib import Path\nfrom fairseq_knnlm.files import Claim\n"
        "with Claim(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", held, str(piece)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match="another process is writing"):
            extend_index(store)
        other.communicate("")
    assert extend_index(store) == 1
    opened(store)
