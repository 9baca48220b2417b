"""Training on less and remembering more (Khandelwal et al., 2020, section 4.2).

A language model is trained on a part of a text. With datastores of growing parts of it, its
perplexity is compared with that of a model trained on all.
"""

import argparse
import sys
from pathlib import Path

from scores import Axes, command, draw, log_axis, only, show
from steps import Experiment, add_arguments, ended, fraction, write_part

EXAMPLE = """\
example: python examples/experiments/scaling.py --trainpref text/train.txt
         --validpref text/valid.txt --testpref text/test.txt --out scaling --lm-part 1/4
"""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = command(__doc__, EXAMPLE)
    option = parser.add_argument
    for split in ("train", "valid", "test"):
        option(f"--{split}pref", type=Path, required=True, help=f"{split} text, in tokens")
    option("--srcdict", type=Path, help="dictionary (default: that of the train text)")
    add_parts(parser, lm_part="1/4")
    add_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    parts = sorted({*args.parts, args.lm_part, "1/1"}, key=share)
    run = Experiment.of(args, steps=len(parts) + 4 + 4 * len(args.parts))

    held_out = (args.validpref, args.testpref)
    data = binarise_parts(run, parts, args.trainpref, held_out, args.srcdict)
    whole = data["1/1"]
    small = run.train(name(args.lm_part), data[args.lm_part])
    large = run.train("1-1", whole)
    alone = run.perplexity(f"lm-{name(args.lm_part)}", whole, small)
    bound = run.perplexity("lm-1-1", whole, large)

    rows, points = [], {}
    for part in args.parts:
        store = run.datastore(name(part), data[part], small)
        found = run.scores(f"scores-{name(part)}", data[part], small, store)
        mixer = found.fitter.fixed(["knn"])
        points[share(part)] = found.perplexity(mixer)
        knn, weight = only(mixer)
        rows.append(
            [f"LM of {args.lm_part}, datastore of {said(part)}", f"{points[share(part)]:.2f}"]
            + [f"{weight:.2f}", f"{knn.setting['temperature']:.3g}"]
        )
    print()
    show(
        ["test", "perplexity", "lambda", "T"],
        [
            [f"LM of {args.lm_part} alone", f"{alone:.2f}", "", ""],
            *rows,
            ["LM of all alone", f"{bound:.2f}", "", ""],
        ],
    )

    def paint(axes: Axes) -> None:
        axis = axes[0]
        axis.plot(points.keys(), points.values(), marker="o", label=f"LM of {args.lm_part}, kNN")
        axis.axhline(alone, color="0.5", linestyle=":", label=f"LM of {args.lm_part} alone")
        axis.axhline(bound, color="black", linestyle="--", label="LM of all alone")
        log_axis(axis, list(points), [said(part) for part in args.parts])
        axis.set_xlabel("part of the text in the datastore")
        axis.legend()

    draw(args.out / "scaling.png", paint)


def add_parts(parser: argparse.ArgumentParser, lm_part: str) -> None:
    """Which parts of a text are trained on and remembered."""
    option = parser.add_argument
    option("--lm-part", type=fraction, default=lm_part, help=f"trained on (default: {lm_part})")
    parts = ["1/16", "1/8", "1/4", "1/2", "1/1"]
    told = f"in the datastores (default: {' '.join(parts)})"
    option("--parts", type=fraction, nargs="+", default=parts, help=told)


def binarise_parts(
    run: Experiment,
    parts: list[str],
    train: Path,
    held_out: tuple[Path, Path],
    dictionary: Path | None = None,
) -> dict[str, Path]:
    """Folders for fairseq of growing parts of a text, the last of them all: a step each.

    Args:
        run: the experiment.
        parts: such as ``["1/4", "1/1"]``.
        train: the text.
        held_out: valid and test, the same in each.
        dictionary: of all (default: that of the whole text).
    """
    # All of the text first: it has the dictionary.
    whole = run.binarise("1-1", train, *held_out, dictionary)
    some = {part: write_part(train, part, run.out / f"{name(part)}.txt") for part in parts[:-1]}
    return {
        part: run.binarise(name(part), text, *held_out, whole / "dict.txt")
        for part, text in some.items()
    } | {"1/1": whole}


def share(part: str) -> float:
    """``1/4`` as a number."""
    above, below = part.split("/")
    return int(above) / int(below)


def said(part: str) -> str:
    """``1/4`` as it is, ``1/1`` in words."""
    return "all" if part == "1/1" else part


def name(part: str) -> str:
    """``1/4`` as a part of a file's name."""
    return part.replace("/", "-")


if __name__ == "__main__":
    sys.exit(ended(main))
