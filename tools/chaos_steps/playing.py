"""One case: commands in a folder of their own, of which one is struck, and what must hold then."""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fault_cases.stage import BadOutcome, Ran, Running, Stage, check_manners, check_message

from chaos_steps.commands import Command, Pair
from chaos_steps.seeing import Seen, differences, files, seen
from chaos_steps.striking import Strike, Striking
from chaos_steps.world import Words, World

#: Kinds of strikes that end a process at once.
KILLS = ("before", "after", "torn", "lost")
#: What is left of a process that was killed; nothing of it may be there in the end.
TEMPORARY = re.compile(r"\.(partial-\w+|lock|building)(/|$)|making\.json$|(^|/)tmp")
#: Seconds that a second process gets while the first one has stopped.
STOPPED = 1.5


@dataclass(frozen=True)
class Right:
    """What undisturbed runs of a command come to.

    Attributes:
        steps: the write steps of a run, each as ``kind name``.
        seen: what readers see before it, after it, and after it was run twice.
        files: every file after it, and after it was run twice.
    """

    steps: Sequence[str]
    seen: Sequence[Seen]
    files: Sequence[dict[str, str]]


@dataclass
class Place:
    """A folder that commands run in.

    Attributes:
        folder: which; made of what lies there before the commands.
        world: the rest of the world.
    """

    folder: Path
    world: World
    _runs: int = field(default=0)

    def make(self, start: str) -> None:
        """Puts there what lies there before."""
        shutil.copytree(self.world.start(start), self.folder)

    def remove(self) -> None:
        """Takes all of it away."""
        for left in self.folder.parent.glob(f"{self.folder.name}*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()

    @property
    def log(self) -> Path:
        """Where the steps of the struck command are written."""
        return self.folder.with_suffix(".steps")

    def start(self, words: Words, strike: Strike | None = None) -> Running:
        """Starts a command."""
        before = None
        if strike is not None:
            before = Striking(self.folder, strike, self.log).install
        return self.stage().start(words, before=before)

    def stage(self) -> Stage:
        """For one more run."""
        self._runs += 1
        return Stage(self.folder, self.world, self._runs)  # type: ignore[arg-type]

    def run(self, words: Words, strike: Strike | None = None) -> Ran:
        """Runs it to its end."""
        return self.start(words, strike).wait()

    def step(self, number: int) -> str:
        """A step of the struck command, from 1."""
        return self.log.read_text().splitlines()[number - 1]


def right_of(place: Place, command: Command) -> Right:
    """What a command comes to that nothing happens to.

    Raises:
        RuntimeError: where it does not work.
    """
    place.make(command.start)
    found, lying = [seen(place.folder)], []
    ran = place.run(command.words, Strike())
    steps = place.log.read_text().splitlines()[:-1]
    for _ in range(2):
        found.append(seen(place.folder))
        lying.append(files(place.folder))
        if ran.code and len(lying) == 1:
            raise RuntimeError(f"{command.name}: {ran.last}")
        if len(lying) == 1:
            ran = place.run(command.words)
    place.remove()
    if left := [name for some in lying for name in some if TEMPORARY.search(name)]:
        raise BadOutcome(f"left behind by an undisturbed run: {', '.join(left[:5])}")
    return Right(steps, found, lying)


def strike_command(place: Place, command: Command, right: Right, strike: Strike) -> str:
    """Strikes a command at a step, runs it again, and checks all that must hold.

    Returns:
        What became of the command: ``killed``, ``failed``, ``worked``.

    Raises:
        BadOutcome: saying what does not hold.
    """
    place.make(command.start)
    ran = place.run(command.words, strike)
    became = _ended(ran, strike)
    there = _checked(place, "after the strike")
    before, once = right.seen[0], right.seen[1]
    if became == "worked" and _left_out_documents(there, once, ran, strike):
        place.remove()
        return became
    _check_either(there, [before, once])
    ended = strike.kind == "lost" and strike.step > len(right.steps)
    if (became == "worked" or ended) and there != once:
        raise BadOutcome(f"said to work, but is not there: {differences(there, once)}")
    if became == "failed":
        _check_left(place, strike)
    again = place.run(command.words)
    check_manners(again)
    if again.code and there != once:
        raise BadOutcome(f"run again: {again.last}")
    finally_there = _checked(place, "after it was run again")
    lying = files(place.folder)
    allowed = right.files if there == once else right.files[:1]
    if lying not in allowed:
        seen_too = differences(finally_there, once)
        raise BadOutcome(f"run again, files {differences(lying, right.files[0])}; seen {seen_too}")
    place.remove()
    return became


def _check_either(there: Seen, states: Sequence[Seen]) -> None:
    """Each thing that is seen on its own is as before or after; all of a datastore alike."""
    parts = ("calibration", "results", "table")
    for names in (
        (set(states[0]) | set(states[1]) | set(there)).difference(parts),
        *({part} for part in parts),
    ):
        found, *either = [
            {name: digest for name, digest in some.items() if name in names}
            for some in (there, *states)
        ]
        if found not in either:
            differs = [differences(found, state) for state in either]
            raise BadOutcome(f"neither the old ({differs[0]}) nor the new ({differs[1]})")


def _left_out_documents(there: Seen, once: Seen, ran: Ran, strike: Strike) -> bool:
    """A datastore is saved without its documents, with a warning, where they do not fit."""
    without = {name: digest for name, digest in once.items() if name != "documents"}
    return strike.kind in ("full", "failing") and there == without and "documents" in ran.out


def _ended(ran: Ran, strike: Strike) -> str:
    """How a struck command ended, if as it may."""
    check_manners(ran, [signal.SIGKILL] if strike.kind in KILLS else [])
    if ran.code == -signal.SIGKILL:
        return "killed"
    if ran.code == 0:
        return "worked"
    check_message(ran, "")
    return "failed"


def _checked(place: Place, when: str) -> Seen:
    try:
        return seen(place.folder)
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadOutcome(f"does not open {when}: {words[:300]}") from None


def _check_left(place: Place, strike: Strike) -> None:
    """A command that failed has removed what was temporary, if it could."""
    if strike.kind == "failing" and place.step(strike.step).startswith(("unlink", "rmdir")):
        return
    hidden = re.compile(r"\.(partial-\w+|lock)(/|$)")
    if left := [name for name in files(place.folder) if hidden.search(name)]:
        raise BadOutcome(f"failed and left {', '.join(left[:4])}")


def two_writers(
    place: Place, pair: Pair, serial: dict[str, Seen], step: int, rng: random.Random
) -> str:
    """Runs two commands at once: one stops at a step, until the other has ended or waits for it.

    Args:
        place: where.
        pair: the commands.
        serial: what may be there in the end, by which commands ran one after the other.
        step: at which the first one stops; 0 to start both together.
        rng: of when the second one starts, where both run.

    Returns:
        Which of them worked: ``both``, ``first``, ``second``, ``none``.

    Raises:
        BadOutcome: where one ends otherwise, or the result is none of one after the other.
    """
    place.make(pair.start)
    first = place.start(pair.first, Strike("stop", step))
    if step:
        first.wait_stopped()
    else:
        time.sleep(rng.random() * 0.3)
    second = place.start(pair.second)
    try:
        deadline = time.monotonic() + STOPPED
        while step and not second.ended() and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        first.send(signal.SIGCONT)
    ended = [first.wait(), second.wait()]
    worked = [name for name, ran in zip(("first", "second"), ended, strict=True) if not ran.code]
    for ran in ended:
        check_manners(ran)
        if ran.code:
            check_message(ran, BUSY)
    there = _checked(place, "after both")
    may = {name: state for name, state in serial.items() if set(name.split("+")) == set(worked)}
    if pair.first == pair.second:
        may["together"] = serial["first"]  # they share one making
    if there not in may.values():
        says = [f"{name}: {differences(there, state)}" for name, state in may.items()]
        raise BadOutcome(f"{' and '.join(worked) or 'none'} worked, but it is not {says}")
    if left := [name for name in files(place.folder) if TEMPORARY.search(name)]:
        raise BadOutcome(f"left behind: {', '.join(left[:5])}")
    place.remove()
    return "both" if len(worked) == 2 else worked[0] if worked else "none"


#: What the one may say that came second: another process has the claim, or has been faster.
BUSY = "another process|exists already"


def serial_outcomes(place: Place, pair: Pair) -> dict[str, Seen]:
    """What is there after one of two commands, or both of them, one after the other."""
    found = {}
    for names in ("first", "second", "first+second", "second+first"):
        place.make(pair.start)
        for name in names.split("+"):
            place.run(pair.first if name == "first" else pair.second)
        found[names] = seen(place.folder)
        place.remove()
    return found


def read_meanwhile(place: Place, command: Command, right: Right, rng: random.Random) -> int:
    """Reads in a loop while a command runs, slowly.

    Returns:
        How often it was read.

    Raises:
        BadOutcome: where it was not the old or the new, or did not open.
    """
    place.make(command.start)
    writer = place.start(command.words, Strike("slow"))
    times, states = 0, right.seen[:2]
    while True:
        last = writer.ended()
        pause = 0.0 if last else rng.choice((0.0, 0.01, 0.05, 0.2))
        try:
            there = seen(place.folder, pause)
        except Exception as error:
            writer.wait()
            words = " ".join(f"{type(error).__name__}: {error}".split())
            raise BadOutcome(f"did not open at reading {times}: {words[:300]}") from None
        try:
            _check_either(there, states)
        except BadOutcome as bad:
            writer.wait()
            raise BadOutcome(f"reading {times}: {bad}") from None
        times += 1
        if last:
            break
        time.sleep(0.005)
    ran = writer.wait()
    check_manners(ran)
    if ran.code or there != states[1]:
        raise BadOutcome(f"ended with code {ran.code}: {ran.last}")
    place.remove()
    return times


def growing(steps: Iterable[str]) -> list[int]:
    """The steps, from 1, that write bytes."""
    return [number for number, step in enumerate(steps, 1) if step.startswith("write ")]
