"""Does retrieving from a text outperform training on it? (Khandelwal et al., 2020, section 4.2.)

Two language models are trained for as many updates: one on a part of a text, one on all of it. The
first has datastores of growing parts, the second alone and with a datastore of all that it was
trained on. Mixtures are fitted on valid; all of it for several seeds. The text is the docstrings of
the installed packages, more than the second model can read often. Processor time is measured, so
that more training can be compared with more remembering.

Seeds can be shared out over processes: first one, then the others, then all for the tables.
"""

import argparse
import json
import resource
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from headline_figure import Curves, paint_parts, paint_seconds
from scaling import add_parts, binarise_parts, name, said, share
from scores import Axes, Scores, command, draw, show
from steps import ROOT, Experiment, add_arguments, ended

EXAMPLE = """\
example: python examples/experiments/headline.py --out headline --seeds 1 2 3
         --lm-dtype bfloat16
"""
EXPERTS = ("knn", "ngram")
T = TypeVar("T")
#: Of one model with one memory: how it is mixed -> perplexity of test.
Row = dict[str, float]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = command(__doc__, EXAMPLE)
    option = parser.add_argument
    option("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the models (1 2 3)")
    option("--updates", type=int, default=1600, help="of every model (default: 1600)")
    option("--points", type=int, default=8, help="checkpoints of a training that are scored (8)")
    add_parts(parser, lm_part="1/16")
    option("--library", type=Path, help="folder of packages (default: those installed here)")
    option("--held-out", type=int, default=25_000, help="words of valid, and of test (25000)")
    option("--words", type=int, help="words of train at most (default: all)")
    option("--vocabulary", type=int, default=8000, help="pieces (default: 8000)")
    option("--lm-dtype", default="float32", help="what the models compute in (default: float32)")
    add_arguments(parser)
    args = parser.parse_args()
    for flags in ("train_flags", "eval_flags", "save_flags"):
        setattr(args, flags, f"{getattr(args, flags)} --lm-dtype {args.lm_dtype}")
    args.parts = sorted({*args.parts, "1/1"}, key=share)
    return args


def main() -> None:
    args = arguments()
    every = sorted({*args.parts, args.lm_part}, key=share)
    models, memories = 2 * len(args.seeds), (len(args.parts) + 1) * len(args.seeds)
    steps = 2 + len(every) + models * (1 + args.points) + 4 * memories
    run = Experiment.of(args, steps)
    pieces = prepare(run)
    held_out = (pieces / "docstrings" / "valid.txt", pieces / "docstrings" / "test.txt")
    train = pieces / "docstrings" / "train.txt"
    data = binarise_parts(run, every, train, held_out, pieces / "dict.txt")
    found = [Seed(run, data, seed).results() for seed in args.seeds]
    with_names = {"updates": args.updates, "lm_part": args.lm_part, "seeds": args.seeds}
    (args.out / "headline.json").write_text(json.dumps(with_names | {"found": found}, indent=1))
    tables(found, args.lm_part)
    curves = Curves(found, args.parts, args.lm_part)

    def paint(axes: Axes) -> None:
        paint_parts(axes[0], curves)
        paint_seconds(axes[1], curves)

    draw(args.out / "headline.png", paint, plots=2)


def prepare(run: Experiment) -> Path:
    """Collects the text and splits it into pieces: two steps."""
    here, args = ROOT / "examples", run.args
    collect: list[object] = ["python", here / "experiments" / "installed_text.py"]
    collect += ["--held-out", args.held_out]
    collect += ["--words", args.words] if args.words else []
    collect += ["--library", args.library] if args.library else []
    text = run.make(
        args.out / "text", "Collect the text", [*collect, "--out"], piecemeal=True, show="words in"
    )
    learn: list[object] = ["python", here / "demo_pieces.py", "--text", text]
    return run.make(
        args.out / "pieces",
        "Learn a vocabulary and split the text into pieces",
        [*learn, "--vocabulary", args.vocabulary, "--out"],
        piecemeal=True,
        show="tokens in",
    )


@dataclass
class Seed:
    """The experiment for one seed.

    Attributes:
        run: runs the steps.
        data: folder that ``fairseq-preprocess`` wrote for each part.
        seed: of the models, and of nothing else.
    """

    run: Experiment
    data: dict[str, Path]
    seed: int

    def results(self) -> dict[str, Any]:
        """Perplexities of test, and processor seconds.

        Returns:
            ``small`` by part and ``large``: ``Row``s with the key ``seconds``, of making the
            datastore and its index; ``trained``: for both models, ``[seconds, perplexity]`` at each
            checkpoint.
        """
        part, args = self.run.args.lm_part, self.run.args
        small, large = self.train(part), self.train("1/1")
        return {
            "trained": {
                "small": list(self.along(part)),
                "large": list(self.along("1/1")),
            },
            "small": {known: self.remember(part, small, known) for known in args.parts},
            "large": self.remember("1/1", large, "1/1"),
        }

    def train(self, part: str) -> Path:
        """Trains a model on a part; its best checkpoint."""
        args = self.run.args
        flags = ["--seed", self.seed, "--max-update", args.updates]
        flags += ["--save-interval-updates", max(1, args.updates // args.points)]
        folder, label = self.run.out / f"lm-{self.label(part)}", self.label(part)
        return self.timed(folder, lambda: self.run.train(label, self.data[part], *flags))

    def along(self, part: str) -> Iterator[tuple[float, float]]:
        """Seconds until each checkpoint of a training, and the model's perplexity there."""
        folder, label = self.run.out / f"lm-{self.label(part)}", self.label(part)
        seconds = self.seconds(folder)
        # checkpoint_EPOCH_UPDATES.pt
        checkpoints = {int(f.stem.split("_")[2]): f for f in folder.glob("checkpoint_*_*.pt")}
        for updates, checkpoint in sorted(checkpoints.items()):
            perplexity = self.run.perplexity(f"{label}-{updates}", self.data["1/1"], checkpoint)
            yield seconds * updates / self.run.args.updates, perplexity

    def remember(self, trained: str, checkpoint: Path, part: str) -> dict[str, float]:
        """Perplexities of a model with a datastore of a part."""
        label, data = f"{self.label(trained)}-of-{name(part)}", self.data[part]
        folder = self.run.out / f"dstore-{label}"
        store = self.timed(folder, lambda: self.run.datastore(label, data, checkpoint))
        experts = ["--experts", ",".join(EXPERTS)]
        scores = self.run.scores(f"scores-{label}", data, checkpoint, store, *experts)
        return perplexities(scores) | {"seconds": self.seconds(folder)}

    def label(self, part: str) -> str:
        """The model's name in file names."""
        return f"{name(part)}-seed{self.seed}"

    def timed(self, path: Path, make: Callable[[], T]) -> T:
        """Notes the processor time of what makes ``path``, beside it."""
        if path.exists():
            return make()
        before = spent()
        made = make()
        path.with_suffix(".seconds").write_text(f"{spent() - before}\n")
        return made

    def seconds(self, path: Path) -> float:
        """What ``timed`` noted; NaN where it was interrupted."""
        note = path.with_suffix(".seconds")
        return float(note.read_text()) if note.exists() else float("nan")


def spent() -> float:
    """Processor seconds of the commands that have ended: a pause or other work does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def perplexities(scores: Scores) -> Row:
    """Of the model alone and with its memory, fitted on valid, on test."""
    fit = scores.fitter
    return {
        "alone": scores.base,
        "knn_fixed": scores.perplexity(fit.fixed(["knn"])),
        "knn_gate": scores.perplexity(fit.gate(["knn"])),
        "ngram_gate": scores.perplexity(fit.gate(["ngram"])),
        "both_gate": scores.perplexity(fit.gate(list(EXPERTS))),
    }


COLUMNS = {
    "alone": "alone",
    "knn_fixed": "kNN, fixed",
    "knn_gate": "kNN, gate",
    "ngram_gate": "n-grams, gate",
    "both_gate": "both, gate",
    "seconds": "s to remember",
}


def tables(found: list[dict[str, Any]], lm_part: str) -> None:
    """Prints mean and standard deviation over the seeds."""
    small = found[0]["small"]
    rows = {
        f"LM of {lm_part}, memory of {said(part)}": [one["small"][part] for one in found]
        for part in small
    } | {"LM of all, memory of all": [one["large"] for one in found]}
    print()
    show(
        ["test", *COLUMNS.values()],
        [
            [title, *(cell([row[key] for row in of]) for key in COLUMNS)]
            for title, of in rows.items()
        ],
    )
    print()
    show(
        ["training", "s", "perplexity"],
        [
            [f"LM of {lm_part if model == 'small' else 'all'}, checkpoint {number + 1}"]
            + [cell([one["trained"][model][number][n] for one in found]) for n in (0, 1)]
            for model in ("small", "large")
            for number in range(len(found[0]["trained"][model]))
        ],
    )


def cell(values: list[float]) -> str:
    """Mean, and standard deviation where there are several."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


if __name__ == "__main__":
    sys.exit(ended(main))
