"""How many neighbours, how much weight, what temperature (section 5 of Khandelwal et al., 2020).

One is varied, the others are fitted on valid for each of its values.
"""

import math
import sys

import numpy as np
from scores import Axes, Scores, add_table_arguments, command, draw, log_axis, show, weighed
from steps import ended

from fairseq_knnlm.calibration.fitting import best_lambda, best_setting, mixture_loss
from fairseq_knnlm.mixture.components import Component

EXAMPLE = """\
example: python examples/experiments/knn_settings.py --valid valid.npz --test test.npz
"""
LAMBDAS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
Curve = dict[float, tuple[Component, float]]


def main() -> None:
    parser = command(__doc__, EXAMPLE)
    add_table_arguments(parser, "knn_settings.png")
    args = parser.parse_args()
    scores = Scores.read(args.valid, args.test)
    curves = {"k": by_k(scores), "T": by_temperature(scores), "lambda": by_lambda(scores)}
    points = {
        name: {value: scores.perplexity(weighed(*best)) for value, best in curve.items()}
        for name, curve in curves.items()
    }
    print(f"language model alone: {scores.base:.2f}")
    for name, curve in curves.items():
        print()
        fitted = [other for other in ("lambda", "T") if other != name]
        rows = [
            [
                f"{value:.4g}",
                f"{points[name][value]:.2f}",
                *(said(*best)[other] for other in fitted),
            ]
            for value, best in curve.items()
        ]
        show([name, "perplexity", *fitted], rows)

    def paint(axes: Axes) -> None:
        for axis, (name, curve) in zip(axes, points.items(), strict=True):
            axis.plot(curve.keys(), curve.values(), marker=".")
            axis.axhline(scores.base, color="0.5", linestyle=":", label="language model")
            axis.set_ylim(top=1.15 * scores.base)
            axis.set_xlabel(name)
        log_axis(axes[0], list(points["k"]))
        log_axis(axes[1], [2.0**power for power in range(-2, 10, 2)])
        axes[0].legend()

    draw(args.figure, paint, plots=len(curves))


def said(component: Component, weight: float) -> dict[str, str]:
    """What was fitted, in words."""
    return {"lambda": f"{weight:.2f}", "T": f"{component.setting['temperature']:.3g}"}


def places(scores: Scores, k: int = 0) -> list[int]:
    """Places of the settings of the k nearest neighbours, without a suffix; 0 for all."""
    settings = scores.valid.experts["knn"]
    return [n for n, setting in enumerate(settings) if (setting["suffix"], setting["k"]) == (0, k)]


def best_of(scores: Scores, columns: list[int]) -> tuple[Component, float]:
    """The best of some settings on valid, and its lambda."""
    place, lmbda = best_setting(scores.valid["lm"], scores.valid["knn"][:, columns])
    return Component("knn", scores.valid.experts["knn"][columns[place]]), lmbda


def by_k(scores: Scores) -> Curve:
    """For each k the best temperature and lambda."""
    every = {setting["k"] for setting in scores.valid.experts["knn"]}
    most = scores.valid.card["k"]
    return {
        k or most: best_of(scores, places(scores, k))
        for k in sorted(every, key=lambda k: k or math.inf)
    }


def by_temperature(scores: Scores) -> Curve:
    """For each temperature the best lambda, with all neighbours."""
    settings, columns = scores.valid.experts["knn"], scores.valid["knn"]
    return {
        settings[place]["temperature"]: (
            Component("knn", settings[place]),
            best_lambda(scores.valid["lm"], columns[:, place]),
        )
        for place in places(scores)
    }


def by_lambda(scores: Scores) -> Curve:
    """For each lambda the best temperature, with all neighbours."""
    lm, settings = scores.valid["lm"], scores.valid.experts["knn"]
    whole = places(scores)
    found = {}
    for lmbda in LAMBDAS:
        losses = [mixture_loss(lm, scores.valid["knn"][:, place], lmbda) for place in whole]
        found[lmbda] = Component("knn", settings[whole[int(np.argmin(losses))]]), lmbda
    return found


if __name__ == "__main__":
    sys.exit(ended(main))
