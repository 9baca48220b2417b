"""Shards that are kept up for several runs: named in Ray, found again by what they hold."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fairseq_knnlm.cluster.actors import NAMESPACE, start
from fairseq_knnlm.cluster.agreement import check_needed, name_others
from fairseq_knnlm.cluster.connect import ray_library
from fairseq_knnlm.cluster.replicas import AGAIN, Replicas, fetched
from fairseq_knnlm.cluster.shard import Part, name_of
from fairseq_knnlm.errors import ConfigError, KnnlmError
from fairseq_knnlm.versions import versions

logger = logging.getLogger(__name__)

#: Seconds in which a shard says what it is, unless it is busy, or being started.
SAYS = 10.0


@dataclass(frozen=True)
class Kept:
    """A shard that is kept up.

    Attributes:
        holding: what all shards of its index have in common: fingerprints of the datastore and of
            the index's training.
        shards: in how many the index is cut.
        number: of this one, from 0.
        replica: which copy, from 0.
    """

    holding: str
    shards: int
    number: int
    replica: int

    @property
    def name(self) -> str:
        """In Ray."""
        return f"{self.holding}/{self.shards}/{self.number}/{self.replica}"

    @property
    def datastore(self) -> str:
        """Fingerprint of the datastore."""
        return self.holding.partition("/")[0]

    @property
    def handle(self) -> Any:
        """Ray's, of the actor."""
        return ray_library().get_actor(self.name, namespace=NAMESPACE)


def all_kept() -> list[Kept]:
    """The shards that are kept up in the Ray in which this process takes part, in order."""
    found = []
    for actor in ray_library().util.list_named_actors(all_namespaces=True):
        parts = actor["name"].split("/")
        if actor["namespace"] == NAMESPACE and len(parts) == 5:
            found.append(Kept("/".join(parts[:2]), *map(int, parts[2:])))
    return sorted(found, key=lambda one: (one.holding, one.shards, one.number, one.replica))


def keep_up(parts: Sequence[Part], replicas: int) -> list[Replicas]:
    """Starts shards that outlive this process; those that are up stay.

    Args:
        parts: what each shard holds.
        replicas: copies of each.

    Raises:
        ConfigError: where the same index is up, cut otherwise.
        KnnlmError: as ``start`` does; what was started is ended then.
    """
    holding = name_of(parts[0])
    before = {one for one in all_kept() if one.holding == holding}
    for one in before:
        if one.shards != len(parts):
            raise ConfigError(
                "this index is up already, cut otherwise",
                expected=f"--knn-shards {one.shards}",
                found=f"--knn-shards {len(parts)}",
                do="end those first, with `fairseq-knnlm cluster down`",
            )
    try:
        return start(parts, replicas, keep=f"{holding}/{len(parts)}")
    except BaseException:
        end([one for one in all_kept() if one.holding == holding and one not in before])
        raise


def end(shards: Sequence[Kept]) -> None:
    """Ends shards for good."""
    for one in shards:
        try:
            ray_library().kill(one.handle)
        except ValueError:  # somebody else did
            logger.info("%s was gone already", one.name)


def standing(parts: Sequence[Part]) -> tuple[list[Replicas], list[int]] | None:
    """The shards that are up and hold the same index together, and the entries of each.

    Args:
        parts: what shards hold, cut in whatever way.

    Raises:
        KnnlmError: where they have other libraries than this process.
    """
    holding = name_of(parts[0])
    ours = [one for one in all_kept() if one.holding == holding]
    if not ours:
        return None
    count = ours[0].shards
    copies = [[one for one in ours if one.number == number] for number in range(count)]
    if not all(copies):
        missing = sum(not one for one in copies)
        logger.warning("%d of the %d shards that were up are gone: not used", missing, count)
        return None
    held = []
    for copy in copies:
        said = next((said for said in (asked(one, SAYS) for one in copy) if said is not None), None)
        if said is None:
            logger.warning("a shard that is up does not answer yet: not used")
            return None
        check_needed(versions(), said["versions"], said["node"])
        name_others(versions(), said["versions"], said["node"])
        held.append(said["rows"])
    named = [f"shard {number + 1} of {count}" for number in range(count)]
    handles = [[one.handle for one in copy] for copy in copies]
    return [Replicas(*pair) for pair in zip(named, handles, strict=True)], held


def asked(shard: Kept, wait: float = 0.0) -> Mapping[str, Any] | None:
    """What a shard says of itself; None where it is busy.

    Args:
        shard: one that is kept up.
        wait: seconds to give it where it is being started, as after its machine was lost.

    Raises:
        KnnlmError: what kept it from being loaded.
    """
    exceptions = ray_library().exceptions
    deadline = time.monotonic() + wait
    while True:
        try:
            said: Mapping[str, Any] = fetched(shard.handle.about.remote(), SAYS)
            return said
        except (exceptions.GetTimeoutError, ValueError):
            return None
        except exceptions.RayActorError:
            if time.monotonic() >= deadline:
                return None
            time.sleep(AGAIN)


def described() -> Iterator[tuple[Kept, str]]:
    """Each shard that is kept up, and what it says of itself in words."""
    for one in all_kept():
        try:
            said = asked(one)
        except KnnlmError as problem:
            yield one, str(problem).splitlines()[0]
            continue
        if said is None:
            yield one, "busy, or being started"
        else:
            yield (
                one,
                f"{said['rows']:,} entries of {said['store']}, {said['bytes'] / 2**20:,.0f} MiB, "
                f"{said['threads']} threads, on {said['node']}, process {said['pid']}",
            )
