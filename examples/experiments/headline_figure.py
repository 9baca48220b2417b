"""The figure of ``headline.py``: means over seeds, with bars of a standard deviation."""

import statistics
from dataclasses import dataclass
from typing import Any

from scaling import said, share
from scores import log_axis

LINES = {"knn_fixed": "kNN, fixed", "knn_gate": "kNN, gate", "both_gate": "kNN and n-grams, gate"}


@dataclass(frozen=True)
class Curves:
    """What was found.

    Attributes:
        found: ``Seed.results`` of each seed.
        parts: in the datastores, growing.
        lm_part: that the small model was trained on.
    """

    found: list[dict[str, Any]]
    parts: list[str]
    lm_part: str

    def small(self, key: str) -> list[list[float]]:
        """Of each part, the seeds' values."""
        return [[one["small"][part][key] for one in self.found] for part in self.parts]

    def large(self, key: str) -> list[float]:
        """The seeds' values."""
        return [one["large"][key] for one in self.found]

    def trained(self, model: str) -> list[tuple[float, float]]:
        """Mean seconds and perplexity at each checkpoint."""
        runs = zip(*(one["trained"][model] for one in self.found), strict=True)
        return [(mean([p[0] for p in points]), mean([p[1] for p in points])) for points in runs]


def mean(values: list[float]) -> float:
    """The mean, and NaN where a value is."""
    return statistics.fmean(values)


def spread(values: list[float]) -> float:
    """The standard deviation; 0 of one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def paint_parts(axis: Any, curves: Curves) -> None:
    """Perplexity against the size of the datastore."""
    places = [share(part) for part in curves.parts]
    for number, (key, title) in enumerate(LINES.items()):
        values = curves.small(key)
        axis.errorbar(
            places,
            [mean(v) for v in values],
            [spread(v) for v in values],
            marker="o",
            capsize=3,
            color=f"C{number}",
            label=f"LM of {curves.lm_part}, {title}",
        )
    for number, key in enumerate(("alone", *LINES)):
        colour = "black" if key == "alone" else f"C{number - 1}"
        title = "alone" if key == "alone" else LINES[key]
        axis.axhline(
            mean(curves.large(key)), color=colour, linestyle="--", label=f"LM of all, {title}"
        )
    log_axis(axis, places, [said(part) for part in curves.parts])
    axis.set_xlabel("part of the text in the datastore")
    axis.legend(fontsize="x-small")


def paint_seconds(axis: Any, curves: Curves) -> None:
    """Perplexity against processor time: training, and then remembering."""
    large, small = curves.trained("large"), curves.trained("small")
    few = f"LM of {curves.lm_part}"
    axis.plot(*zip(*large, strict=True), marker=".", color="black", label="LM of all, training")
    axis.plot(
        *zip(*small, strict=True),
        marker=".",
        color="0.6",
        label=f"{few}, training",
    )
    start = small[-1][0]
    after = [start + mean(seconds) for seconds in curves.small("seconds")]
    for number, key in enumerate(("knn_gate", "both_gate"), start=1):
        axis.plot(
            [start, *after],
            [mean(curves.small("alone")[0]), *(mean(v) for v in curves.small(key))],
            marker="o",
            color=f"C{number}",
            label=f"{few}, remembering: {LINES[key]}",
        )
        axis.plot(
            [large[-1][0], large[-1][0] + mean(curves.large("seconds"))],
            [mean(curves.large("alone")), mean(curves.large(key))],
            marker="s",
            linestyle=":",
            color=f"C{number}",
            label=f"LM of all, remembering: {LINES[key]}",
        )
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:.0f}")
    axis.set_xlabel("processor seconds")
    axis.set_ylim(top=3 * axis.get_ylim()[1])  # above all curves there is room for their names
    axis.legend(fontsize="x-small", loc="upper right")
