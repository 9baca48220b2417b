"""Another domain without training for it (Khandelwal et al., 2020, section 4.3).

A language model of one domain is given a datastore of another and tested there. The bound is a
model of that other domain, named with --in-domain-path or else trained here with --train-flags.
"""

import argparse
import sys
from pathlib import Path

from scores import Axes, command, draw, only, show
from steps import Experiment, add_arguments, ended

EXAMPLE = """\
example: python examples/experiments/adaptation.py demo/data/reference
         --path demo/lm/checkpoint_best.pt --out adaptation
"""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = command(__doc__, EXAMPLE)
    option = parser.add_argument
    option("data", type=Path, help="the other domain, binarised with the model's dictionary")
    option("--path", type=Path, required=True, help="checkpoint of the language model")
    option("--in-domain-path", type=Path, help="checkpoint of a model of the other domain")
    add_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    run = Experiment.of(args, steps=6 - bool(args.in_domain_path))
    at_home = args.in_domain_path or run.train("in-domain", args.data)
    bound = run.perplexity("in-domain", args.data, at_home)
    store = run.datastore("in-domain", args.data, args.path)
    scores = run.scores("scores", args.data, args.path, store)
    mixer = scores.fitter.fixed(["knn"])
    knn, weight = only(mixer)
    adapted = scores.perplexity(mixer)
    found = {
        "LM of another domain": scores.base,
        "the same, datastore of this domain": adapted,
        "LM of this domain": bound,
    }
    print()
    show(
        ["test", "perplexity", "change"],
        [[name, f"{value:.2f}", scores.change(value)] for name, value in found.items()],
    )
    print(f"\nlambda {weight:.2f}, T {knn.setting['temperature']:.3g}")

    def paint(axes: Axes) -> None:
        axes[0].bar(["other LM", "with datastore", "in-domain LM"], list(found.values()))

    draw(args.out / "adaptation.png", paint)


if __name__ == "__main__":
    sys.exit(ended(main))
