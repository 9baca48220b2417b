"""What is refused before anything long begins, and what a process with its own Ray looks like."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import alter, assert_helps, random_entries, write_blocks, write_store

from fairseq_knnlm.cluster import actors
from fairseq_knnlm.cluster.connect import check_address, connect
from fairseq_knnlm.cluster.opening import open_sharded
from fairseq_knnlm.cluster.shard import Part, Shard, parts_of
from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.errors import ConfigError, KnnlmError
from fairseq_knnlm.experts.neighbours import KIND, KnnOptions
from fairseq_knnlm.index.build import BuildOptions
from fairseq_knnlm.index.card import read_card
from fairseq_knnlm.index.library import faiss
from fairseq_knnlm.index.pieces import training_in
from fairseq_knnlm.runs.build_index import build_index
from fairseq_knnlm.versions import versions

pytestmark = pytest.mark.cluster

ROWS, WIDTH = 600, 8
#: In which an address at which there is no Ray must be refused.
SECONDS = 8.0


def indexed(path: Path, recipe: str = "IVF8,Flat", shift: float = 0) -> Datastore:
    keys = random_entries(ROWS, WIDTH)[0] + np.float32(shift)
    store = write_blocks(path, keys, np.arange(ROWS) % 50, (200, 400))
    build_index(store, store.index_path, BuildOptions(queries=0), recipe=recipe, device="cpu")
    return store


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    return indexed(tmp_path / "store")


def training(store: Datastore) -> str:
    card = read_card(store.index_path)
    assert card is not None
    return training_in(store.index_path, card.bytes)


# Flags


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (KnnOptions(knn_shards=2), ["--knn-shards needs --knn-ray"]),
        (KnnOptions(knn_replicas=2), ["--knn-replicas needs --knn-ray"]),
        (KnnOptions(knn_ray="local", indexfile="x"), ["--knn-ray and --indexfile"]),
        (KnnOptions(knn_ray="local", mmap_index=True), ["--knn-ray and --mmap-index"]),
        (KnnOptions(knn_ray="local", knn_device="cuda:0"), ["--knn-ray and --knn-device"]),
        (KnnOptions(knn_ray="ray://head:10001"), ["--knn-ray names no Ray", "ray://head:10001"]),
    ],
)
def test_flags_that_cannot_be_used(options: KnnOptions, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        KIND.check(options, True)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("address", ["", "here", ":6379", "head:", "head:0", "head:65536", "a/b:1"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ConfigError, match="--knn-ray names no Ray"):
        check_address("--knn-ray", address)


@pytest.mark.parametrize("address", ["local", "auto", "head:6379", "10.0.0.1:1", "[::1]:6379"])
def test_what_is_one(address: str) -> None:
    check_address("--knn-ray", address)


# Datastores


def test_a_datastore_of_one_block(tmp_path: Path) -> None:
    flat = write_store(tmp_path / "flat", *random_entries(ROWS, WIDTH))
    with pytest.raises(ConfigError) as caught:
        open_sharded(flat, "local")
    assert_helps(caught, "is one block, which shards cannot share", "--block-rows")


def test_an_index_that_cannot_be_cut(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        open_sharded(indexed(tmp_path, "HNSW8"), "local")
    assert_helps(caught, "cannot be cut into shards", "HNSW8")


def test_more_shards_than_blocks(store: Datastore) -> None:
    with pytest.raises(ConfigError) as caught:
        open_sharded(store, "local", shards=4)
    assert_helps(caught, "--knn-shards exceeds the blocks", "at most 3", "4")


def test_more_lists_than_there_are(store: Datastore) -> None:
    with pytest.raises(ConfigError, match="--probe does not fit the index"):
        open_sharded(store, "local", probe=9)


def test_a_damaged_piece(store: Datastore, address: str) -> None:
    alter(next(store.blocks[1].path.glob("piece-*")))
    with pytest.raises(KnnlmError) as caught:
        open_sharded(store, address, shards=2)
    assert_helps(caught, "piece-", "is damaged", "checksums")


# What a worker sees, told without one


@contextmanager
def shard_of(part: Part, libraries: dict[str, str] | None = None) -> Iterator[Shard]:
    threads = faiss.omp_get_max_threads()
    try:
        yield Shard(part, libraries or versions())
    finally:
        faiss.omp_set_num_threads(threads)


def test_a_folder_that_is_not_shared(store: Datastore) -> None:
    (part, _) = parts_of(store, training(store), 2)
    store.path.rename(store.path.with_name("moved"))
    with shard_of(part) as shard, pytest.raises(KnnlmError) as caught:
        shard.about()
    assert_helps(caught, "does not see the datastore", str(store.path), "all machines share")


def test_another_datastore_of_the_same_name(store: Datastore, tmp_path: Path) -> None:
    seal, trained = store.fingerprint, training(store)
    other = indexed(tmp_path / "other", shift=1)
    (part, _) = parts_of(store, trained, 2)
    store.path.rename(store.path.with_name("moved"))
    other.path.rename(store.path)
    with shard_of(part) as shard, pytest.raises(KnnlmError) as caught:
        shard.search((np.zeros((1, WIDTH), np.float32), None, None), 1)
    assert_helps(caught, "another datastore lies at", seal[:12], other.fingerprint[:12])


def test_an_index_that_was_built_anew(store: Datastore) -> None:
    (part, _) = parts_of(store, training(store), 2)
    indexed(store.path, "IVF4,Flat")
    with shard_of(part) as shard, pytest.raises(KnnlmError) as caught:
        shard.about()
    assert_helps(caught, "is another index", part.training[:12])


@pytest.mark.parametrize("name", ["faiss", "fairseq_knnlm"])
def test_other_libraries_are_refused(
    store: Datastore, address: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Before anything is loaded."""
    monkeypatch.setattr(actors, "versions", lambda: versions() | {name: "0.0.1"})
    with pytest.raises(KnnlmError) as caught:
        open_sharded(store, address, shards=2)
    assert_helps(caught, f"another {name}", f"{name} 0.0.1", "same versions on all machines")


def test_other_versions_that_hardly_matter_are_named(
    store: Datastore, address: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(actors, "versions", lambda: versions() | {"numpy": "0.0.1"})
    open_sharded(store, address, shards=1)
    assert f"has numpy {np.__version__}, and this process 0.0.1" in caplog.text


# Ray


def test_without_ray_the_message_says_what_to_install(
    store: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(KnnlmError) as caught:
        open_sharded(store, "local")
    assert_helps(caught, "Ray is not installed", 'pip install "fairseq-knnlm[cluster]"')


def nobody(_: socket.socket) -> None:
    pass


def hang_up(client: socket.socket) -> None:
    client.close()


def say_no(client: socket.socket) -> None:
    client.recv(10)
    client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    client.close()


@contextmanager
def server(behaves: Callable[[socket.socket], None]) -> Iterator[str]:
    """Something that listens, and is no Ray."""
    clients = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    clients.append(listening.accept()[0])
                except OSError:
                    return
                behaves(clients[-1])

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
    for client in clients:
        client.close()


PROGRAM = """
import sys
from fairseq_knnlm.cluster.connect import connect
from fairseq_knnlm.errors import told
try:
    connect(sys.argv[1])
except BaseException as error:
    print(told(error)[0])
"""


def said_of(address: str) -> str:
    """What a process says that has no Ray yet."""
    started = time.monotonic()
    command = [sys.executable, "-c", PROGRAM, address]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert time.monotonic() - started < SECONDS + 10  # and a few to load what is needed
    assert ran.stderr == ""
    return ran.stdout


@pytest.mark.parametrize("behaves", [nobody, hang_up, say_no])
def test_what_listens_and_is_no_ray(behaves: Callable[[socket.socket], None]) -> None:
    with server(behaves) as address:
        said = said_of(address)
    assert said.startswith(f"error: there is no Ray at {address}")
    assert "ray start" in said


def test_where_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    assert "found:    Connection refused" in said_of(f"127.0.0.1:{port}")


def test_a_host_that_there_is_not() -> None:
    assert "there is no Ray at no-such-host.invalid:6379" in said_of("no-such-host.invalid:6379")


def test_a_process_takes_part_in_one_ray(address: str) -> None:
    connect(address)
    connect("local")  # this one is on the loopback device
    host, _, port = address.rpartition(":")
    with pytest.raises(KnnlmError) as caught:
        connect(f"{host}:{int(port) - 1}")
    assert_helps(caught, "a process takes part in one Ray")


LISTENING = """
import os, signal, sys, time
from fairseq_knnlm.cluster.connect import connect
from fairseq_knnlm.signals import end_on_request
from fairseq_knnlm.errors import told
end_on_request()
ray = connect("local")

class Actor:
    def pid(self):
        print("not for the screen")
        sys.stderr.write("nor this")
        return os.getpid()

actor = ray.remote(Actor).options(max_restarts=-1).remote()
pid = ray.get(actor.pid.remote())
os.kill(pid, signal.SIGKILL)
while True:
    try:
        print(ray.get(actor.pid.remote()), flush=True)
        break
    except ray.exceptions.RayActorError:
        time.sleep(0.1)
try:
    time.sleep(600)
except BaseException as error:
    text, code = told(error)
    print(text)
    sys.exit(code)
"""


def test_a_local_ray_is_alone_keeps_quiet_and_ends_with_its_process() -> None:
    command = [sys.executable, "-c", LISTENING]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first.strip().isdecimal(), first
        family = descendants(process.pid)
        assert int(first) in family
        open_to_others = [name for pid in family for name in listening(pid)]
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (out.strip(), err) == ("terminated; nothing was published that was not finished", "")
    assert process.returncode == 143
    assert not open_to_others
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in family):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def descendants(pid: int) -> list[int]:
    """A process and all that it started."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def listening(pid: int) -> list[str]:
    """The addresses, in hexadecimal, at which a process listens to more than this machine."""
    mine = set()
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            mine.add(str(link.readlink()))
        except OSError:
            continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine:
                found.append(fields[1])
    # 127.0.0.1, ::1, and the former within IPv6, as the kernel writes them.
    local = ("0100007F:", "0" * 24 + "01000000:", "0000000000000000FFFF00000100007F:")
    return [address for address in found if not address.startswith(local)]
