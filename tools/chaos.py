#!/usr/bin/env python
"""Kills commands at their write steps, and checks that nothing is lost.

It makes a tiny world in a temporary folder and finds out which write steps each command has: every
call that makes, writes, flushes, renames or removes something. Each command is killed once before
each of its steps. After that, until the time is over, commands and steps are drawn at random, and
what happens there: a kill before or after the step or in the middle of it, a power cut, a full
disk, an error of the disk; also two writers at once, and readers meanwhile. After each: what is
there is the old or the new, bit for bit; the same command, run again, ends well and leaves the very
files that an undisturbed run leaves. With ``--ray`` workers and nodes of a Ray are killed too, and
the commands that ask them, at moments that are drawn.

Without a seed that is given, what is drawn is the same whenever it is drawn.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # processes fork, which threads do not survive

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# This checkout, whatever is installed, and the tests' tiny world.
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from chaos_steps import on_ray  # noqa: E402
from chaos_steps.commands import Command, Pair, commands, pairs  # noqa: E402
from chaos_steps.forks import in_forks  # noqa: E402
from chaos_steps.playing import (  # noqa: E402
    KILLS,
    Place,
    Right,
    growing,
    read_meanwhile,
    right_of,
    serial_outcomes,
    strike_command,
    two_writers,
)
from chaos_steps.striking import Strike  # noqa: E402
from chaos_steps.warming import load_all, warm  # noqa: E402
from chaos_steps.world import World, make_world  # noqa: E402

#: Where a disk lies in memory: power cuts are played, so nothing need ever be on a real one.
IN_MEMORY = Path("/dev/shm")
#: What is drawn, and how often.
DRAWN = {"after": 3, "torn": 2, "lost": 6, "full": 2, "failing": 3, "writers": 8, "readers": 2}
#: Between these the table lies in a document.
BEGIN, END = "<!-- chaos: begin -->", "<!-- chaos: end -->"


@dataclass(frozen=True)
class Case:
    """What is done once.

    Attributes:
        kind: a kind of strike, ``writers`` or ``readers``.
        name: of the command, or pair.
        step: at which step it happens.
        seed: of what is drawn within it.
    """

    kind: str
    name: str
    step: int
    seed: int

    def __str__(self) -> str:
        return f"{self.kind}:{self.step}:{self.seed}:{self.name}"


@dataclass
class Bench:
    """The world, what is right in it, and what was found.

    Attributes:
        world: where things lie.
        commands, pairs: by name.
        rights: what undisturbed runs come to, by command.
        serial: what pairs may come to, by pair.
        killed: the steps at which each command was killed.
        counts: by command or pair, and what became of a case.
        findings: the cases that were bad, and why.
    """

    world: World
    commands: dict[str, Command]
    pairs: dict[str, Pair]
    rights: dict[str, Right] = field(default_factory=dict)
    serial: dict[str, dict[str, Any]] = field(default_factory=dict)
    killed: dict[str, set[int]] = field(default_factory=dict)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    findings: list[tuple[Case, str]] = field(default_factory=list)

    def prepare(self, folder: Path, jobs: int) -> None:
        """Finds out what undisturbed runs come to."""

        def do(each: Command | Pair, path: Path) -> Any:
            place = Place(path, self.world)
            if isinstance(each, Pair):
                return serial_outcomes(place, each)
            return asdict(right_of(place, each))

        work: list[Command | Pair] = [*self.commands.values(), *self.pairs.values()]
        for each, found, bad in in_forks(work, do, folder, jobs):
            if bad:
                self.take(Case("look", each.name, 0, 0), None, bad)
            elif isinstance(each, Pair):
                self.serial[each.name] = found
            else:
                self.rights[each.name] = Right(**found)
            say(f"undisturbed: {each.name}")

    def every_step(self, rng: random.Random) -> list[Case]:
        """A kill before each step of each command, in an order that is drawn.

        And a power cut when a command has ended.
        """
        ends = {name: len(right.steps) for name, right in self.rights.items()}
        cases = [
            Case("before", name, n, 0) for name, end in ends.items() for n in range(1, end + 1)
        ]
        cases += [
            Case("lost", name, end + 1, seed) for name, end in ends.items() for seed in (1, 2)
        ]
        rng.shuffle(cases)
        return cases

    def drawn(self, rng: random.Random) -> Case:
        """Something else."""
        kinds = [kind for kind in DRAWN if self.serial or kind != "writers"]
        (kind,) = rng.choices(kinds, [DRAWN[kind] for kind in kinds])
        seed = rng.randrange(10**6)
        if kind == "writers":
            name = rng.choice(sorted(self.serial))
            return Case(kind, name, rng.randrange(120), seed)
        name = rng.choice(sorted(self.rights))
        steps = self.rights[name].steps
        step = rng.randint(1, len(steps) + (kind == "lost"))
        if kind == "torn":
            step = rng.choice(growing(steps))
        return Case(kind, name, 0 if kind == "readers" else step, seed)

    def play(self, case: Case, path: Path) -> str:
        """Plays a case; what became of it."""
        place, rng = Place(path, self.world), random.Random(case.seed)
        if case.kind == "writers":
            pair = self.pairs[case.name]
            return two_writers(place, pair, self.serial[case.name], case.step, rng)
        command, right = self.commands[case.name], self.rights[case.name]
        if case.kind == "readers":
            times = read_meanwhile(place, command, right, rng)
            return f"read {times} times"
        return strike_command(place, command, right, Strike(case.kind, case.step, case.seed))

    def take(self, case: Case, became: str | None, bad: str) -> None:
        """Notes what became of a case."""
        self.counts[case.name, case.kind] += 1
        if case.kind in KILLS and (bad or became == "killed"):
            self.killed.setdefault(case.name, set()).add(case.step)
            self.counts[case.name, "kills"] += 1
        if case.kind == "readers" and became:
            self.counts[case.name, "readings"] += int(became.split()[1])
        if bad:
            self.findings.append((case, bad))
            right = self.rights.get(case.name)
            step = right.steps[case.step - 1] if right and 0 < case.step <= len(right.steps) else ""
            print(f"\nBAD {case} [{step}]: {' '.join(bad.split())}", flush=True)


def main() -> int:
    """Plays cases; 1 where one is bad."""
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which cleans up
    folder = Path(
        tempfile.mkdtemp(prefix="knnlm-chaos-", dir=IN_MEMORY if IN_MEMORY.is_dir() else None)
    )
    try:
        if args.kind:
            DRAWN.update({kind: int(kind == args.kind) for kind in DRAWN})
        bench = make_bench(folder, args)
        started = time.monotonic()
        cases = chosen(bench, args, started)
        for case, became, bad in in_forks(cases, bench.play, folder, args.jobs):
            bench.take(case, became, bad)
            say(f"{sum(bench.counts.values())} {case}")
        lines = table(bench, args.seed, time.monotonic() - started)
        bad_on_ray = []
        if args.ray:
            say("Ray")
            tally = on_ray.play(bench.world, folder, args.ray, args.seed)
            lines += ["", *on_ray.table(tally, args.seed, args.ray)]
            bad_on_ray = tally.findings
    finally:
        if args.keep:
            print(f"the world is left in {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    print("\n" + "\n".join(lines))
    if args.markdown:
        head, rest = args.markdown.read_text().split(BEGIN)
        text = "\n".join([BEGIN, *lines, END])
        args.markdown.write_text(head + text + rest.split(END)[1])
    return 1 if bench.findings or bad_on_ray else 0


def arguments() -> argparse.Namespace:
    """As they were typed."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="example: tools/chaos.py --seconds 600 --seed 1",
    )
    parser.add_argument("--seconds", type=float, default=600, help="of cases (default: 600)")
    parser.add_argument("--seed", type=int, default=1, help="of what is drawn (default: 1)")
    parser.add_argument("--only", default="", help="commands and pairs whose names hold this text")
    parser.add_argument("--case", help="one case alone, as a finding names it")
    parser.add_argument("--drawn", action="store_true", help="leave out the kills at every step")
    parser.add_argument("--kind", choices=DRAWN, help="draw this alone (with --drawn)")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time (default: 2)")
    parser.add_argument("--ray", type=float, default=0, help="seconds of kills on Ray, after that")
    parser.add_argument("--markdown", type=Path, help="put the table into this document")
    parser.add_argument("--keep", action="store_true", help="leave the world where it was made")
    args = parser.parse_args()
    if args.jobs < 1 or args.seconds < 0:
        parser.error("--jobs is 1 or more, and --seconds no less than 0")
    return args


def make_bench(folder: Path, args: argparse.Namespace) -> Bench:
    """Makes the world, and looks at undisturbed runs."""
    load_all()
    say("making the world")
    world = make_world(folder / "world")
    wanted = args.case.split(":", 3)[3] if args.case else args.only
    bench = Bench(
        world,
        {one.name: one for one in commands(world) if wanted in one.name},
        {one.name: one for one in pairs(world) if wanted in one.name},
    )
    warm([*bench.commands.values(), *bench.pairs.values()])
    bench.prepare(folder, args.jobs)
    return bench


def chosen(bench: Bench, args: argparse.Namespace, started: float) -> Iterator[Case]:
    """The cases, until the time is over."""
    if args.case:
        kind, step, seed, name = args.case.split(":", 3)
        yield Case(kind, name, int(step), int(seed))
        return
    rng = random.Random(args.seed)
    every = [] if args.drawn or not bench.rights else bench.every_step(rng)
    draw: Callable[[], Case] = lambda: bench.drawn(rng)  # noqa: E731
    while time.monotonic() - started < args.seconds:
        yield every.pop() if every and rng.random() < 0.8 else draw()


def say(text: str) -> None:
    """Progress, on one line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text[:100]}", end="", file=sys.stderr, flush=True)


def table(bench: Bench, seed: int, seconds: float) -> list[str]:
    """What was done and found, as Markdown."""
    counts = bench.counts
    kinds = ["before", "after", "torn", "lost", "full", "failing", "readers"]
    heads = ["command", "steps", "killed at", "kills", *kinds, "findings"]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for name, right in bench.rights.items():
        bad = sum(case.name == name for case, _ in bench.findings)
        cells = [name, len(right.steps), len(bench.killed.get(name, ())), counts[name, "kills"]]
        cells += [counts[name, kind] for kind in kinds]
        lines.append(f"| {' | '.join(map(str, [*cells, bad]))} |")
    lines += ["", "| two at once | times | findings |", "| --- | --- | --- |"]
    for name in bench.serial:
        bad = sum(case.name == name for case, _ in bench.findings)
        lines.append(f"| {name} | {counts[name, 'writers']} | {bad} |")
    kills = sum(number for (_, kind), number in counts.items() if kind == "kills")
    cases = sum(n for (_, kind), n in counts.items() if kind not in ("kills", "readings"))
    read = sum(number for (_, kind), number in counts.items() if kind == "readings")
    lines += [
        "",
        f"Seed {seed}, {seconds:.0f} s: {cases:,} cases, {kills:,} kills, {read:,} readings "
        f"meanwhile, {len(bench.findings)} findings.",
    ]
    return lines


if __name__ == "__main__":
    sys.exit(main())
