"""What a case is, how it runs commands, and what is checked of every run.

A command runs in a fork of a process that has imported everything already, as its user would run
it: its own arguments, streams, session and exit. So a run takes as long as its work, and a crash is
seen as a signal. Of every run is checked, whatever the case:

* no traceback, no dump of FAISS or of C++, no end by a signal that the case did not send, in time;
* who refuses says so once, with an exit code, and names what is at fault;
* what works gives the figure that an undamaged run gives;
* files that were there are as they were, unless the case is meant to change them;
* no temporary file is left.
"""

from __future__ import annotations

import atexit
import fnmatch
import hashlib
import importlib
import math
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fault_cases.world import World

GROUPS = {
    "results": "Results that are wrong",
    "reading": "Files that are read",
    "writing": "Files that are written",
    "flags": "Flags",
    "models": "Memory, models, warnings",
    "blocks": "Datastores in blocks, changes, shares, Ray",
    "figures": "Columns of others, raw text, receipts",
}
#: Seconds after which a command that has not ended is taken to hang.
PATIENCE = 60.0
#: What no user should see: tracebacks, FAISS's dumps, C++ saying goodbye.
DUMPS = re.compile(
    r"Traceback \(most recent call last\)|--- Logging error ---|Fatal Python error"
    r"|terminate called|faiss::|Error in .* at .*\.(?:cpp|cu|h):\d+|core dumped"
    r"|something failed that should not"
)
TEMPORARY = (".*.partial-*", ".*.lock", ".*.building", "tmp*")
#: fairseq reports a loss with four decimals.
LOSS = re.compile(r"Loss \(base 2\): (\S+), Perplexity: (\S+)")
TOLERANCE = 2e-4


class BadOutcome(Exception):
    """What happened is not what must happen."""


class SkippedCase(Exception):
    """The case cannot be played on this machine."""


@dataclass(frozen=True)
class Case:
    """One planted fault.

    Attributes:
        group: of ``GROUPS``.
        name: unique.
        done: what is done, in words.
        must: what must happen, in words.
        play: does it and checks it; returns what happened, or raises ``BadOutcome``.
    """

    group: str
    name: str
    done: str
    must: str
    play: Callable[[Stage], str]


@dataclass(frozen=True)
class Ran:
    """A command that has ended.

    Attributes:
        code: its exit code, or minus the signal that ended it.
        out: what it printed, standard output and error together.
        seconds: how long it took.
    """

    code: int
    out: str
    seconds: float

    @property
    def loss(self) -> float | None:
        """What fairseq reports, in bits a token."""
        found = LOSS.search(self.out)
        return float(found[1]) if found else None

    @property
    def last(self) -> str:
        """The end of what it printed."""
        lines = [line for line in self.out.splitlines() if line.strip()]
        return " | ".join(line.strip() for line in lines[-3:])[-300:]

    def message(self) -> str | None:
        """The one message of a refusal, from ``error:`` to the end; None where there is none."""
        lines = self.out.splitlines()
        starts = [n for n, line in enumerate(lines) if line.startswith("error: ")]
        usage = [n for n, line in enumerate(lines) if re.match(r"[\w.-]+( [\w-]+)*: error: ", line)]
        if len(starts) == 1 and not usage:
            return "\n".join(lines[starts[0] :])
        if len(usage) == 1 and not starts and self.code == 2:
            return lines[usage[0]]
        return None


@dataclass
class Running:
    """A command on its way."""

    pid: int
    output: Path
    started: float
    sent: int | None = None

    def send(self, number: int) -> None:
        """Sends a signal to it and to its own processes."""
        self.sent = number
        os.kill(self.pid, number)

    def wait_stopped(self) -> None:
        """Waits until a signal to stop has stopped it, or it has ended."""
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def ended(self) -> bool:
        """Whether it has ended; it can still be waited for."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self, patience: float = PATIENCE) -> Ran:
        """Waits for its end."""
        while not self.ended():
            if time.monotonic() - self.started > patience:
                os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise BadOutcome(f"did not end within {patience:.0f} s: {self._ran(-9).last}")
            time.sleep(0.005)
        _, status = os.waitpid(self.pid, 0)
        return self._ran(os.waitstatus_to_exitcode(status))

    def _ran(self, code: int) -> Ran:
        text = self.output.read_text(errors="replace")
        return Ran(code, text, time.monotonic() - self.started)


@dataclass
class Stage:
    """The folder that a case is played in, and what it needs to run commands there."""

    folder: Path
    world: World
    _runs: int = 0
    _mounts: list[Path] = field(default_factory=list)

    # What is on the stage

    def store(self, name: str = "store") -> Path:
        """A copy of the world's datastore, with its index, n-grams and calibration."""
        return Path(shutil.copytree(self.world.store, self.folder / name))

    def cut(self, name: str = "store") -> Path:
        """A copy of the world's datastore in blocks, with its index in pieces."""
        return Path(shutil.copytree(self.world.cut, self.folder / name))

    def bare(self, name: str = "store") -> Path:
        """The same with the arrays and the manifest alone."""
        (self.folder / name).mkdir()
        for file in ("manifest.json", "keys.npy", "values.npy"):
            shutil.copy(self.world.store / file, self.folder / name / file)
        return self.folder / name

    def disk(self, size: int) -> Path:
        """A folder on a disk of its own.

        Args:
            size: bytes.
        """
        place = self.folder / "disk"
        mount(place, f"size={max(size, 4096)},mode=755")
        self._mounts.append(place)
        return place

    def close(self) -> None:
        """Takes the stage down."""
        for place in self._mounts:
            subprocess.run(["umount", "-l", place], check=False, capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    # Commands

    def start(
        self,
        words: Sequence[object] | Callable[[], object],
        *,
        real: bool = False,
        before: Callable[[], object] | None = None,
        limits: dict[int, int] | None = None,
    ) -> Running:
        """Starts a command.

        Args:
            words: the command and its arguments; or a function to call in its place.
            real: as a process of its own, as from a shell, not as a fork.
            before: called in the process first.
            limits: of resources (``resource.RLIMIT_*``), in bytes.
        """
        self._runs += 1
        output = self.folder.with_name(f"{self.folder.name}-{self._runs}.out")
        sys.stdout.flush()
        sys.stderr.flush()
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                self._enter(output)
                for what, limit in (limits or {}).items():
                    resource.setrlimit(what, (limit, limit))
                if before is not None:
                    before()
                code = _exec(words) if real else _call(words)
            finally:
                os._exit(code)
        return Running(pid, output, started)

    def _enter(self, output: Path) -> None:
        os.setsid()
        os.chdir(self.folder)
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        empty = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((empty, 0), (handle, 1), (handle, 2)):
            os.dup2(source, target)
        # Where temporary files go that nobody has said a place for.
        os.environ["TMPDIR"] = str(self.folder.parent)

    def run(
        self,
        words: Sequence[object] | Callable[[], object],
        *,
        changes: Sequence[str] = (),
        patience: float = PATIENCE,
        signals: Sequence[int] = (),
        **start: object,
    ) -> Ran:
        """Runs a command to its end and checks what is checked of every run.

        Args:
            words: as ``start`` takes them.
            changes: patterns of files, from the stage's folder, that may change or vanish.
            patience: seconds.
            signals: that may end it.
            start: further arguments of ``start``.
        """
        with self.watched(changes):
            ran = self.start(words, **start).wait(patience)  # type: ignore[arg-type]
            check_manners(ran, signals)
        return ran

    @contextmanager
    def watched(self, changes: Sequence[str] = (), *, left: bool = False) -> Iterator[None]:
        """Checks that files are as they were, and that nothing temporary is left unless ``left``.

        Nothing but the patterns of ``changes`` may change.
        """
        before = snapshot(self.folder)
        yield
        after = snapshot(self.folder)
        for name, state in before.items():
            if after.get(name) != state and not _any(changes, name):
                found = "is gone" if name not in after else "has changed"
                raise BadOutcome(f"{name} {found}")
        if not left and (kept := sorted(set(temporary(self.folder)))):
            raise BadOutcome(f"left behind: {', '.join(kept)}")

    def refused(
        self,
        words: Sequence[object] | Callable[[], object],
        says: str,
        *,
        changes: Sequence[str] = (),
        **run: object,
    ) -> str:
        """Runs a command that must be refused.

        Args:
            words: as ``start`` takes them.
            says: a regular expression that the message must hold.
            changes: patterns of files that may appear, or change, all the same.
            run: further arguments of ``run``.
        """
        before = set(snapshot(self.folder))
        ran = self.run(words, changes=changes, **run)  # type: ignore[arg-type]
        if ran.code == 0:
            loss = f" with loss {ran.loss}" if ran.loss is not None else ""
            raise BadOutcome(f"was accepted{loss}: {ran.last}")
        new = [name for name in set(snapshot(self.folder)) - before if not _any(changes, name)]
        if new:
            raise BadOutcome(f"made although refused: {', '.join(sorted(new))}")
        return check_message(ran, says)

    def works(
        self,
        words: Sequence[object] | Callable[[], object],
        *,
        loss: float | None = None,
        says: str = "",
        **run: object,
    ) -> Ran:
        """Runs a command that must work.

        Args:
            words: as ``start`` takes them.
            loss: in bits a token, which it must report.
            says: a regular expression that what it prints must hold.
            run: further arguments of ``run``.
        """
        ran = self.run(words, **run)  # type: ignore[arg-type]
        if ran.code:
            raise BadOutcome(f"ended with code {ran.code}: {ran.last}")
        if loss is not None:
            check_close(ran.loss, loss)
        if says and not re.search(says, ran.out, re.IGNORECASE):
            raise BadOutcome(f"does not say {says!r}: {ran.last}")
        return ran


def check_manners(ran: Ran, signals: Sequence[int] = ()) -> None:
    """Refuses dumps and ends by a signal, unless the case sent it."""
    if found := DUMPS.search(ran.out):
        start = max(0, found.start())
        text = ran.out[start : start + 40] + " ... " + ran.last
        raise BadOutcome(f"{_ending(ran)}: {' '.join(text.split())}"[:300])
    if ran.code < 0 and -ran.code not in signals:
        raise BadOutcome(f"{_ending(ran)}: {ran.last}")


def check_message(ran: Ran, says: str) -> str:
    """The first line of the refusal, which must be one message that holds ``says``."""
    message = ran.message()
    if message is None:
        count = len(re.findall(r"^error: ", ran.out, re.MULTILINE))
        raise BadOutcome(f"{_ending(ran)}, {count} messages: {ran.last}")
    detailed = re.search(r"^  (expected|found|to do): ", message, re.MULTILINE)
    if message.startswith("error: ") and not detailed:
        raise BadOutcome(f"a message without expected, found or to do: {message}")
    if not re.search(says, message, re.IGNORECASE):
        raise BadOutcome(f"does not name {says!r}: {' | '.join(message.splitlines())}"[:400])
    return f"refused: {message.splitlines()[0].split('error: ', 1)[1]}"


def check_close(found: float | None, expected: float, tolerance: float = TOLERANCE) -> None:
    """Refuses another figure than the one expected."""
    if found is None or not math.isfinite(found) or abs(found - expected) > tolerance:
        raise BadOutcome(f"gives {found} where {expected:.4f} is right")


def _ending(ran: Ran) -> str:
    if ran.code < 0:
        return f"ended by {signal.Signals(-ran.code).name}"
    return f"ended with code {ran.code}"


def _any(patterns: Sequence[str], name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder and what it is: a digest of its bytes, or its kind."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            found[name] = f"link to {path.readlink()}"
        elif stat.S_ISREG(mode):
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "blake2b").hexdigest()
        elif not stat.S_ISDIR(mode):
            found[name] = f"special {stat.S_IFMT(mode):o} {path.lstat().st_rdev}"
    return found


def temporary(folder: Path) -> list[str]:
    """What lies about that should not: names of temporary files and folders."""
    return [path.name for path in folder.rglob("*") if _any(TEMPORARY, path.name)]


def mount(place: Path, options: str) -> None:
    """A small file system in memory at ``place``, where this user may do so.

    Raises:
        SkippedCase: where not.
    """
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    try:
        done = subprocess.run(command, check=False, capture_output=True)
    except OSError as error:
        raise SkippedCase(f"needs a mount: {error}") from None
    if done.returncode:
        raise SkippedCase("needs the right to mount a small disk")


def _exec(words: Sequence[object] | Callable[[], object]) -> int:
    """Becomes the command itself."""
    assert not callable(words)
    typed = [str(word) for word in words]
    local = Path(sys.executable).parent / typed[0]
    os.execvp(str(local) if local.exists() else typed[0], typed)


def _call(words: Sequence[object] | Callable[[], object]) -> int:
    """Runs a command in this process, and ends it as Python ends: returns the exit code."""
    code: object = 0
    try:
        code = words() if callable(words) else _main([str(word) for word in words])
    except SystemExit as error:
        code = error.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            print(f"Exception ignored on flush: {error}", file=sys.stderr)
            code = 120
    atexit._run_exitfuncs()
    return code if isinstance(code, int) else 0 if code is None else 1


def _main(words: list[str]) -> object:
    """A console command by its name."""
    from fairseq_knnlm import cli

    sys.argv = words
    if words[0] == "fairseq-knnlm":
        return cli.main()
    name = words[0].removeprefix("fairseq-").replace("-", "_")
    return importlib.import_module(f"fairseq_cli.{name}").cli_main()
