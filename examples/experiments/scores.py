"""Score tables of valid and test, what is fitted on the one and found on the other; tables and
figures to show it.
"""

import argparse
import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

# Also from a checkout that is not installed; and what the demo shares.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fairseq_knnlm.calibration.fitter import Fitter
from fairseq_knnlm.calibration.losses import mixture_losses
from fairseq_knnlm.calibration.table import ScoreTable, read_table
from fairseq_knnlm.cli.tables import show as show  # for the scripts, beside the rest of this
from fairseq_knnlm.errors import TableError
from fairseq_knnlm.files import publish
from fairseq_knnlm.mixture.components import LM, Component
from fairseq_knnlm.mixture.mixers import ALONE, Fixed, Mixer

#: matplotlib's, which may not be installed.
Axes = Sequence[Any]


@dataclass(frozen=True)
class Scores:
    """Two score tables of the same experts: fitted is on valid, reported on test.

    Attributes:
        valid: to fit on.
        test: to report on.
    """

    valid: ScoreTable
    test: ScoreTable

    @classmethod
    def read(cls, valid: Path, test: Path) -> "Scores":
        """Reads both.

        Raises:
            TableError: where one is no score table, or they are not of the same experts.
        """
        tables = read_table(valid), read_table(test)
        ours, theirs = ({key: table.card[key] for key in MUST_AGREE} for table in tables)
        if ours != theirs:
            raise TableError(
                "the score tables are not of the same experts",
                expected="one language model, its datastores and settings in both",
                found=", ".join(key for key in MUST_AGREE if ours[key] != theirs[key]) + " differ",
                do="write both with the same flags but --gen-subset and --score-table",
            )
        return cls(*tables)

    @cached_property
    def fitter(self) -> Fitter:
        """Fits mixers on valid."""
        return Fitter(self.valid)

    @cached_property
    def base(self) -> float:
        """Perplexity of the language model alone."""
        return self.perplexity(ALONE)

    def perplexity(self, mixer: Mixer) -> float:
        """Of a mixture, on test."""
        return math.exp(mixture_losses(self.test, mixer).mean())

    def change(self, perplexity: float) -> str:
        """Against the language model alone, such as ``-11.0%``; nothing for that itself."""
        return f"{perplexity / self.base - 1:+.1%}" if perplexity != self.base else ""


#: What a card says that both tables must say.
MUST_AGREE = ("model", "datastores", "described", "experts")


def weighed(component: Component, weight: float) -> Fixed:
    """One component beside the language model."""
    return Fixed((LM, component), (1 - weight, weight))


def only(mixer: Fixed) -> tuple[Component, float]:
    """The one component beside the language model, and its weight."""
    return mixer.components[1], mixer.weights[1]


def command(doc: str | None, example: str) -> argparse.ArgumentParser:
    """A script's parser: its docstring above the options, the example below, lines as they are."""
    return argparse.ArgumentParser(
        description=doc, epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_table_arguments(parser: argparse.ArgumentParser, figure: str) -> None:
    """``--valid``, ``--test`` and ``--figure``."""
    option = parser.add_argument
    option("--valid", type=Path, required=True, help="score table to fit on")
    option("--test", type=Path, required=True, help="score table to report on")
    option("--figure", type=Path, default=Path(figure), help=f"PNG to write (default: {figure})")


def draw(path: Path, paint: Callable[[Axes], None], plots: int = 1, up: str = "perplexity") -> None:
    """Writes a PNG of plots side by side, which ``paint`` fills; needs matplotlib.

    Args:
        path: the file.
        paint: told the plots' axes.
        plots: how many.
        up: what the vertical axis shows.
    """
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells of every font
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("\nno figure: it needs matplotlib (pip install matplotlib)")
        return
    figure = Figure(figsize=(1 + 4.5 * plots, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, plots, squeeze=False)[0]
    paint(axes)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    axes[0].set_ylabel(up)
    path.parent.mkdir(parents=True, exist_ok=True)
    with publish(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    print(f"\nfigure: {path}")


def log_axis(axis: Any, ticks: Sequence[float], labels: Sequence[str] | None = None) -> None:
    """A logarithmic axis with these ticks and no others."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, labels or [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
