"""Work that is cut into numbered jobs, as tasks of Ray.

A job may be done twice, in part or as a whole: Ray does it again where its worker or machine died.
So jobs are such that what is there already is not made again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq_knnlm.cluster.agreement import check_needed, name_others
from fairseq_knnlm.cluster.connect import ray_library, runtime
from fairseq_knnlm.errors import KnnlmError, told
from fairseq_knnlm.versions import versions

#: Seconds between two looks at how far the work is.
TICK = 0.5


@dataclass(frozen=True)
class Place:
    """Where a job is to be done.

    Attributes:
        folder: the working folder, which all machines see.
        proof: a file that is there, by which a machine knows that it sees the same folder.
        versions: of libraries, which must be those of the process that asks.
    """

    folder: str
    proof: str
    versions: dict[str, str]


def do_all(
    work: Callable[[int], object],
    jobs: int,
    *,
    workers: int,
    gpus: float = 0.0,
    fresh: bool = False,
    proof: Path,
    tick: Callable[[int], object] = lambda done: None,
) -> None:
    """Does jobs on the machines of a Ray, so many at a time.

    Args:
        work: does a job, given its number; a function that other processes can import.
        jobs: how many, numbered from 0.
        workers: jobs at a time, each of which takes a CPU.
        gpus: that each takes.
        fresh: each in a process in which nothing was done before.
        proof: a file that every machine must see, in a folder that they share.
        tick: called twice a second with how many are done.

    Raises:
        KnnlmError: of the first job that failed; the others that run are stopped then.
    """
    ray = ray_library()
    task = ray.remote(
        num_cpus=1,
        num_gpus=gpus,
        max_calls=1 if fresh else 0,
        max_retries=-1,
        runtime_env=runtime(),
    )(_job)
    place = Place(str(Path.cwd()), str(proof.resolve()), versions())
    waiting, running, done = list(range(jobs)), list[Any](), 0
    while waiting or running:
        while waiting and len(running) < workers:
            running.append(task.remote(work, waiting.pop(0), place))
        ready, running = ray.wait(running, timeout=TICK)
        for one in ready:
            found, where = _fetched(one)
            if found is not None:
                for other in running:
                    ray.cancel(other, force=True)
                raise KnnlmError(found)
            name_others(versions(), where["versions"], where["node"])
            done += 1
        tick(done)


def _job(work: Callable[[int], object], number: int, place: Place) -> tuple[str | None, Any]:
    """What went wrong with a job, as a user is told, and where it was done."""
    ours, node = versions(), os.uname().nodename
    where = {"versions": ours, "node": node}
    try:
        check_needed(place.versions, ours, node)
        if not Path(place.proof).exists():
            raise KnnlmError(
                f"{Path(place.proof).parent} is not shared by the machines of that Ray",
                expected=f"the file {Path(place.proof).name}, which the process that asks has made",
                found=f"none on {node}",
                do="name a folder that all machines see under the same path",
            )
        os.chdir(place.folder)
        work(number)
        return None, where
    except SystemExit as ended:
        return (None if not ended.code else f"a job ended with code {ended.code}"), where
    except Exception as error:
        return told(error)[0].removeprefix("error: "), where


def _fetched(reference: Any) -> tuple[str | None, Any]:
    ray = ray_library()
    try:
        found: tuple[str | None, Any] = ray.get(reference)
        return found
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"Ray could not do a job: {(lines or [type(error).__name__])[0]}"[:600], None
