"""What a process spends: seconds by purpose, and memory."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Watch:
    """Adds up seconds, by what they were spent on."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started


class Memory:
    """The memory of this process; its own is looked at every tenth of a second.

    Its own is what no file holds. Pages of mapped files count as the process's too, but the system
    takes them back where it needs them.
    """

    def __init__(self) -> None:
        self._most = 0.0
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self._most = max(self._most, _gib("RssAnon"))
            time.sleep(0.1)

    def gib(self) -> dict[str, float]:
        """In GiB: at most with and without mapped files, and now without."""
        own = _gib("RssAnon")
        self._most = max(self._most, own)
        return {"peak_gib": _gib("VmHWM"), "peak_own_gib": self._most, "own_gib": own}


def _gib(name: str) -> float:
    """A field of Linux's ``/proc/self/status``, which has it in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = next(line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return int(kib) / 2**20
