"""The copies of a shard: asked in turn, and one answers for another that has died."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from fairseq_knnlm.cluster.connect import ray_library
from fairseq_knnlm.errors import KnnlmError

logger = logging.getLogger(__name__)

#: Seconds to wait for a shard of which no copy lives: Ray starts it again, and it loads its blocks.
PATIENCE = 1800.0
#: Seconds between two looks at it, and between two lines in the log that say the same.
AGAIN, REPORT = 0.25, 30.0
#: Seconds for which Ray says of all copies that they are gone for good, before it is believed.
GONE = 5.0


class Replicas:
    """The copies of a shard.

    Args:
        name: of the shard, in words.
        handles: Ray's, of actors of ``Shard``, one or more.
        patience: seconds to wait where none lives.
    """

    def __init__(self, name: str, handles: Sequence[Any], patience: float = PATIENCE) -> None:
        self.name = name
        self.handles = handles
        self.patience = patience
        self._turn = 0
        self._told: dict[str, float] = {}

    def ask(self, method: str, *words: Any) -> Call:
        """Has one of them do something; returns at once.

        Args:
            method: of ``Shard``, by its name.
            words: what it takes, or Ray's references to that.
        """
        return Call(self, method, words)

    def next(self) -> Any:
        """The one whose turn it is."""
        self._turn += 1
        return self.handles[self._turn % len(self.handles)]

    def tell(self, words: str) -> None:
        """Says it in the log, once in a while."""
        now = time.monotonic()
        if now - self._told.get(words, -REPORT) >= REPORT:
            self._told[words] = now
            logger.warning("%s has died; %s", self.name, words)


class Call:
    """Something that a shard was asked for."""

    def __init__(self, replicas: Replicas, method: str, words: Sequence[Any]) -> None:
        self._replicas = replicas
        self._method, self._words = method, words
        self._answer = self._asked()

    def _asked(self) -> Any:
        """Asks the copy whose turn it is."""
        return getattr(self._replicas.next(), self._method).remote(*self._words)

    def answer(self) -> Any:
        """What the shard returned, whichever copy of it.

        Raises:
            KnnlmError: as the shard does, or where no copy came to life again.
        """
        exceptions, replicas = ray_library().exceptions, self._replicas
        begun = coming = time.monotonic()
        failed = 0
        while True:
            try:
                return fetched(self._answer)
            except exceptions.RayActorError as error:
                died = error
            failed += 1
            now = time.monotonic()
            if isinstance(died, exceptions.ActorUnavailableError):
                coming = now  # Ray is about to start it again
            if failed < len(replicas.handles):
                replicas.tell("a copy of it answers")
            elif now - begun > replicas.patience or now - coming > GONE:
                raise _gone(replicas, died)
            else:  # all were asked
                replicas.tell("waiting until Ray has started it again")
                time.sleep(AGAIN)
            self._answer = self._asked()


def fetched(reference: Any, timeout: float | None = None) -> Any:
    """What a task made.

    Raises:
        KnnlmError: what it raised itself, as it was.
        RayError: Ray's own, where there is no such worker any more.
    """
    ray = ray_library()
    try:
        return ray.get(reference, timeout=timeout)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, KnnlmError):
            raise error.cause from None
        raise KnnlmError(
            "a worker of Ray failed at what it was asked to do",
            found=(str(error.cause) or type(error.cause).__name__)[:1000],
            do="report it, with the log of that worker (ray logs)",
        ) from None


def _gone(replicas: Replicas, error: Exception) -> KnnlmError:
    lines = str(error).strip().splitlines()
    return KnnlmError(
        f"{replicas.name} has died, and did not come back",
        expected=f"Ray to start it again, within {replicas.patience:,.0f} s",
        found=lines[0] if lines else type(error).__name__,
        do="run the command again; `ray status` says which machines are gone or full",
    )
