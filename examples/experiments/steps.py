"""The stock commands, as the steps of an experiment.

What a step makes lies in the experiment's folder, under its final name only when it is whole. A
step whose result is there already is left out, so an experiment that was stopped goes on where it
was. Other flags want another folder.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

# Also from a checkout that is not installed; and the demo, whose model serves here too.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.commands import RunError, Steps, environment
from demo import MODEL, SAVING, SCORING, TRAINING
from scores import Scores

from fairseq_knnlm.errors import KnnlmError

ROOT = Path(__file__).resolve().parents[2]
PLUGIN: list[object] = ["--user-dir", ROOT / "fairseq_knnlm", "--task", "knn_lm"]
#: The demo's model and schedule, for who gives no flags: some two minutes on two cores. Its last
#: checkpoint is kept too, for a model that is to learn its text by heart.
SCHEDULE = [flag for flag in TRAINING if flag != "--no-last-checkpoints"]
TRAIN_FLAGS = shlex.join([*MODEL, *SCHEDULE, "--max-update", "1600"])
EVAL_FLAGS = shlex.join(map(str, SCORING))
SAVE_FLAGS = shlex.join(map(str, SAVING))


@dataclass
class Experiment:
    """A folder, and the commands that fill it.

    Attributes:
        out: the folder.
        steps: runs the commands and keeps their logs.
        args: flags for the commands, as ``add_arguments`` reads them.
    """

    out: Path
    steps: Steps
    args: argparse.Namespace

    @classmethod
    def of(cls, args: argparse.Namespace, steps: int) -> "Experiment":
        """An experiment of so many steps, in the folder ``--out``."""
        logs = args.out / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        env = environment()
        # The commands take the package from this checkout, as the scripts do.
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
        return cls(args.out, Steps(steps, logs, env), args)

    def make(
        self,
        path: Path,
        title: str,
        words: Sequence[object],
        *,
        piecemeal: bool = False,
        **watch: Any,
    ) -> Path:
        """Runs a command, unless what it makes is there.

        Args:
            path: the file or folder that it makes.
            title: what it does, in words.
            words: the command, but for that path at its end.
            piecemeal: it writes a folder file by file, so that a part of one may be left behind.
            watch: how ``Steps.run`` tells how far it is, and what it shows.
        """
        if path.exists():
            self.steps.skip(title, path)
            return path
        if not piecemeal:
            self.steps.run(title, [*words, path], **watch)
            return path
        partial = path.with_name(f"{path.name}.partial")
        if partial.exists():
            shutil.rmtree(partial)
        self.steps.run(title, [*words, partial], **watch)
        return partial.rename(path)

    def binarise(
        self, name: str, train: Path, valid: Path, test: Path, dictionary: Path | None = None
    ) -> Path:
        """Text to a folder that fairseq reads; with its own dictionary unless one is given."""
        words: list[object] = ["fairseq-preprocess", "--only-source", "--trainpref", train]
        words += ["--validpref", valid, "--testpref", test]
        words += ["--srcdict", dictionary] if dictionary else []
        path = self.out / f"data-{name}"
        return self.make(path, f"Binarise {name}", [*words, "--destdir"], piecemeal=True)

    def train(self, name: str, data: Path, *flags: object, keep: str = "best") -> Path:
        """Trains a language model with ``--train-flags`` and these; its checkpoint ``keep``."""
        words = [*shlex.split(self.args.train_flags), *map(str, flags)]
        # Of a flag given twice the last counts, here as in fairseq.
        updates = int(dict(pairwise(words)).get("--max-update", 0))
        folder = self.make(
            self.out / f"lm-{name}",
            f"Train a language model: {name}",
            ["fairseq-train", data, *PLUGIN, *words, "--save-dir"],
            piecemeal=True,
            progress=r"num_updates[=:] *(\d+)" if updates else "",
            of=updates,
        )
        return folder / f"checkpoint_{keep}.pt"

    def datastore(self, name: str, data: Path, checkpoint: Path, *flags: object) -> Path:
        """Saves the train split of ``data`` and builds its index: two steps."""
        store = self.make(
            self.out / f"dstore-{name}",
            f"Save a datastore: {name}",
            [*self._eval_lm(data, checkpoint, "train", *flags)]
            + ["--save-knnlm-dstore", "--dstore-mmap"],
        )
        self.make(
            store / "knn.index",
            f"Build its index: {name}",
            ["fairseq-knnlm", "build-index", "--dstore", store]
            + ["--recipe", self.args.recipe, "--indexfile"],
            show=r"knn\.index: ",
        )
        return store

    def perplexity(self, name: str, data: Path, checkpoint: Path, split: str = "test") -> float:
        """Of a language model alone: a step."""
        path = self.make(
            self.out / f"{name}.json",
            f"Score {split}: {name}",
            [*self._eval_lm(data, checkpoint, split), "--results-json"],
        )
        return json.loads(path.read_text())["perplexity"]

    def scores(
        self, name: str, data: Path, checkpoint: Path, store: Path, *flags: object
    ) -> Scores:
        """Score tables of valid and test with a datastore: two steps."""
        knn = ["--knnlm", "--dstore-filename", store, "--k", self.args.k, "--mixer", "none"]
        tables = [
            self.make(
                self.out / f"{name}-{split}.npz",
                f"Score {split}: {name}",
                [*self._eval_lm(data, checkpoint, split, *knn, *flags), "--score-table"],
            )
            for split in ("valid", "test")
        ]
        return Scores.read(*tables)

    def _eval_lm(self, data: Path, checkpoint: Path, split: str, *flags: object) -> list[object]:
        """``fairseq-eval-lm``; of a flag given twice the last counts."""
        words = ["fairseq-eval-lm", data, *PLUGIN, "--path", checkpoint, "--gen-subset", split]
        # A datastore is of train; a model's score on it need not be as good as on test.
        reading = self.args.save_flags if split == "train" else self.args.eval_flags
        return [*words, *shlex.split(reading), *flags]


def add_arguments(parser: argparse.ArgumentParser, *, trains: bool = True) -> None:
    """What every experiment made of commands takes."""
    option = parser.add_argument
    option("--out", type=Path, required=True, help="folder of all that is made; kept between runs")
    option(
        "--eval-flags",
        default=EVAL_FLAGS,
        metavar="FLAGS",
        help=f"of fairseq-eval-lm, in quotes, to score (default: {EVAL_FLAGS})",
    )
    option(
        "--save-flags",
        default=SAVE_FLAGS,
        metavar="FLAGS",
        help=f"the same, to save a datastore (default: {SAVE_FLAGS})",
    )
    if trains:
        option(
            "--train-flags",
            default=TRAIN_FLAGS,
            metavar="FLAGS",
            help="of fairseq-train, in quotes: model, criterion, optimizer, --max-update "
            "(default: the demo's small model)",
        )
    option("--recipe", default="auto", help="of the indexes (default: auto)")
    option("--k", type=int, default=1024, help="neighbours (default: 1024)")


def fraction(text: str) -> str:
    """A part such as ``1/4``, for argparse."""
    above, _, below = text.partition("/")
    if not (above.isdigit() and below.isdigit() and 0 < int(above) <= int(below)):
        raise argparse.ArgumentTypeError(f"{text} is no part such as 1/4")
    return text


def write_part(text: Path, part: str, to: Path) -> Path:
    """Writes the first ``part`` of a text's lines to a file."""
    above, below = map(int, part.split("/"))
    lines = text.read_bytes().splitlines(keepends=True)
    to.write_bytes(b"".join(lines[: max(1, len(lines) * above // below)]))
    return to


def ended(main: Callable[[], None]) -> int:
    """Runs a script to its exit code: a message, and no traceback, where a command fails."""
    try:
        main()
    except (RunError, KnnlmError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0
