"""Remembering the training data (Khandelwal et al., 2020, section 4.1).

A datastore of the text that the language model was trained on: untuned, as the paper begins; with
lambda and temperature fitted on valid; and with a learned gate.
"""

import sys

import numpy as np
from scores import Axes, Scores, add_table_arguments, command, draw, only, show, weighed
from steps import ended

from fairseq_knnlm.experts.knn import KnnSetting
from fairseq_knnlm.mixture.components import Component

EXAMPLE = """\
example: python examples/experiments/training_data.py --valid valid.npz --test test.npz
"""
#: Where the paper stands before anything is fitted.
LAMBDA, TEMPERATURE = 0.25, 1.0
LAMBDAS = np.linspace(0, 0.8, 33)


def main() -> None:
    parser = command(__doc__, EXAMPLE)
    add_table_arguments(parser, "training_data.png")
    args = parser.parse_args()
    scores = Scores.read(args.valid, args.test)

    untuned = Component("knn", vars(KnnSetting(temperature=TEMPERATURE)))
    tuned, weight = only(fixed := scores.fitter.fixed(["knn"]))
    fitted = f"T {tuned.setting['temperature']:.3g}"
    found = {
        "language model": scores.base,
        f"kNN, untuned: T {TEMPERATURE:g}, lambda {LAMBDA:g}": scores.perplexity(
            weighed(untuned, LAMBDA)
        ),
        f"kNN, tuned: {fitted}, lambda {weight:.2f}": scores.perplexity(fixed),
        "kNN, learned gate": scores.perplexity(scores.fitter.gate(["knn"])),
    }
    show(
        ["test", "perplexity", "change"],
        [[name, f"{value:.2f}", scores.change(value)] for name, value in found.items()],
    )
    base, at_first, at_best, gated = found.values()
    if at_first > base:
        print("\nwarning: untuned, the datastore is worse than none")

    def paint(axes: Axes) -> None:
        for component, label in ((untuned, f"T {TEMPERATURE:g}"), (tuned, fitted)):
            curve = [scores.perplexity(weighed(component, float(x))) for x in LAMBDAS]
            axes[0].plot(LAMBDAS, curve, label=label)
        axes[0].plot([LAMBDA, weight], [at_first, at_best], "o", color="black")
        axes[0].axhline(base, color="0.5", linestyle=":", label="language model")
        axes[0].axhline(gated, color="C2", linestyle="--", label="learned gate")
        axes[0].set_ylim(top=1.5 * base)
        axes[0].set_xlabel("lambda")
        axes[0].legend()

    draw(args.figure, paint)


if __name__ == "__main__":
    sys.exit(ended(main))
