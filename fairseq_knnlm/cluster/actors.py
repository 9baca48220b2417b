"""Starting shards: which machine each goes to, and waiting until all are loaded."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from fairseq_knnlm.cluster.agreement import name_others
from fairseq_knnlm.cluster.connect import ray_library, runtime
from fairseq_knnlm.cluster.replicas import PATIENCE, REPORT, Replicas, fetched
from fairseq_knnlm.cluster.shard import Part, Shard
from fairseq_knnlm.errors import KnnlmError
from fairseq_knnlm.versions import versions

logger = logging.getLogger(__name__)

#: Ray's names for what is kept up live in a space of their own.
NAMESPACE = "fairseq_knnlm"


def machines() -> list[str]:
    """Ray's ids of the machines on which something may run, in a lasting order."""
    nodes = [node for node in ray_library().nodes() if node["Alive"]]
    working = [node["NodeID"] for node in nodes if node["Resources"].get("CPU", 0) >= 1]
    return sorted(working)


def place_of(shard: int, replica: int, replicas: int, places: int) -> int:
    """Which machine a copy of a shard goes to.

    Shards go round, and the copies of one lie on as many machines as there are.
    """
    return (shard + replica * max(1, places // replicas)) % places


def start(
    parts: Sequence[Part],
    replicas: int,
    *,
    threads: int = 0,
    keep: str | None = None,
    patience: float = PATIENCE,
) -> list[Replicas]:
    """Starts actors and waits until they have loaded their blocks.

    Ray starts them again where they die, on another machine if theirs is gone.

    Args:
        parts: what each shard holds.
        replicas: copies of each.
        threads: of FAISS in each; 0 for an equal share of its machine's cores.
        keep: begins their names, under which they live on; None where they end with this process.
        patience: as for ``Replicas``.

    Raises:
        KnnlmError: where one could not load its blocks, or has other libraries.
    """
    ray, places = ray_library(), machines()
    if not places:
        raise KnnlmError(
            "there is no machine in Ray on which anything could run",
            expected="a node of one CPU or more",
            found="none",
            do="start one with `ray start --address=...`",
        )
    copies = [(part, replica) for part in parts for replica in range(replicas)]
    homes = [place_of(part.number, replica, replicas, len(places)) for part, replica in copies]
    actor, handles = ray.remote(Shard), []
    for (part, replica), home in zip(copies, homes, strict=True):
        name = None if keep is None else f"{keep}/{part.number}/{replica}"
        options = actor.options(**_options(places[home], name))
        handles.append(options.remote(part, versions(), homes.count(home), threads))
    _await(handles)
    return [
        Replicas(
            f"shard {part.number + 1} of {part.shards}",
            handles[part.number * replicas : (part.number + 1) * replicas],
            patience,
        )
        for part in parts
    ]


def _options(place: str, name: str | None) -> dict[str, Any]:
    """How Ray is to run a shard: on a machine, as long as that is there; with a name if kept up."""
    strategies = ray_library().util.scheduling_strategies
    options: dict[str, Any] = {
        "max_restarts": -1,
        "scheduling_strategy": strategies.NodeAffinitySchedulingStrategy(place, soft=True),
        "runtime_env": runtime(),
    }
    if name is not None:
        kept = {"name": name, "namespace": NAMESPACE, "lifetime": "detached"}
        options |= kept | {"get_if_exists": True}
    return options


def _await(handles: Sequence[Any]) -> None:
    """Returns when all have loaded their blocks."""
    ray = ray_library()
    waiting = [handle.about.remote() for handle in handles]
    said = time.monotonic()
    while waiting:
        ready, waiting = ray.wait(waiting, timeout=REPORT)
        for one in ready:
            try:
                found = fetched(one)
            except ray.exceptions.RayActorError as error:
                raise _not_started(error) from None
            name_others(versions(), found["versions"], found["node"])
        if waiting and time.monotonic() - said > REPORT:
            said = time.monotonic()
            logger.info(
                "%d of %d shards are loaded; `ray status` says what keeps others from starting",
                len(handles) - len(waiting),
                len(handles),
            )


def _not_started(error: Exception) -> KnnlmError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    missing = next((line for line in lines if "ModuleNotFoundError" in line), None)
    return KnnlmError(
        "a shard could not be started by Ray",
        expected="workers that have this package and FAISS",
        found=(missing or (lines[0] if lines else type(error).__name__))[:400],
        do='pip install "fairseq-knnlm[cpu,cluster]" on every machine of that Ray',
    )
