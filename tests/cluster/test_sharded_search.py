"""Search in shards finds what the one index over all blocks finds, whoever dies meanwhile."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stores import alter, assert_helps, brute_force, random_entries, write_blocks
from torch import Tensor

from fairseq_knnlm.cluster import search as searching
from fairseq_knnlm.cluster.connect import ray_library
from fairseq_knnlm.cluster.opening import open_sharded
from fairseq_knnlm.cluster.replicas import Call
from fairseq_knnlm.cluster.retriever import ShardedRetriever
from fairseq_knnlm.cluster.search import ShardedIndex
from fairseq_knnlm.datastore import Datastore, open_datastore
from fairseq_knnlm.errors import KnnlmError
from fairseq_knnlm.index.build import BuildOptions
from fairseq_knnlm.index.storage import load
from fairseq_knnlm.retrieval.local import LocalRetriever
from fairseq_knnlm.retrieval.opening import retriever_over
from fairseq_knnlm.runs.build_index import build_index

pytestmark = pytest.mark.cluster

ROWS, WIDTH, K, PROBE = 3000, 8, 40, 6
CUTS = (1000, 1001, 2200)
FAST = "PCAR8,IVF16,PQ4x4fsr"
RECIPES = ("Flat", "SQ8", "PQ4x4", "IVF16,Flat", "IVF16,PQ4x4", "IVF16,PQ4x4fs", "IVF16,RaBitQfs")


def keys() -> np.ndarray:
    made = random_entries(ROWS, WIDTH)[0]
    made[2000:2004] = made[5]  # ties
    return made


def queries(count: int = 700) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.manual_seed(9))


def indexed(path: Path, recipe: str = FAST, metric: str = "l2", forgotten: Any = None) -> Datastore:
    store = write_blocks(path, keys(), np.arange(ROWS) % 50, CUTS, forgotten)
    options = BuildOptions(queries=0, k=K, metric=metric)
    build_index(store, store.index_path, options, recipe=recipe, device="cpu")
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    return indexed(tmp_path_factory.mktemp("sharded") / "store")


def whole(store: Datastore, k: int, asked: Tensor) -> tuple[Tensor, Tensor]:
    """What the one index over all blocks finds."""
    index = load(
        store.index_path,
        datastore=store.fingerprint,
        rows=len(store),
        width=WIDTH,
        blocks=store.blocks,
        nprobe=probe_of(store),
    )
    return index.search(asked, k)


def probe_of(store: Datastore) -> int | None:
    """So few lists that not every key is compared."""
    return PROBE if b"IVF" in store.index_path.read_bytes()[-4000:] else None


def opened(store: Datastore, address: str, **how: Any) -> ShardedIndex:
    return open_sharded(store, address, probe=probe_of(store), **how)


def assert_same(
    found: Sequence[Tensor], true: Sequence[Tensor], metric: str = "l2", margin: float = 0.0
) -> None:
    """The same distances, and the same ids but where several are as near as the k-th.

    FAISS itself takes any of these.
    """
    (distances, ids), (expected, theirs) = found, true
    assert torch.allclose(distances, expected.float(), rtol=0, atol=margin)
    last = expected[:, -1:]
    nearer = expected > last + margin if metric == "ip" else expected < last - margin
    for ours, others, counted in zip(ids, theirs, nearer, strict=True):
        assert set(others[counted].tolist()) <= set(ours.tolist())
        assert len(set(ours.tolist()) - {-1}) == int((ours >= 0).sum())


# The same neighbours


@pytest.mark.parametrize(("shards", "replicas"), [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (3, 2)])
def test_any_number_of_shards(store: Datastore, address: str, shards: int, replicas: int) -> None:
    index = opened(store, address, shards=shards, replicas=replicas)
    assert [len(shard.handles) for shard in index.shards] == [replicas] * shards
    asked = queries()
    for k in (1, K, ROWS):
        assert_same(index.search(asked, k), whole(store, k, asked))
    assert index.search(asked[:0], K)[0].shape == (0, K)


@pytest.mark.parametrize(("number", "recipe"), list(enumerate(RECIPES)))
def test_every_index_that_can_be_cut(
    tmp_path: Path, address: str, recipe: str, number: int
) -> None:
    metric = "ip" if number % 2 else "l2"
    store = indexed(tmp_path, recipe, metric)
    index, asked = opened(store, address, shards=2 + number % 2), queries()
    found = index.search(asked, K)
    assert_same(found, whole(store, K, asked), metric)
    if recipe == "Flat":
        true = brute_force(keys(), asked.numpy(), K, metric)
        assert_same(found, [torch.from_numpy(part) for part in true], metric, 1e-4)


def test_a_path_from_the_working_folder(
    store: Datastore, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is another one in the shards' processes."""
    monkeypatch.chdir(store.path.parent)
    found = opened(open_datastore(Path(store.path.name)), address, shards=2).search(queries(), K)
    assert_same(found, whole(store, K, queries()))


def test_what_was_forgotten_is_not_found(tmp_path: Path, address: str) -> None:
    gone = (((0, 3), (100, 164)), (), ((0, 1), (1198, 1199)), ((150, 300),))
    store = indexed(tmp_path, forgotten=gone)
    asked = queries()
    assert_same(opened(store, address, shards=4).search(asked, K), whole(store, K, asked))


def test_who_is_asked_for_too_few_is_asked_again(
    store: Datastore, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And for more from then on."""
    monkeypatch.setattr(searching, "MARGIN", 0.01)
    monkeypatch.setattr(searching, "AT_A_TIME", 50)
    index, asked = opened(store, address, shards=3), queries()
    assert_same(index.search(asked, K), whole(store, K, asked))
    first = index.asked_again
    assert first > 100
    assert_same(index.search(asked, K), whole(store, K, asked))
    assert index.asked_again - first < first / 2


@pytest.mark.parametrize("similarity", ["l2", "dot", "do_not_recomp_l2"])
@pytest.mark.parametrize("forgotten", [None, (((0, 3), (100, 164)), (), ((0, 1),), ((150, 300),))])
def test_shards_tell_values_and_exact_distances(
    tmp_path: Path, address: str, similarity: str, forgotten: Any
) -> None:
    """Those of a retriever on this machine, to the last digit; and of NumPy."""
    store, asked = indexed(tmp_path / "store", forgotten=forgotten), queries()
    index = opened(store, address, shards=3)
    retriever = retriever_over(index, store, similarity=similarity, kind=ShardedRetriever)
    found = retriever.search(asked, K)
    assert torch.equal(found.values, torch.from_numpy(store.values[found.ids].astype(np.int32)))
    if similarity == "do_not_recomp_l2":
        assert_same((found.distances, found.ids), whole(store, K, asked))
        return
    local = LocalRetriever(index, store, similarity)  # reads the keys itself
    assert torch.equal(found.distances, local.distances_to(asked, found.ids))
    near = np.asarray(store.keys)[found.ids].astype(np.float32)
    squares = ((near - asked.numpy()[:, None]) ** 2).sum(axis=2)
    products = -(near * asked.numpy()[:, None]).sum(axis=2)
    assert np.allclose(found.distances, squares if similarity == "l2" else products, atol=1e-4)


def test_queries_that_are_asked_ahead(store: Datastore, address: str) -> None:
    """Are answered in turn; whoever asks for others all the same gets those."""
    index = opened(store, address, shards=2)
    retriever = retriever_over(index, store, similarity="do_not_recomp_l2", kind=ShardedRetriever)
    assert retriever.elsewhere
    first, second, third = queries().split([300, 100, 300])
    for some in (first, second, first):
        retriever.ahead(some, K)
    for some in (first, second, third, first):
        found = retriever.search(some, K)
        assert_same((found.distances, found.ids), whole(store, K, some))
    retriever.ahead(first, K)
    fewer = retriever.search(first, K - 1)
    assert_same((fewer.distances, fewer.ids), whole(store, K - 1, first))


def test_keys_that_were_damaged_are_not_compared(tmp_path: Path, address: str) -> None:
    store = indexed(tmp_path / "store")
    index = opened(store, address, shards=2)
    retriever = retriever_over(index, store, similarity="l2", kind=ShardedRetriever)
    alter(store.blocks[3].path / "keys.npy")
    with pytest.raises(KnnlmError) as caught:
        retriever.search(queries(), K)
    assert_helps(caught, "is damaged", "checksums")


def test_a_process_loads_no_more_than_it_needs(store: Datastore, address: str) -> None:
    """Neither torch nor fairseq, of which there would be one a shard."""
    index = opened(store, address, shards=1)

    def loaded(_: Any) -> set[str]:
        import sys

        return {"torch", "fairseq", "faiss"} & set(sys.modules)

    (handle,) = index.shards[0].handles
    assert ray_library().get(handle.__ray_call__.remote(loaded)) == {"faiss"}


# Who dies


def pid_of(handle: Any) -> int:
    return int(ray_library().get(handle.about.remote())["pid"])


def kill(handle: Any) -> None:
    os.kill(pid_of(handle), signal.SIGKILL)


def test_another_copy_answers_for_one_that_was_killed(store: Datastore, address: str) -> None:
    """While it is asked: both copies get the same calls in turn, so one of any two is lost."""
    index = opened(store, address, shards=2, replicas=2)
    asked = queries(4000)
    calls = [index._ask(index._prepared(asked), [K, K]) for _ in range(4)]
    kill(index.shards[0].handles[0])
    true = whole(store, K, asked)
    for call in calls:
        assert_same(merged_of(call), true)
    assert_same(index.search(asked, K), true)


def merged_of(calls: Sequence[Call]) -> tuple[Tensor, Tensor]:
    from fairseq_knnlm.cluster.merging import merged

    found = merged([call.answer() for call in calls], K, largest=False)
    return torch.from_numpy(found.distances), torch.from_numpy(found.rows).long()


def test_a_lone_shard_is_started_again(
    store: Datastore, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    index, asked = opened(store, address, shards=2), queries()
    before = pid_of(index.shards[1].handles[0])
    os.kill(before, signal.SIGKILL)
    assert_same(index.search(asked, K), whole(store, K, asked))
    assert pid_of(index.shards[1].handles[0]) != before
    assert caplog.text.count("shard 2 of 2 has died; waiting until Ray") == 1


def test_what_does_not_come_back_is_told(store: Datastore, address: str) -> None:
    index = opened(store, address, shards=2)
    ray_library().kill(index.shards[1].handles[0])
    with pytest.raises(KnnlmError) as caught:
        index.search(queries(), K)
    assert_helps(caught, "shard 2 of 2 has died, and did not come back", "ray status")


def test_a_shard_whose_files_were_damaged_meanwhile_is_told(
    store: Datastore, address: str, tmp_path: Path
) -> None:
    """It loads them again where it is started again, and compares their checksums first."""
    copy = open_datastore(shutil.copytree(store.path, tmp_path / "store"))
    index = opened(copy, address, shards=2)
    alter(next(copy.blocks[3].path.glob("piece-*")))
    kill(index.shards[1].handles[0])
    with pytest.raises(KnnlmError) as caught:
        index.search(queries(), K)
    assert_helps(caught, "is damaged", "checksums")


def test_a_node_is_lost(store: Datastore, nodes: Any, address: str) -> None:
    """Its shards go elsewhere; those that have a copy answer at once."""
    third = nodes.add_node(num_cpus=2)
    wait_for(lambda: sum(node["Alive"] for node in ray_library().nodes()) == 3)
    index, asked = opened(store, address, shards=3, replicas=1), queries()
    true = whole(store, K, asked)
    nodes.remove_node(third, allow_graceful=False)
    assert_same(index.search(asked, K), true)
    homes = {handle_node(shard.handles[0]) for shard in index.shards}
    assert len(homes) == 2


def handle_node(handle: Any) -> str:
    def node(_: Any) -> str:
        return str(ray_library().get_runtime_context().get_node_id())

    return str(ray_library().get(handle.__ray_call__.remote(node)))


def test_copies_lie_on_different_nodes(store: Datastore, address: str) -> None:
    index = opened(store, address, shards=2, replicas=2)
    for shard in index.shards:
        assert len({handle_node(handle) for handle in shard.handles}) == 2


def test_shards_end_with_who_asked_for_them(store: Datastore, address: str) -> None:
    index = opened(store, address, shards=2)
    pids = [pid_of(shard.handles[0]) for shard in index.shards]
    del index
    wait_for(lambda: not any(is_alive(pid) for pid in pids))


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def wait_for(condition: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
