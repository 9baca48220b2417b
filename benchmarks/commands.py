"""Runs commands, and reads what ``fairseq-eval-lm`` reports of itself."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from demo import environment
from demo_steps import typed
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
#: Seconds between signs of life.
HEARTBEAT = 5.0
SPEED = re.compile(r"Evaluated ([\d,]+) tokens in [\d.]+s \(([\d.]+) tokens/s\)")
LOSS = re.compile(r"Loss \(base 2\): ([\d.]+), Perplexity: ([\d.]+)")
PEAK = re.compile(r"peak memory ([\d.]+) GiB")


class BenchError(Exception):
    """A command failed, or results that should agree do not."""


@dataclass(frozen=True)
class Report:
    """The end of a run of ``fairseq-eval-lm``, as fairseq prints it.

    Attributes:
        tokens: scored.
        rate: tokens a second in the scorer.
        loss: bits a token, four decimals.
        perplexity: two decimals.
        wall: seconds from the command's start to its end.
        peak: most memory that its process held, GiB.
    """

    tokens: int
    rate: float
    loss: str
    perplexity: float
    wall: float
    peak: float


@contextmanager
def ticking(name: str) -> Iterator[None]:
    """Shows how long the block has been running; nobody knows how long it will."""
    ended = threading.Event()
    with tqdm(desc=f"    {name}", bar_format="{desc} {elapsed}") as bar:

        def tick() -> None:
            while not ended.wait(HEARTBEAT):
                bar.refresh()

        clock = threading.Thread(target=tick)
        clock.start()
        try:
            yield
        finally:
            ended.set()
            clock.join()


@dataclass(frozen=True)
class Shell:
    """Where commands run.

    Attributes:
        logs: folder of what they say.
        threads: that each may use.
    """

    logs: Path
    threads: int

    def run(self, name: str, command: Sequence[object]) -> tuple[str, float]:
        """Runs a command to its end.

        Args:
            name: of its log.
            command: program and arguments, found where this Python's programs are.

        Returns:
            What it said, its memory at the end of that, and its wall time in seconds.

        Raises:
            BenchError: where it fails.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        log, words = self.logs / f"{name}.log", [str(word) for word in command]
        # Without GPUs in sight fairseq and FAISS stay on the CPU, and in one process.
        env = environment() | {"OMP_NUM_THREADS": str(self.threads), "CUDA_VISIBLE_DEVICES": ""}
        if "GOMP_SPINCOUNT" not in os.environ:  # the demo's setting, for machines that are shared
            del env["GOMP_SPINCOUNT"]
        started = time.perf_counter()
        with log.open("wb") as sink:
            code = subprocess.run(
                [sys.executable, HERE / "peak.py", *words],
                env=env,
                stdout=sink,
                stderr=subprocess.STDOUT,
            ).returncode
        seconds = time.perf_counter() - started
        said = log.read_text(encoding="utf-8", errors="replace")
        if code:
            end = "\n".join(said.splitlines()[-15:])
            raise BenchError(f"{end}\n{words[0]} ended with code {code}; see {log}")
        return said, seconds

    def prepare(self, name: str, command: Sequence[object]) -> None:
        """Runs a command that makes something, shown as one would type it."""
        tqdm.write(f"\n{typed([str(word) for word in command])}", file=sys.stderr)
        with ticking(name):
            self.run(name, command)

    def evaluate(self, name: str, command: Sequence[object]) -> Report:
        """Runs ``fairseq-eval-lm`` and reads its report."""
        said, wall = self.run(name, command)
        speed, loss, peak = SPEED.search(said), LOSS.search(said), PEAK.search(said)
        if speed is None or loss is None or peak is None:
            raise BenchError(f"{name} reported no speed or no loss; see {self.logs / name}.log")
        return Report(
            tokens=int(speed[1].replace(",", "")),
            rate=float(speed[2]),
            loss=loss[1],
            perplexity=float(loss[2]),
            wall=wall,
            peak=float(peak[1]),
        )
