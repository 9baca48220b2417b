"""Runs commands: what is typed, how far it is, what it said.

All that a command says goes to a log of its own; the screen shows the lines that matter. The demo
and the experiments run ``Steps``, numbered and timed, for a person who watches; benchmarks run
single commands.
"""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

WIDTH = 96
POLL = 0.5  # seconds between looks at a command that is watched
HEARTBEAT = 30  # seconds between signs of life where lines cannot be overwritten
SHOWN = 25  # last lines of a log that are shown where its command fails


class RunError(Exception):
    """A run cannot go on: a command failed, a folder is in the way, results do not agree."""


@dataclass(frozen=True)
class Ran:
    """A command that has ended well.

    Attributes:
        said: all that it printed, standard output and error together.
        seconds: from its start to its end.
    """

    said: str
    seconds: float


def run(
    command: Sequence[object],
    log: Path,
    env: Mapping[str, str],
    watch: Callable[[float], object] | None = None,
) -> Ran:
    """Runs a command to its end.

    Args:
        command: program and arguments; found along the PATH of ``env``.
        log: the file that all it says goes to; its folder is made.
        env: its environment.
        watch: told every half second how many seconds it has been running. Without, nobody looks
            until it has ended, as a command that is timed wants it.

    Raises:
        RunError: where it fails; with the end of the log.
    """
    words = [str(word) for word in command]
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with log.open("wb") as sink:
        try:
            process = subprocess.Popen(
                words, env=env, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT
            )
        except FileNotFoundError:
            raise RunError(f"{words[0]} is not installed here; `make setup` does it") from None
        try:
            while watch is not None and not _ended(process):
                watch(time.perf_counter() - started)
            process.wait()
        finally:  # also where the person watching has had enough
            process.terminate()
            process.wait()
    seconds = time.perf_counter() - started
    said = log.read_text(encoding="utf-8", errors="replace")
    if process.returncode:
        end = "\n".join(said.splitlines()[-SHOWN:])
        code = process.returncode
        raise RunError(f"{end}\n\n{words[0]} ended with code {code}; its whole log is {log}")
    return Ran(said, seconds)


def run_live(
    command: Sequence[object],
    log: Path,
    env: Mapping[str, str],
    more: Callable[[], str] = lambda: "",
) -> Ran:
    """Runs a command as ``run`` does, and shows how long it has been running.

    On a terminal the line is overwritten; elsewhere it is said again now and then.

    Args:
        command: program and arguments.
        log: the file that all it says goes to.
        env: its environment.
        more: what else to show.
    """
    live, said = sys.stdout.isatty(), 0.0

    def watch(seconds: float) -> None:
        nonlocal said
        if live or seconds - said >= HEARTBEAT:
            said = seconds
            line = f"    {clock(seconds)}{more()}"
            print(f"\r{line:<40}" if live else line, end="" if live else "\n", flush=True)

    try:
        return run(command, log, env, watch)
    finally:
        if live:
            print("\r" + " " * 40, end="\r")


def _ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process has ended, or does so in a moment."""
    try:
        process.wait(POLL)
    except subprocess.TimeoutExpired:
        return False
    return True


def answer(script: str, *arguments: object) -> str:
    """What a Python script prints on standard output; all else that it says is shown.

    Raises:
        RunError: where it fails.
    """
    words = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RunError(f"{Path(script).name} ended with code {done.returncode}")
    return done.stdout


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
            RunError: where the command fails.
        """
        print(f"\n{self.head(title)}\n{typed(command)}", flush=True)
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        log = self.logs / f"{self.done:02d}-{name}.log"
        ran = run_live(command, log, self.env, lambda: how_far(tail(log), progress, of))
        for line in ran.said.splitlines():
            if show and re.search(show, line):
                print("    " + re.sub(r"^[A-Z]+:[\w.]+:", "", line).strip())
        print(f"    {clock(ran.seconds)}, {clock(self.elapsed)} in all", flush=True)

    def skip(self, title: str, made: Path) -> None:
        """Counts a step whose result is there."""
        print(f"\n{self.head(title)}\n    there already: {made}")

    def head(self, title: str) -> str:
        """The number and title of the next step, which this one then is."""
        self.done += 1
        return f"[{self.done}/{self.total}] {title}"


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


def typed(command: Sequence[object]) -> str:
    """A command as one would type it, in lines that fit the screen, broken before options."""
    chunks: list[str] = []
    for word in (shlex.quote(str(part)) for part in command):
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


def environment() -> dict[str, str]:
    """The environment of the commands: this Python's programs, and threads that share.

    OpenMP's threads spin while they wait for one another. Where others use the machine too that
    keeps it from the very threads they wait for: with three other programs on its two cores a
    training step took 4.0 s; asleep after 10,000 turns 0.65 s; alone, 0.15 s either way.
    """
    here = str(Path(sys.executable).parent)
    path = os.pathsep.join((here, os.environ.get("PATH", os.defpath)))
    defaults = {"OMP_NUM_THREADS": str(threads()), "GOMP_SPINCOUNT": "10000"}
    return defaults | os.environ | {"PATH": path, "PYTHONUNBUFFERED": "1"}


def threads() -> int:
    """Threads of a command. Models as small as the demo's have no work for more than a few."""
    return min(4, usable_cores())


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
