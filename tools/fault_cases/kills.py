"""Processes that are ended, and several that write the same."""

from __future__ import annotations

import fcntl
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from fault_cases.stage import (
    BadOutcome,
    Case,
    Ran,
    Running,
    Stage,
    check_close,
    check_manners,
    check_message,
    snapshot,
    temporary,
)
from fault_cases.world import INDEX, knnlm

Command = Callable[[Stage], list[object]]


def _save(stage: Stage) -> list[object]:
    return stage.world.save("new")


def _no_keys(stage: Stage) -> list[object]:
    return stage.world.save("new", "--no-save-keys", "--recipe", "IVF8,SQ8")


def _build(stage: Stage) -> list[object]:
    return knnlm("build-index", "--dstore", _store(stage), *INDEX)


def _tune(stage: Stage) -> list[object]:
    table = stage.world.tables / "knn.npz"
    return knnlm("tune", "--dstore", _store(stage), "--score-table", table)


def _compress(stage: Stage) -> list[object]:
    source = stage.world.store
    return knnlm("compress", "--dstore", source, "--out", "new", "--pca", 8, "--merge", 4)


def _import(stage: Stage) -> list[object]:
    old = ("--dstore", stage.world.old, "--dstore-size", stage.world.rows, "--dstore-fp16")
    return knnlm("import", *old, "--out", "new")


def _score_table(stage: Stage) -> list[object]:
    return stage.world.knn(stage.world.store, "--score-table", "new.npz")


def _store(stage: Stage) -> Path:
    path = stage.folder / "store"
    return path if path.exists() else stage.store()


COMMANDS: dict[str, Command] = {
    "save": _save,
    "save --no-save-keys": _no_keys,
    "build-index": _build,
    "tune": _tune,
    "compress": _compress,
    "import": _import,
    "--score-table": _score_table,
}
#: What each writes, for the lock that it takes.
WRITES = {
    "save": "new",
    "save --no-save-keys": "new",
    "build-index": "knn.index",
    "tune": "calibration.json",
    "compress": "new",
    "import": "new",
    "--score-table": "new.npz",
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
#: Moments after something is written, in seconds: at once, and in the middle of the work.
MOMENTS = (0.0, 0.05, 0.3)


def cases() -> Iterator[Case]:
    """Ends at moments, then two writers, then readers."""
    for name, command in COMMANDS.items():
        for number in SIGNALS:
            for moment in MOMENTS:
                play = partial(_ended, command=command, number=number, moment=moment)
                done = f"{name}, {number.name} {moment} s after it began to write; then once more"
                must = "ends in one line, leaves nothing; the next run works"
                if number is signal.SIGKILL:
                    must = "the next run works, and removes what was left"
                title = f"{number.name} to {name} at {moment} s"
                yield Case("writing", title, done, must, play)
    for name, command in COMMANDS.items():
        play = partial(_two, command=command, target=WRITES[name])
        done = f"{name} while another one is writing"
        must = "the second is refused, the first one works"
        yield Case("writing", f"two writers: {name}", done, must, play)
    yield Case(
        "writing",
        "reader of an index being built",
        "an evaluation while build-index has stopped in the middle",
        "works with the old index",
        _reader,
    )
    yield Case(
        "writing",
        "snapshot with a flipped bit",
        "build-index killed, a bit of its snapshots flipped, then once more",
        "the bit does not get into the index",
        _flipped,
    )
    yield Case(
        "writing",
        "head of a pipe",
        "fairseq-knnlm info ... | head -n 1, as processes",
        "no message, no traceback",
        _head,
    )


def _ended(stage: Stage, *, command: Command, number: signal.Signals, moment: float) -> str:
    words = command(stage)
    before = snapshot(stage.folder)
    running = stage.start(words)
    _until_written(stage, running)
    time.sleep(moment)
    sent = not running.ended()
    if sent:
        running.send(number)
    ran = running.wait(20)
    if ran.code != 0 and number is not signal.SIGKILL:
        _ended_well(ran, number)
        changed = [name for name, state in before.items() if snapshot(stage.folder)[name] != state]
        if changed:
            raise BadOutcome(f"changed although ended: {changed}")
        if left := temporary(stage.folder):
            raise BadOutcome(f"left behind: {', '.join(left)}")
    happened = f"ended with code {ran.code}" if ran.code else "was done before"
    again = stage.run(words, changes=["store/*", "new/*", "*.npz", ".*"])
    if again.code and "exists already" in again.out:
        stage.works(knnlm("verify", "--dstore", stage.folder / "new"))
        return f"{happened}, when all was done"
    if again.code:
        raise BadOutcome(f"{happened}, but the next run fails: {again.last}")
    return f"{happened}; the next run works"


def _until_written(stage: Stage, running: Running) -> None:
    """Waits until a command has begun to write, or has ended."""
    deadline = time.monotonic() + 20
    while not temporary(stage.folder) and not running.ended() and time.monotonic() < deadline:
        time.sleep(0.001)


def _ended_well(ran: Ran, number: signal.Signals) -> None:
    check_manners(ran, (number,))
    word = "interrupted" if number is signal.SIGINT else "terminated"
    lines = [line for line in ran.out.splitlines() if re.match(rf"\s*{word};", line)]
    if len(lines) != 1:
        raise BadOutcome(f"ended with code {ran.code} and {len(lines)} lines of it: {ran.last}")
    if "error: " in ran.out:
        raise BadOutcome(f"an error besides: {ran.last}")


def _stopped(stage: Stage, words: list[object], target: str) -> Running:
    """A command that has stopped while it holds the claim to what it writes."""
    running = stage.start(words)
    deadline = time.monotonic() + 20
    while True:
        # Outputs are tried at the start, which takes the lock for a moment; it may be gone again.
        running.send(signal.SIGSTOP)
        running.wait_stopped()
        if any(map(_held, stage.folder.rglob(f".{target}.lock"))):
            return running
        running.send(signal.SIGCONT)
        if running.ended() or time.monotonic() > deadline:
            raise BadOutcome(f"no lock .{target}.lock was seen: {running.wait().last}")
        time.sleep(0.002)


def _held(lock: Path) -> bool:
    """Whether somebody holds a lock, whose file alone says little."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


def _two(stage: Stage, *, command: Command, target: str) -> str:
    words = command(stage)
    first = _stopped(stage, words, target)
    try:
        second = stage.start(words).wait(30)
    finally:
        first.send(signal.SIGCONT)
    done = first.wait(30)
    check_manners(second)
    if second.code == 0:
        raise BadOutcome("both were accepted at once")
    refused = check_message(second, "another process")
    if done.code:
        raise BadOutcome(f"the first one failed: {done.last}")
    if left := temporary(stage.folder):
        raise BadOutcome(f"left behind: {', '.join(left)}")
    return refused


def _reader(stage: Stage) -> str:
    store = stage.store()
    other = ("--recipe", "IVF4,Flat", "--probe", "1")
    first = _stopped(stage, knnlm("build-index", "--dstore", store, *other), "knn.index")
    try:
        ran = stage.start(stage.world.knn(store)).wait(30)
    finally:
        first.send(signal.SIGCONT)
    built = first.wait(30)
    check_manners(ran)
    if built.code or ran.code:
        raise BadOutcome(f"reader {ran.code}, builder {built.code}: {ran.last} {built.last}")
    check_close(ran.loss, stage.world.losses["knn"])
    return "read the old index, then the new one was published"


def _flipped(stage: Stage) -> str:
    """Snapshots are made every so often; a build is ended right after the first one."""
    store = stage.bare()
    words = knnlm("build-index", "--dstore", store, *INDEX)
    right = stage.folder / "right.index"
    stage.works([*words, "--indexfile", right])

    def before() -> None:
        from fairseq_knnlm.index import snapshots

        snapshots.INTERVAL = 0.0  # one after every chunk of keys

    running = stage.start(words, before=before)
    _kill_with_snapshot(stage, running)
    found = [path for path in store.rglob("*") if ".building" in str(path) and path.is_file()]
    if not found:
        return "no snapshot was left to spoil"
    for path in found:
        data = bytearray(path.read_bytes())
        for place in range(len(data) // 3, len(data), max(1, len(data) // 7)):
            data[place] ^= 4
        path.write_bytes(bytes(data))
    stage.works(words, changes=["store/.*", "store/.*/*"])
    first = stage.works(stage.world.knn(store, "--indexfile", right)).loss
    assert first is not None
    stage.works(stage.world.knn(store), loss=first)
    return "built anew, with the right loss"


def _kill_with_snapshot(stage: Stage, running: Running) -> None:
    while not running.ended():
        if any(stage.folder.rglob("snapshot.json")):
            running.send(signal.SIGKILL)
            break
    running.wait()


def _head(stage: Stage) -> str:
    store = stage.store()
    command = str(Path(sys.executable).with_name("fairseq-knnlm"))
    line = f"{shlex.quote(command)} info --dstore {shlex.quote(str(store))} | head -n 1"
    done = subprocess.run(
        ["sh", "-c", line], cwd=stage.folder, capture_output=True, text=True, check=False
    )
    if "entries" not in done.stdout or done.stderr.strip():
        raise BadOutcome(f"{done.stdout} {done.stderr}"[-300:])
    return "one line, and quiet"
