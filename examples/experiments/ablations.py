"""What a key is, how far it looks back, how exact its distances are (section 5 of the paper).

One of three, each measured on test with lambda and temperature fitted on valid:

keys       a datastore for each kind of key (--choices)
context    a datastore for each number of tokens of context (--choices)
distances  one datastore, with the index's distances and with exact ones
"""

import argparse
import sys
from pathlib import Path

from scores import Axes, Scores, command, draw, only, show
from steps import Experiment, add_arguments, ended

from fairseq_knnlm.lm.keys import KEY_TYPES

EXAMPLE = """\
example: python examples/experiments/ablations.py keys data-bin --path checkpoint_best.pt
         --out keys --choices last_ffn_input decoder_output
"""
DISTANCES = {"from the index": "do_not_recomp_l2", "recomputed on the keys": "l2"}
WINDOWS = ["0", "64", "128", "192"]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = command(__doc__, EXAMPLE)
    option = parser.add_argument
    option("what", choices=("keys", "context", "distances"))
    option("data", type=Path, help="folder that fairseq-preprocess wrote; train is the datastore's")
    option("--path", type=Path, required=True, help="checkpoint of the language model")
    option(
        "--choices",
        nargs="+",
        help="kinds of key (default: all six), or context windows in tokens (default: "
        f"{' '.join(WINDOWS)})",
    )
    option("--block", type=int, default=64, help="tokens scored after a context (default: 64)")
    add_arguments(parser, trains=False)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    found = {"keys": keys, "context": context, "distances": distances}[args.what](args)
    rows, points = [], {}
    for name, scores in found.items():
        mixer = scores.fitter.fixed(["knn"])
        knn, weight = only(mixer)
        points[name] = perplexity = scores.perplexity(mixer)
        rows.append(
            [name, f"{scores.base:.2f}", f"{perplexity:.2f}", scores.change(perplexity)]
            + [f"{weight:.2f}", f"{knn.setting['temperature']:.3g}"]
        )
    print()
    show([args.what, "LM", "kNN-LM", "change", "lambda", "T"], rows)

    def paint(axes: Axes) -> None:
        places = range(len(found))
        axes[0].plot([scores.base for scores in found.values()], places, "o", label="LM")
        axes[0].plot(points.values(), places, "o", label="kNN-LM")
        axes[0].set_yticks(places, list(found))
        axes[0].invert_yaxis()
        axes[0].set_xlabel("perplexity")
        axes[0].legend()

    draw(args.out / f"{args.what}.png", paint, up="")


def keys(args: argparse.Namespace) -> dict[str, Scores]:
    """Scores with each kind of key."""
    choices = args.choices or list(KEY_TYPES)
    run = Experiment.of(args, steps=4 * len(choices))
    found = {}
    for choice in choices:
        flags = ["--knn-keytype", choice]
        store = run.datastore(choice, args.data, args.path, *flags)
        found[choice] = run.scores(choice, args.data, args.path, store, *flags)
    return found


def context(args: argparse.Namespace) -> dict[str, Scores]:
    """Scores with each number of tokens before a block, when saving as when scoring."""
    choices = args.choices or WINDOWS
    run = Experiment.of(args, steps=4 * len(choices))
    found = {}
    for choice in choices:
        # fairseq takes the context off the sample.
        flags = ["--context-window", choice, "--tokens-per-sample", int(choice) + args.block]
        store = run.datastore(choice, args.data, args.path, *flags)
        found[choice] = run.scores(choice, args.data, args.path, store, *flags)
    return found


def distances(args: argparse.Namespace) -> dict[str, Scores]:
    """Scores with the distances of the index, and with exact ones of the same neighbours."""
    run = Experiment.of(args, steps=2 + 2 * len(DISTANCES))
    store = run.datastore("train", args.data, args.path)
    return {
        name: run.scores(flag, args.data, args.path, store, "--knn-sim-func", flag)
        for name, flag in DISTANCES.items()
    }


if __name__ == "__main__":
    sys.exit(ended(main))
