"""The continuous cache on top of the neighbours (Khandelwal et al., 2020, section 4.1).

Score tables written with ``--experts knn,cache``: each alone and both together, with fixed weights
and with a learned gate.
"""

import sys

from scores import Axes, Scores, add_table_arguments, command, draw, show
from steps import ended

EXAMPLE = """\
example: python examples/experiments/continuous_cache.py --valid valid.npz --test test.npz
"""
STACKS = {"kNN": ["knn"], "cache": ["cache"], "kNN and cache": ["knn", "cache"]}


def main() -> None:
    parser = command(__doc__, EXAMPLE)
    add_table_arguments(parser, "continuous_cache.png")
    args = parser.parse_args()
    scores = Scores.read(args.valid, args.test)

    def pair(experts: list[str]) -> tuple[float, float]:
        fitter = scores.fitter
        return scores.perplexity(fitter.fixed(experts)), scores.perplexity(fitter.gate(experts))

    found = {"alone": (scores.base, scores.base)} | {
        name: pair(experts) for name, experts in STACKS.items()
    }
    rows = [
        [name, *(cell for value in values for cell in (f"{value:.2f}", scores.change(value)))]
        for name, values in found.items()
    ]
    show(["language model with", "fixed", "change", "gate", "change"], rows)

    def paint(axes: Axes) -> None:
        for number, label in enumerate(("fixed weights", "learned gate")):
            places = [place + 0.4 * number - 0.2 for place in range(len(found))]
            axes[0].bar(places, [values[number] for values in found.values()], 0.4, label=label)
        axes[0].set_xticks(range(len(found)), list(found))
        axes[0].legend()

    draw(args.figure, paint)


if __name__ == "__main__":
    sys.exit(ended(main))
