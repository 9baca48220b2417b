"""Runs commands, and reads what ``fairseq-eval-lm`` reports of itself."""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import commands
from common.commands import RunError
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
SPEED = re.compile(r"Evaluated ([\d,]+) tokens in [\d.]+s \(([\d.]+) tokens/s\)")
LOSS = re.compile(r"Loss \(base 2\): ([\d.]+), Perplexity: ([\d.]+)")
PEAK = re.compile(r"peak memory ([\d.]+) GiB")


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


@dataclass(frozen=True)
class Shell:
    """Where commands run.

    Attributes:
        logs: folder of what they say.
        threads: that each may use.
    """

    logs: Path
    threads: int

    def prepare(self, name: str, command: Sequence[object]) -> None:
        """Runs a command that makes something, shown as one would type it.

        Raises:
            RunError: where it fails.
        """
        tqdm.write(f"\n{commands.typed(command)}")
        commands.run_live(*self._call(name, command))

    def seconds(self, name: str, command: Sequence[object]) -> float:
        """Runs a command, and looks at nothing until it has ended; how long it took.

        Raises:
            RunError: where it fails.
        """
        _, log, env = self._call(name, command)
        return commands.run(command, log, env).seconds

    def _call(
        self, name: str, command: Sequence[object]
    ) -> tuple[Sequence[object], Path, dict[str, str]]:
        """The command as it is run, its log and its environment."""
        env = commands.environment() | {"OMP_NUM_THREADS": str(self.threads)}
        # Without GPUs in sight fairseq and FAISS stay on the CPU, and in one process.
        env["CUDA_VISIBLE_DEVICES"] = ""
        if "GOMP_SPINCOUNT" not in os.environ:  # the demo's setting, for machines that are shared
            del env["GOMP_SPINCOUNT"]
        return [sys.executable, HERE / "peak.py", *command], self.logs / f"{name}.log", env

    def evaluate(self, name: str, command: Sequence[object]) -> Report:
        """Runs ``fairseq-eval-lm``, and looks at nothing until it has ended; reads its report.

        Raises:
            RunError: where it fails or reports nothing.
        """
        ran = commands.run(*self._call(name, command))
        speed, loss, peak = (found.search(ran.said) for found in (SPEED, LOSS, PEAK))
        if speed is None or loss is None or peak is None:
            raise RunError(f"{name} reported no speed or no loss; see {self.logs / name}.log")
        return Report(
            tokens=int(speed[1].replace(",", "")),
            rate=float(speed[2]),
            loss=loss[1],
            perplexity=float(loss[2]),
            wall=ran.seconds,
            peak=float(peak[1]),
        )
