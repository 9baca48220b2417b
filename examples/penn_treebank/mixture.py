"""A mixture of models that others trained, from the probabilities that they published.

FOLDER has, for valid and for test, an array a model of the log-probabilities of all words
(valid.npz), and the words, one a line, ends of lines included (valid.words); the training text
may lie there too (train.words). The steps are those that one would type: columns, columns, tune,
report. Then a table says what each part adds: everything is fitted on valid, and test is looked at
once, at the end.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Also from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.commands import RunError, Steps, environment

from fairseq_knnlm.calibration.fitter import Fitter
from fairseq_knnlm.calibration.gates import fit_gate
from fairseq_knnlm.calibration.losses import mean_loss
from fairseq_knnlm.calibration.stored import Calibration, read_calibration
from fairseq_knnlm.calibration.table import ScoreTable, read_table
from fairseq_knnlm.cli.tables import show
from fairseq_knnlm.errors import KnnlmError
from fairseq_knnlm.mixture.mixers import Mixer

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = "example: python examples/penn_treebank/mixture.py ptb-columns --out ptb"
TRAINING_TEXT = "train.words"
#: Features of a gate, by the ends of their names, in the order in which they are added.
FEATURES = {
    "how often the last words were met": ("_met", "_length", "_count", "_types"),
    "how each did on the last token": ("_last",),
    "how each did on the last few": ("_lately",),
    "how each did after the same word": ("_after",),
}


def best_first(folder: Path) -> dict[str, str]:
    """The models, the best of valid first: their arrays' names, by names that a column can have.

    Raises:
        RunError: where there are none.
    """
    try:
        with np.load(folder / "valid.npz", allow_pickle=False) as archive:
            losses = {name: -float(archive[name].mean()) for name in archive.files}
    except (OSError, ValueError) as error:
        raise RunError(f"{folder} has no valid.npz that can be read: {error}") from None
    arrays = sorted(losses, key=lambda name: losses[name])
    named = {re.sub(r"^[^a-z]+|[^a-z0-9]", "", array.lower()): array for array in arrays}
    if "" in named or len(named) < len(arrays):
        raise RunError(f"names that letters and digits do not tell apart: {', '.join(arrays)}")
    return named


def run_commands(folder: Path, out: Path, models: dict[str, str]) -> None:
    """Tables, calibration and report, each command shown as one would type it."""
    env = environment()
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
    steps = Steps(4, out / "logs", env)
    training = folder / TRAINING_TEXT
    ngrams = ["--training-text", training] if training.exists() else []
    for split in ("valid", "test"):
        flags: list[object] = []
        for name, array in models.items():
            flags += ["--column", f"{name}={folder / split}.npz:{array}"]
        words = ["columns", folder / f"{split}.words", *flags, *ngrams]
        table = ["--out", out / f"{split}.npz"]
        steps.run(f"Score table of {split}", ["fairseq-knnlm", *words, *table], show=r"^\|")
    place = ["--calibration", out / "calibration.json"]
    for title, split in (("tune", "valid"), ("report", "test")):
        words = [title, *place, "--score-table", out / f"{split}.npz"]
        words += ["--results-json", out / "report.json"] if title == "report" else []
        steps.run(f"{title} on {split}".capitalize(), ["fairseq-knnlm", *words], show=r"^\|")


@dataclass
class Figures:
    """What mixtures do on both texts.

    Attributes:
        valid: the table that they are fitted on.
        test: the table that they are reported on.
        fitter: fits more of them.
    """

    valid: ScoreTable
    test: ScoreTable
    fitter: Fitter

    def row(self, name: str, mixer: Mixer) -> tuple[str, ...]:
        """Perplexities: of the part of valid that nothing was fitted or chosen on, and of test."""
        held_out = mean_loss(self.valid, mixer, self.fitter.parts.report)
        return name, f"{math.exp(held_out):.2f}", f"{math.exp(mean_loss(self.test, mixer)):.2f}"

    def rows(self, fitted: Calibration) -> Iterator[tuple[str, ...]]:
        """The best model, then what is added to it."""
        every = list(self.test.experts)
        models = [name for name in every if name not in ("history", "ngram")]
        yield self.row("the best model alone", fitted.mixtures[0].mixer)
        for experts, kind, name in (
            (models, "fixed", "all models, fixed weights"),
            (every, "blend", "and the text read so far, fixed weights"),
        ):
            if (mixture := fitted.find(experts, kind)) is not None:
                yield self.row(name, mixture.mixer)
        last = fitted.find(every, "gate")
        if last is not None:
            yield from self.gates(every, last.mixer)
        yield self.row(f"what tune chose: {fitted.best.name}", fitted.best.mixer)

    def gates(self, experts: list[str], last: Mixer) -> Iterator[tuple[str, ...]]:
        """A gate for each group of features and those before it."""
        ends: tuple[str, ...] = ()
        for what, more in FEATURES.items():
            ends += more
            features = [name for name in last.features if name.endswith(ends)]
            fit, stop = self.fitter.examples(last.components, features)
            gate = fit_gate(last.components, features, fit, stop, seed=0, abstain=last.abstain)
            yield self.row(f"a gate by {what}" if ends == more else f"+ {what}", gate)


def main() -> int:
    """Runs the commands and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of the columns")
    parser.add_argument(
        "--out", type=Path, default=Path("ptb"), help="folder to make (default: ptb)"
    )
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        run_commands(args.folder, args.out, best_first(args.folder))
        valid, test = (read_table(args.out / f"{split}.npz") for split in ("valid", "test"))
        fitted = read_calibration(args.out / "calibration.json", [])
        assert fitted is not None  # it was just written
        print("\nPerplexity, all fitted on valid:")
        found = Figures(valid, test, Fitter(valid))
        show(("what is mixed", "valid, held out", "test"), list(found.rows(fitted)))
    except (RunError, KnnlmError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
