"""Runs commands one after another, for a person who watches: what is typed, how far it is.

All that a command says goes to a log of its own; the screen shows the lines that matter.
"""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

WIDTH = 96
HEARTBEAT = 30  # seconds between signs of life where lines cannot be overwritten


class StepError(Exception):
    """A command failed; the message says which, and how it ended."""


@dataclass
class Steps:
    """A numbered sequence of commands.

    Attributes:
        total: how many there will be, for the numbers on screen.
        logs: folder of the logs, ``01-NAME.log`` and so on.
        env: their environment.
    """

    total: int
    logs: Path
    env: dict[str, str]
    done: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        """Seconds since the first step."""
        return time.monotonic() - self.started

    def run(
        self,
        title: str,
        command: Sequence[object],
        *,
        progress: str = "",
        of: int = 0,
        show: str = "",
    ) -> None:
        """Run one command to its end.

        Args:
            title: what it does, in words.
            command: program and arguments; found along the PATH of ``env``.
            progress: pattern whose group is the number in the log that says how far it is.
            of: the number it will reach.
            show: pattern of the log's lines that are worth showing afterwards.

        Raises:
            StepError: where the command fails.
        """
        self.done += 1
        words = [str(part) for part in command]
        print(f"\n[{self.done}/{self.total}] {title}\n{typed(words)}", flush=True)
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        log = self.logs / f"{self.done:02d}-{name}.log"
        start = time.monotonic()
        code = self._execute(words, log, progress, of)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        if code:
            end = "\n".join(lines[-25:])
            raise StepError(f"{end}\n\n{words[0]} ended with code {code}; its whole log is {log}")
        for line in lines:
            if show and re.search(show, line):
                print("    " + re.sub(r"^[A-Z]+:[\w.]+:", "", line).strip())
        seconds = time.monotonic() - start
        print(f"    {clock(seconds)}, {clock(self.elapsed)} in all", flush=True)

    def _execute(self, words: list[str], log: Path, progress: str, of: int) -> int:
        with log.open("wb") as sink:
            try:
                process = subprocess.Popen(
                    words,
                    env=self.env,
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                )
            except FileNotFoundError:
                raise StepError(f"{words[0]} is not installed here; `make setup` does it") from None
            try:
                _watch(process, log, progress, of)
            finally:  # also where the person watching has had enough
                process.terminate()
                process.wait()
        return process.returncode


def _watch(process: subprocess.Popen[bytes], log: Path, progress: str, of: int) -> None:
    """Wait for the end, and say meanwhile how far the log is."""
    live = sys.stdout.isatty()
    start = said = time.monotonic()
    while True:
        try:
            process.wait(0.5)
            break
        except subprocess.TimeoutExpired:
            now = time.monotonic()
        if live or now - said >= HEARTBEAT:
            said = now
            line = f"    {clock(now - start)}{how_far(tail(log), progress, of)}"
            print(f"\r{line:<40}" if live else line, end="" if live else "\n", flush=True)
    if live:
        print("\r" + " " * 40, end="\r")


def how_far(text: str, progress: str, of: int) -> str:
    """The last progress that ``text`` reports, as in ``"  120 of 1,000"``; may be empty."""
    found = re.findall(progress, text) if progress else []
    return f"  {int(found[-1]):,} of {of:,}" if found else ""


def tail(path: Path, size: int = 4096) -> str:
    """The last bytes of a file that is being written."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read().decode(errors="replace")


def clock(seconds: float) -> str:
    """Seconds as ``M:SS``."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def typed(words: Sequence[str]) -> str:
    """A command as one would type it, in lines that fit the screen, broken before options."""
    chunks: list[str] = []
    for word in map(shlex.quote, words):
        if word.startswith("--") or not chunks:
            chunks.append(word)
        else:
            chunks[-1] += " " + word
    lines = ["$"]
    for chunk in chunks:
        if len(lines[-1]) + len(chunk) > WIDTH:
            lines.append("   ")
        lines[-1] += " " + chunk
    return " \\\n".join(lines)


def usable_cores() -> int:
    """The cores this process may use: its affinity, and a container's share of the machine.

    torch and FAISS count the machine's, and are many times slower where they get fewer.
    """
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no control group, or a quota of "max"
        return cores
