"""Kills Ray's workers and nodes, and the command that asks them, at moments that are drawn."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault_cases.stage import BadOutcome, Ran, Running, check_manners

from chaos_steps.commands import Command
from chaos_steps.playing import TEMPORARY, Place
from chaos_steps.seeing import Seen, differences, files, seen
from chaos_steps.world import IN_BLOCKS, INDEX, MIX, READ, World, knnlm

#: Who is killed, and how often that is drawn.
VICTIMS = {"worker": 3, "node": 1, "driver": 2}
#: The most kills of one run, and the seconds between two of them. Ray needs some seconds to start
#: a worker, which then gets about as long to work.
MOST, PAUSE = 3, (0.5, 8.0)
#: Several batches, so that there are shares of them.
SMALL = ("--max-tokens", 64)
#: Seconds in which a command ends, whoever dies; and those a killed one's workers get to end.
PATIENCE, AFTER = 180.0, 30.0


@dataclass(frozen=True)
class Work:
    """A command on Ray, and the same without it.

    Attributes:
        command: as it is struck.
        alone: what one process makes of the same.
    """

    command: Command
    alone: Command


@dataclass
class Tally:
    """What was done.

    Attributes:
        counts: by command, and what: runs, or whom a kill was of.
        findings: what did not hold.
    """

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


@contextmanager
def nodes() -> Iterator[Any]:
    """A Ray of two nodes on this machine, which this process takes no part in."""
    from fairseq_knnlm.cluster.connect import ray_library

    ray_library(loopback=True)
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}
    )
    cluster.add_node(num_cpus=2)
    try:
        yield cluster
    finally:
        cluster.shutdown()


def works(world: World, address: str) -> list[Work]:
    """What is done on Ray."""
    ray = ("--ray", address, "--workers", 2)
    text = (world.data, "--path", world.model, "--dstore", "store")
    report = ("--results-json", "joined.json")
    store = ("--knnlm", "--dstore-filename", "store", *MIX, *SMALL, *report)
    shards = ("--knn-ray", address, "--knn-shards", 2, "--knn-replicas", 2)
    indexed = "blocks, indexed"
    evaluate = Command("evaluate alone", indexed, world.evaluate("test", *store))
    read = ("--gen-subset", "test", *MIX, *READ, *SMALL, *report)
    save = ("--gen-subset", "valid", *IN_BLOCKS, *READ)
    build = ("build-index", "--dstore", "store", *INDEX)
    return [
        Work(
            Command("cluster save", "empty", knnlm("cluster", "save", *ray, *text, *save)),
            Command("save alone", "empty", world.save(*IN_BLOCKS)),
        ),
        Work(
            Command("cluster build-index", "blocks", knnlm("cluster", *build, *ray)),
            Command("build-index alone", "blocks", knnlm(*build)),
        ),
        Work(
            Command("cluster evaluate", indexed, knnlm("cluster", "evaluate", *ray, *text, *read)),
            evaluate,
        ),
        Work(
            Command("search in shards", indexed, world.evaluate("test", *store, *shards)), evaluate
        ),
    ]


def play(world: World, folder: Path, seconds: float, seed: int) -> Tally:
    """Kills until the time is over.

    Args:
        world: where things lie.
        folder: for what is made.
        seconds: as long as this; a run that has begun is ended.
        seed: of what is drawn.
    """
    tally, rng = Tally(), random.Random(seed)
    with nodes() as cluster:
        todo = works(world, cluster.address)
        rights = {work.command.name: _right(world, folder, work.alone) for work in todo}
        started, number = time.monotonic(), 0
        while time.monotonic() - started < seconds:
            work = todo[number % len(todo)]
            number += 1
            (victim,) = rng.choices(list(VICTIMS), list(VICTIMS.values()))
            place = Place(folder / f"ray-{number}", world)
            tally.counts[work.command.name, "runs"] += 1
            try:
                kills = _strike(
                    place, work.command, rights[work.command.name], victim, cluster, rng
                )
                tally.counts[work.command.name, victim] += kills
                place.remove()
            except BadOutcome as bad:
                tally.findings.append(f"{work.command.name}, {victim}: {bad}")
                print(f"\nBAD {tally.findings[-1]}", flush=True)
    return tally


def table(tally: Tally, seed: int, seconds: float) -> list[str]:
    """What was done and found, as Markdown."""
    heads = ["on Ray", "runs", *(f"kills of a {victim}" for victim in VICTIMS), "findings"]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for name in dict.fromkeys(name for name, _ in tally.counts):
        bad = sum(finding.startswith(f"{name},") for finding in tally.findings)
        cells = [tally.counts[name, what] for what in ("runs", *VICTIMS)]
        lines.append(f"| {' | '.join(map(str, [name, *cells, bad]))} |")
    kills = sum(number for (_, what), number in tally.counts.items() if what != "runs")
    return [*lines, "", f"Seed {seed}, {seconds:.0f} s: {kills} kills."]


def _right(world: World, folder: Path, alone: Command) -> list[Seen]:
    """What there is before and after the work of one process, on which nothing happens."""
    place = Place(folder / "alone", world)
    place.make(alone.start)
    found = [_told(place.folder)]
    ran = place.run(alone.words)
    if ran.code:
        raise RuntimeError(f"{alone.name}: {ran.last}")
    found.append(_told(place.folder))
    place.remove()
    return found


def _strike(
    place: Place, command: Command, right: list[Seen], victim: str, cluster: Any, rng: random.Random
) -> int:
    """Runs a command and kills while it runs; how often."""
    place.make(command.start)
    running = _start(place, command)
    kills = 0
    deadline = time.monotonic() + PATIENCE
    while kills < (MOST if victim == "worker" else 1):
        pause = time.monotonic() + rng.uniform(*PAUSE)
        while time.monotonic() < pause and not running.ended():
            time.sleep(0.02)
        if running.ended() or time.monotonic() > deadline:
            break
        kills += _kill(victim, running, cluster, rng)
    ran = running.wait(PATIENCE)
    if victim == "driver" and kills:
        _check_may(place, right)
        ran = _again(place, command)
    check_manners(ran)
    if ran.code:
        raise BadOutcome(f"ended with code {ran.code}: {ran.last}")
    there = _told(place.folder)
    if there != right[1]:
        raise BadOutcome(f"is not what one process makes: {differences(there, right[1])}")
    if left := [name for name in files(place.folder) if TEMPORARY.search(name)]:
        raise BadOutcome(f"left behind: {', '.join(left[:5])}")
    return kills


def _kill(victim: str, running: Running, cluster: Any, rng: random.Random) -> int:
    """Kills somebody; 1, or 0 where nobody is there."""
    if victim == "node":
        cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
        cluster.add_node(num_cpus=2)
        return 1
    pids = [running.pid] if victim == "driver" else _workers()
    if pids:
        os.kill(rng.choice(pids), signal.SIGKILL)
    return int(bool(pids))


def _workers() -> list[int]:
    """The processes of Ray's that do a job, or hold a shard."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if line.startswith((b"ray::_job", b"ray::Shard")):
            found.append(int(process.name))
    return found


def _start(place: Place, command: Command) -> Running:
    """Starts a command as a process of its own: Ray does not survive forks."""

    def before() -> None:
        os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])

    return place.stage().start(command.words, real=True, before=before)


def _again(place: Place, command: Command) -> Ran:
    """Runs a command that was killed once more, when the workers that it had have ended."""
    deadline = time.monotonic() + AFTER
    while _workers() and time.monotonic() < deadline:
        time.sleep(0.1)
    return _start(place, command).wait(PATIENCE)


def _check_may(place: Place, right: list[Seen]) -> None:
    """What a killed command leaves is the old or the new."""
    there = _told(place.folder)
    if there not in right:
        raise BadOutcome(f"neither the old nor the new: {differences(there, right[0])}")


def _told(folder: Path) -> Seen:
    """What a reader sees, but for how a figure was come by."""
    try:
        return seen(folder)
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadOutcome(f"does not open: {words[:300]}") from None
