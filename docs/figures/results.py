#!/usr/bin/env python3
"""Draws results.svg, the picture of README, from README's table under "What you get".

    python docs/figures/results.py

It needs matplotlib. Bars carry their names and figures, and colours stand out on light and on dark
pages.
"""

import re
import textwrap
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
README = HERE.parents[1] / "README.md"

COLOURS = ("#6e7781", "#2f6feb", "#1a7f37")
#: Of what stands beside the bars: as far from white as from the darkest page.
TEXT = "#768390"
HEIGHT, GAP = 0.86, 0.75


def table() -> tuple[list[str], list[tuple[str, list[float]]]]:
    """The names of the columns, and of each row its name and figures."""
    _, text = README.read_text(encoding="utf-8").split("## What you get\n")
    header, _, *lines = re.findall(r"^\|.*\|$", text, flags=re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    names = [cell.strip() for cell in header.strip("|").split("|")]
    return names[1:], [(name, [float(cell) for cell in cells]) for name, *cells in rows]


def draw(path: Path) -> None:
    """Writes the picture: a group of bars for each text."""
    matplotlib.rcParams.update(
        {
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans"],
            "svg.fonttype": "none",
            "svg.hashsalt": "results",
        }
    )
    names, rows = table()
    figure = Figure(figsize=(9, 3.9))
    FigureCanvasSVG(figure)
    axes = figure.add_axes((0.2, 0.02, 0.71, 0.86))
    at = 0.0
    for text, figures in rows:
        places = [at + number for number in range(len(figures))]
        axes.barh(places, figures, height=HEIGHT, color=COLOURS)
        for place, name, value in zip(places, names, figures, strict=True):
            label = {"va": "center_baseline", "fontsize": 10.5}
            axes.text(1.5, place, name, color="white", **label)
            axes.text(value + 1.5, place, f"{value:.2f}", color=TEXT, weight="bold", **label)
        label = {"va": "center", "ha": "right", "fontsize": 11, "linespacing": 1.4}
        axes.text(-3, at + 1, textwrap.fill(text, 20), color=TEXT, **label)
        at += len(figures) + GAP
    axes.set(xlim=(0, max(max(figures) for _, figures in rows)), ylim=(at - GAP - 0.5, -0.5))
    axes.axis("off")
    figure.text(
        0.2,
        0.925,
        "Perplexity of test text (lower is better)",
        color=TEXT,
        fontsize=12,
        weight="bold",
    )
    figure.savefig(path, format="svg", transparent=True, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    draw(HERE / "results.svg")
    print(HERE / "results.svg")
