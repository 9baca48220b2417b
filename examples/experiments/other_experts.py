"""Nearest neighbours against other experts (Khandelwal et al., 2020, section 6).

Each expert of the score tables alone with the language model: n-grams, the continuous cache, a
second model. Settings and lambda are fitted on valid.
"""

import sys
from pathlib import Path

from scores import Axes, Scores, add_table_arguments, command, draw, only, show
from steps import ended

EXAMPLE = """\
example: python examples/experiments/other_experts.py --valid valid.npz --test test.npz
"""
NAMES = {
    "knn": "nearest neighbours",
    "cache": "continuous cache",
    "ngram": "n-grams",
    "suffix": "suffixes of the text read",
    "lm2": "second model",
}


def report(scores: Scores, figure: Path) -> None:
    """Prints and draws what each expert gains."""
    gains, rows = {}, []
    for expert in scores.test.experts:
        mixer = scores.fitter.fixed([expert])
        perplexity = scores.perplexity(mixer)
        name = NAMES.get(expert, expert)
        gains[name] = scores.base - perplexity
        rows.append(
            [name, f"{only(mixer)[1]:.3f}", f"{perplexity:.2f}"]
            + [f"{gains[name]:.2f}", scores.change(perplexity)]
        )
    show(
        ["language model with", "lambda", "perplexity", "gain", "change"],
        [["nothing", "", f"{scores.base:.2f}", "", ""], *rows],
    )

    def paint(axes: Axes) -> None:
        axes[0].barh(list(gains), list(gains.values()))
        axes[0].invert_yaxis()
        axes[0].set_xlabel(f"gain, of a perplexity of {scores.base:.1f}")

    draw(figure, paint, up="")


def main() -> None:
    parser = command(__doc__, EXAMPLE)
    add_table_arguments(parser, "other_experts.png")
    args = parser.parse_args()
    report(Scores.read(args.valid, args.test), args.figure)


if __name__ == "__main__":
    sys.exit(ended(main))
