#!/usr/bin/env python
"""Plants faults and checks what happens: a table of name, what was done, what must be, what was.

It makes a tiny world of its own in a temporary folder (text, language models, a datastore), plants
each fault in a copy of it, runs the commands that a user would run, and looks at what they say, how
they end and what they leave. Nothing is downloaded, and no GPU is needed.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # processes fork, which threads do not survive

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# This checkout, whatever is installed, and the tests' tiny world.
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fault_cases import cases  # noqa: E402
from fault_cases.stage import GROUPS, BadOutcome, Case, SkippedCase, Stage  # noqa: E402

from fairseq_knnlm.cli.tables import show_prose  # noqa: E402

#: Seconds after which a whole case is ended.
PATIENCE = 240.0
#: Between these the table lies in a document.
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
#: Set once this process has mounts of its own.
APART = "KNNLM_FAULTS_APART"
MARKS = {"good": "ok", "bad": "BAD", "skipped": "skipped"}
STYLES = {"good": "", "bad": "bold red", "skipped": "yellow"}


@dataclass(frozen=True)
class Outcome:
    """What happened in a case.

    Attributes:
        case: the case.
        state: ``good``, ``bad`` or ``skipped``.
        happened: in words.
        seconds: how long it took.
    """

    case: Case
    state: str
    happened: str
    seconds: float


def main() -> int:
    """Runs the cases; 1 where one is bad."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="example: tools/faults.py --only reading --jobs 2",
    )
    parser.add_argument("--only", choices=GROUPS, action="append", help="cases of this class")
    parser.add_argument("--match", default="", help="cases whose names hold this text")
    parser.add_argument("--list", action="store_true", help="name the cases and run none")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time (default: 2)")
    parser.add_argument("--markdown", type=Path, help="put the table into this document")
    parser.add_argument("--keep", action="store_true", help="leave the world where it was made")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error("--jobs counts cases at a time: 1 or more")
    if args.list:
        for case in chosen(args):
            print(f"{case.group:<8} {case.name}")
        return 0
    live_apart()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which cleans up
    folder = Path(tempfile.mkdtemp(prefix="knnlm-faults-"))
    started = time.monotonic()
    try:
        outcomes = run_all(chosen(args), folder, args.jobs)
    except RuntimeError as error:  # the world is made by undamaged commands, and they must work
        sys.exit(f"{parser.prog}: {error}")
    finally:
        if args.keep:
            print(f"the world is left in {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    if args.markdown:
        write_markdown(args.markdown, outcomes)
    show(outcomes)
    bad = sum(outcome.state == "bad" for outcome in outcomes)
    skipped = sum(outcome.state == "skipped" for outcome in outcomes)
    left_out = f" ({skipped} cannot be played here)" if skipped else ""
    print(f"in {time.monotonic() - started:.0f} s{left_out}")
    print(f"{len(outcomes)} cases, {bad} bad")
    return 1 if bad else 0


def chosen(args: argparse.Namespace) -> list[Case]:
    """The cases that were asked for."""
    groups = args.only or list(GROUPS)
    return [case for case in cases() if case.group in groups and args.match in case.name]


def live_apart() -> None:
    """Starts again with mounts of its own, which end with the process, where that is possible."""
    if os.environ.get(APART):
        return
    for way in (["unshare", "--mount"], ["unshare", "--mount", "--map-root-user"]):
        tried = [*way, "sh", "-c", "mount -t tmpfs -o size=4k tmpfs /mnt"]
        try:
            if subprocess.run(tried, check=False, capture_output=True).returncode:
                continue
        except OSError:
            return
        os.environ[APART] = "1"
        os.execvp(way[0], [*way, sys.executable, *sys.argv])


def run_all(chosen: Sequence[Case], folder: Path, jobs: int) -> list[Outcome]:
    """Plays every case, ``jobs`` at a time, each in a fork of this process."""
    # Imported here, for all of them, so that a command starts in a moment.
    import faiss  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    from fairseq.models import transformer_lm  # noqa: F401
    from fairseq_cli import eval_lm  # noqa: F401
    from fault_cases.stage import snapshot
    from fault_cases.world import make_world

    import fairseq_knnlm.cli
    import fairseq_knnlm.tasks  # the task, which the package registers only behind fairseq

    found = Path(fairseq_knnlm.__file__).parent
    assert found == ROOT / "fairseq_knnlm", f"{found} would be tested, not {ROOT}"
    say("making the world")
    world = make_world(folder)
    before = snapshot(folder)
    outcomes: dict[str, Outcome] = {}
    waiting, playing = list(reversed(chosen)), dict[int, tuple[Case, Stage, float]]()
    try:
        while waiting or playing:
            while waiting and len(playing) < jobs:
                case = waiting.pop()
                stage = Stage(folder / f"case-{len(chosen) - len(waiting)}", world)
                playing[start(case, stage)] = case, stage, time.monotonic()
            for pid in ended(playing):
                case, stage, begun = playing.pop(pid)
                outcomes[case.name] = outcome(case, stage, time.monotonic() - begun)
                tell(outcomes[case.name])
                say(f"{len(outcomes)}/{len(chosen)} {MARKS[outcomes[case.name].state]} {case.name}")
            time.sleep(0.01)
    finally:
        for pid in playing:
            os.killpg(pid, signal.SIGKILL)
    if sys.stderr.isatty():
        print(end="\r\x1b[K", file=sys.stderr)
    changed = [name for name, state in before.items() if snapshot(folder).get(name) != state]
    assert not changed, f"cases have changed the world: {changed}"
    return [outcomes[case.name] for case in chosen]


def say(text: str) -> None:
    """Progress, on one line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text[:100]}", end="", file=sys.stderr, flush=True)


def start(case: Case, stage: Stage) -> int:
    """Plays a case in a fork; its outcome goes into a file beside the stage."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        result = stage.folder.with_suffix(".json")
        stage.folder.mkdir()
        result.write_text(json.dumps(played(case, stage)))
    finally:
        os._exit(0)


def played(case: Case, stage: Stage) -> tuple[str, str]:
    """State and words."""
    try:
        return "good", case.play(stage)
    except BadOutcome as bad:
        return "bad", str(bad)
    except SkippedCase as skipped:
        return "skipped", str(skipped)
    except Exception:
        return "bad", f"the case itself failed: {traceback.format_exc(limit=-3)}"
    finally:
        stage.close()


def ended(playing: dict[int, tuple[Case, Stage, float]]) -> Iterator[int]:
    """The cases that have ended, or are ended here, since they take too long."""
    for pid in list(playing):
        if time.monotonic() - playing[pid][2] > PATIENCE:
            os.killpg(pid, signal.SIGKILL)
        if os.waitpid(pid, os.WNOHANG)[0]:
            yield pid


def outcome(case: Case, stage: Stage, seconds: float) -> Outcome:
    """What a case left in its file."""
    result = stage.folder.with_suffix(".json")
    if result.is_file():
        state, happened = json.loads(result.read_text())
        return Outcome(case, state, " ".join(happened.split()), seconds)
    return Outcome(case, "bad", f"did not end within {PATIENCE:.0f} s", seconds)


def tell(one: Outcome) -> None:
    """One case as it ends, in plain lines, where no terminal shows the table."""
    if sys.stdout.isatty():
        return
    print(f"{MARKS[one.state]:<7} {one.case.group}: {one.case.name} [{one.seconds:.1f} s]")
    for label, text in (("done", one.case.done), ("must", one.case.must), ("did", one.happened)):
        print(f"        {label:<5} {text}")


def show(outcomes: Sequence[Outcome]) -> None:
    """The table, for a terminal."""
    if not sys.stdout.isatty():
        return
    rows = [
        [MARKS[one.state], one.case.group, one.case.name]
        + [one.case.done, one.case.must, one.happened]
        for one in outcomes
    ]
    header = ["", "class", "name", "what was done", "what must happen", "what happened"]
    show_prose(header, rows, [STYLES[one.state] for one in outcomes])


def write_markdown(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Puts the table between the marks of a document."""
    text = path.read_text() if path.exists() else f"{BEGIN}\n{END}\n"
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    bad = sum(one.state == "bad" for one in outcomes)
    lines = [BEGIN, f"{len(outcomes)} cases, {bad} bad.", ""]
    for group, title in GROUPS.items():
        rows = [one for one in outcomes if one.case.group == group]
        if not rows:
            continue
        lines += [f"### {title} ({len(rows)})", ""]
        lines += ["| name | what was done | what must happen | what happened |"]
        lines += ["| --- | --- | --- | --- |"]
        for one in rows:
            mark = "" if one.state == "good" else f"**{MARKS[one.state]}** "
            case = one.case
            cells = (case.name, case.done, case.must, mark + _lasting(one.happened)[:160])
            lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
        lines.append("")
    path.write_text(head + "\n".join(lines) + END + tail)


def _lasting(text: str) -> str:
    """Without the folders that were there for one run."""
    return re.sub(r"\S*/knnlm-faults-\w+/(case-\d+/)?", "", text)


def _cell(text: str) -> str:
    """Without what Markdown reads."""
    for old, new in (("|", "\\|"), ("<", "&lt;"), ("*", "\\*"), ("_", "\\_")):
        text = text.replace(old, new) if not text.startswith("**") or old != "*" else text
    return text


if __name__ == "__main__":
    sys.exit(main())
