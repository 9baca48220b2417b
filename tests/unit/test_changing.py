"""``fairseq-knnlm forget`` and ``compact``: what goes, what stays, and what is said of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_calls import (
    ROWS,
    WIDTH,
    Capture,
    indexed_store,
    legacy_store,
    refuse,
    say,
    small_store,
    whole_store,
)
from conftest import ROOT
from msgspec.structs import replace
from stores import origin, random_entries, write_compressed, write_store

from fairseq_knnlm.datastore import (
    Datastore,
    DatastoreWriter,
    Documents,
    open_datastore,
    outline,
    read_documents,
    write_documents,
)
from fairseq_knnlm.index.card import read_card
from fairseq_knnlm.retrieval.opening import open_retriever

#: The symbols of the ids from 4 on; 2 ends a line.
WORDS = ["Robert", "Boulter", "is", "an", "actor", "You", "Amazing", "a", "band"]
LINES = ["Robert Boulter", "is an actor", "", "You", "is a band", "", "You", "is an actor"]


def ids(lines: list[str]) -> list[int]:
    numbers = {word: number for number, word in enumerate(WORDS, start=4)}
    return [one for line in lines for one in [*map(numbers.__getitem__, line.split()), 2]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "dict.txt"
    path.write_text("".join(f"{word} 1\n" for word in WORDS))
    return path


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    """Rows 0:8 are of Robert Boulter, 8:15 and 15:21 of something named You."""
    values = np.array(ids(LINES))
    keys = random_entries(len(values), 4)[0]
    made = write_store(tmp_path / "store", keys, values, vocabulary=4 + len(WORDS))
    write_documents(made, Documents(np.array([0, 8, 15]), len(made), 2))
    return made


def tree(path: Path) -> dict[str, bytes]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.fixture(autouse=True)
def _any_dictionary(monkeypatch: pytest.MonkeyPatch) -> None:
    """The datastores here are of a made-up one."""
    monkeypatch.setattr(Datastore, "check_origin", lambda *_, **__: None)


def test_a_document_goes_by_its_name(store: Datastore, data: Path, capsys: Capture) -> None:
    said = say(capsys, "forget", store.path, "--document", " Robert Boulter", "--data", data)
    assert "rows 0:8, 8 entries: 'Robert Boulter'" in said
    assert "forgot 8 of 21 entries; 13 stay" in said
    assert f"fairseq-knnlm compact {store.path}" in said
    left = open_datastore(store.path)
    assert np.array_equal(left.values, store.values[8:])
    documents = read_documents(left)
    assert documents is not None
    assert documents.starts.tolist() == [0, 7]
    said = refuse(capsys, "forget", store.path, "--document", "Robert Boulter", "--data", data)
    assert "no document of" in said


def test_rows_and_documents_together(store: Datastore, data: Path, capsys: Capture) -> None:
    words = ["--rows", "15:17", "--rows", "16:21", "--document", "Robert Boulter", "--data", data]
    assert "forgot 14 of 21 entries; 7 stay" in say(capsys, "forget", store.path, *words)
    assert np.array_equal(open_datastore(store.path).values, store.values[8:15])


def test_a_dry_run_changes_nothing(store: Datastore, data: Path, capsys: Capture) -> None:
    before = tree(store.path)
    words = ["--document", "Robert Boulter", "--data", data, "--rows", "9:10", "--dry-run"]
    said = say(capsys, "forget", store.path, *words)
    assert "would forget 9 of 21 entries; 12 stay" in said
    assert "compact" not in said
    assert tree(store.path) == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "nothing says what is to be forgotten"),
        (["--rows", "3"], "--rows names no rows"),
        (["--rows", "5:5"], "found:    5:5"),
        (["--rows", "-1:5"], "--rows"),
        (["--rows", "1e3:2e3"], "--rows names no rows"),
        (["--rows", "3:22"], "expected: rows from 0 to 21"),
        (["--rows", "0:21"], "nothing would be left"),
        (["--document", "You"], "--data DATA"),
        (["--rows", "1:2", "--data", "DICT"], "--data does nothing without --document"),
        (["--document", "You", "--data", "nowhere"], "no dictionary at nowhere"),
        (["--document", "You", "--data", "DICT"], "found:    rows 8:15, 15:21"),
        (["--document", "Boulter", "--data", "DICT"], "the nearest are 'Robert Boulter'"),
        (["--document", "Robert Bolter", "--data", "DICT"], "the nearest are 'Robert Boulter'"),
        (["--document", "zzzzzzzz", "--data", "DICT"], "2 others, none like it"),
        (["--rows", "1:2", "--document", "You", "--data", "DICT"], "2 documents of"),
    ],
)
def test_what_cannot_be_forgotten(
    store: Datastore, data: Path, words: list[str], says: str, capsys: Capture
) -> None:
    before = tree(store.path)
    words = [word.replace("DICT", str(data)) for word in words]
    try:
        said = refuse(capsys, "forget", store.path, *words)
    except SystemExit:  # of argparse, which takes -1:5 for a flag
        said = capsys.readouterr().err
    assert says in said
    assert tree(store.path) == before


def test_documents_nobody_knows(store: Datastore, data: Path, capsys: Capture) -> None:
    store.documents_path.unlink()
    said = refuse(capsys, "forget", store.path, "--document", "You", "--data", data)
    assert "verify --dstore" in said
    assert "--documents" in said


@pytest.mark.parametrize("command", ["forget", "compact"])
def test_what_cannot_be_changed(tmp_path: Path, command: str, capsys: Capture) -> None:
    rows = ["--rows", "0:1"] if command == "forget" else []
    said = refuse(capsys, command, legacy_store(tmp_path), *rows)
    assert "fairseq-knnlm import" in said
    assert "no datastore at" in refuse(capsys, command, tmp_path / "none", *rows)
    assert not (tmp_path / "none").exists()
    path = write_compressed(tmp_path / "small").path
    if rows:
        assert "was compressed" in refuse(capsys, command, path, *rows)
    else:
        assert "nothing to do" in say(capsys, command, path)


def test_what_was_forgotten_leaves_no_trace(tmp_path: Path, capsys: Capture) -> None:
    """In no file: keys in either type, which this index holds as they are, nor what followed."""
    store = whole_store(tmp_path, capsys)
    keys, values = random_entries(ROWS, WIDTH)
    gone = [*range(100, 150), *range(399, 400)]
    said = say(capsys, "forget", store.path, "--rows", "100:150", "--rows", "399:400")
    assert "build it again" not in said
    said = say(capsys, "compact", store.path)
    assert "wrote 1 block anew" in said
    assert f"{store.ngram_path}: removed" in said
    assert "nothing to do" in say(capsys, "compact", store.path)
    patterns = [keys[row].astype(kind).tobytes() for row in gone for kind in ("f2", "f4")]
    stored = keys.astype(np.float16).astype(np.float32)  # what the index was built of
    patterns += [stored[row].tobytes() for row in gone]
    patterns += [values[row : row + 4].astype(np.uint16).tobytes() for row in gone[:-4]]
    content = tree(store.path)
    assert "calibration.json" in content
    for name, found in content.items():
        assert not any(pattern in found for pattern in patterns), name
    card = read_card(store.index_path)
    assert card is not None
    assert card.in_pieces
    assert sum(stored[row].tobytes() in one for one in content.values() for row in (0, 398)) == 2


def test_an_index_that_cannot_be_cut(tmp_path: Path, capsys: Capture) -> None:
    store = small_store(tmp_path)
    say(capsys, "build-index", "--dstore", store.path, "--recipe", "HNSW8")
    said = say(capsys, "forget", store.path, "--rows", "3:9")
    assert f"build it again with `fairseq-knnlm build-index --dstore {store.path}`" in said
    assert store.index_path.exists()
    assert f"{store.index_path}: removed" in say(capsys, "compact", store.path)
    assert not store.index_path.exists()
    assert "nothing to do" in say(capsys, "compact", store.path)


def test_how_far_a_trace_reaches(tmp_path: Path, capsys: Capture) -> None:
    """A key of a block of 64 tokens after a window of 32 has seen 95 others at most."""
    store = small_store(tmp_path / "unknown")
    assert "in view" not in say(capsys, "forget", store.path, "--rows", "0:1")
    context = {"tokens_per_sample": 64, "context_window": 32}
    writer = DatastoreWriter(tmp_path / "store", 9, 4, replace(origin(), context=context))
    writer.write(np.arange(9), *random_entries(9, 4))
    said = say(capsys, "forget", writer.publish(), "--rows", "0:1")
    assert "keys of up to 95 tokens behind them were computed with them in view" in said


READER = """
import sys
from pathlib import Path
import numpy as np
from fairseq_knnlm.datastore import open_datastore, read_documents
path, first = Path(sys.argv[1]), np.load(sys.argv[2])
print("ready", flush=True)
seen = set()
while True:
    store = open_datastore(path, verify=True)
    keys, values = np.array(store.keys), np.array(store.values)
    rows = len(store)
    # Each round forgets the first row: what is left are the last ones.
    assert np.array_equal(keys, first[-rows:]), rows
    assert np.array_equal(values, np.arange(len(first))[-rows:] % 50), rows
    if rows not in seen:
        seen.add(rows)
        print(rows, flush=True)
    if rows <= int(sys.argv[3]):
        break
print("done", len(seen), flush=True)
"""


def test_who_reads_meanwhile_sees_the_old_or_the_new(tmp_path: Path, capsys: Capture) -> None:
    """A process that opens and reads without a pause, while another forgets and compacts."""
    rows, rounds = 60, 12
    keys = random_entries(rows, 4)[0].astype(np.float16)
    store = write_store(tmp_path / "store", keys, np.arange(rows) % 50, dtype="float16")
    np.save(tmp_path / "keys.npy", keys)
    words = [store.path, tmp_path / "keys.npy", rows - rounds]
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
        for number in range(rounds):
            say(capsys, "forget", store.path, "--rows", "0:1")
            if number % 2:
                say(capsys, "compact", store.path)
        out, error = reader.communicate(timeout=60)
    finally:
        reader.kill()
        reader.wait()
    assert reader.returncode == 0, error
    assert len(out.splitlines()) > 3, out  # it did read on the way


@pytest.mark.parametrize("command", ["forget", "compact"])
@pytest.mark.parametrize("delay", [0.0, 0.03, 0.1])
def test_killed_at_any_time(tmp_path: Path, command: str, delay: float, capsys: Capture) -> None:
    """What is there then is what was there, or what was to be; the next call ends the work."""
    store = indexed_store(tmp_path, capsys)
    write_documents(store, Documents(np.array([0, 150]), ROWS, 2))
    rows = ["--rows", "0:100"] if command == "forget" else []
    if command == "compact":
        say(capsys, "forget", store.path, "--rows", "0:100")
    program = "import sys; from fairseq_knnlm.cli import main; import fairseq_knnlm.runs.changing;"
    program += "print('go', flush=True); sys.exit(main())"
    child = subprocess.Popen(
        [sys.executable, "-c", program, command, store.path, *rows],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "go\n"
    try:
        child.wait(delay)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
    child.communicate()
    left = open_datastore(store.path, verify=True)
    assert len(left) in (ROWS, ROWS - 100)
    assert np.array_equal(left.values, store.values[-len(left) :])
    if len(left) == ROWS:
        say(capsys, "forget", store.path, "--rows", "0:100")
    say(capsys, "compact", store.path)
    assert "nothing to do" in say(capsys, "compact", store.path)
    listed = {block.path.name for block in outline(store.path).blocks}
    assert {path.name for path in (store.path / "blocks").iterdir()} == listed
    assert {path.name for path in store.path.iterdir()} == {"manifest.json", "knn.index", "blocks"}
    left = open_datastore(store.path, verify=True)
    documents = read_documents(left)
    assert documents is not None
    assert documents.starts.tolist() == [0, 50]
    retriever = open_retriever(left, ROWS - 100, probe=8)
    assert retriever.index.card.in_pieces
    near = retriever.search(torch.zeros(1, WIDTH), ROWS - 100)
    assert sorted(near.ids[0].tolist()) == list(range(ROWS - 100))
