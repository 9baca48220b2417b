"""How fast whole commands are: each run is a process, timed by what it reports of itself."""

import json
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from common.commands import RunError
from material import PLUGIN, ROOT, Material
from measure import Rates, interleaved
from perplexity import Fitted
from rivals import EXAMINED, FROM_INDEX
from shell import Report

#: Lines that warm the caches up, and show that losses agree.
WARM_UP = 50
#: Of the fourth decimal of a loss, which is the last that fairseq prints.
ONE_DIGIT = 1.001e-4


class Speeds:
    """Evaluations of the test split, or its first lines.

    Args:
        material: text and language model.
    """

    def __init__(self, material: Material) -> None:
        self.material = material
        self.reports: dict[str, list[Report]] = {}
        #: Those of the warm-up, on a few lines.
        self.warm_up: dict[str, list[Report]] = {}
        #: The mixture of ``knn``, which must be set before that runs.
        self.fitted: Fitted | None = None
        self.knn_perplexity = 0.0

    def measure(self, names: Sequence[str], rounds: int) -> Rates:
        """Tokens a second of some of these, round by round, once their losses are known to agree:

        ``stock``, the stock scorer; ``base``, the plugin's; ``knn``; ``save``, a datastore;
        ``forward``, the model up to its features.
        """
        for name in names:
            self._run(name, min(WARM_UP, self.material.choice.lines or WARM_UP))
        self._check()
        self.warm_up, self.reports = self.reports, {}
        lines = self.material.choice.lines
        runs = {name: partial(self._rate, name, lines) for name in names}
        rates = interleaved(runs, rounds, "evaluations")
        self._check()
        return rates

    def wall(self, name: str) -> list[float]:
        """Seconds of each run, from start to end."""
        return [report.wall for report in self.reports[name]]

    def peaks(self, name: str) -> dict[str, float]:
        """Most memory held, GiB, by the number of tokens scored: it should not grow with them."""
        peaks: dict[str, float] = {}
        for run in (*self.warm_up[name], *self.reports[name]):
            peaks[str(run.tokens)] = max(run.peak, peaks.get(str(run.tokens), 0.0))
        return peaks

    def loss(self, name: str) -> str:
        """Bits a token of the base LM, as a command reported it."""
        return self.reports[name][0].loss

    @property
    def tokens(self) -> int:
        """Tokens of one run."""
        return next(iter(self.reports.values()))[0].tokens

    def _rate(self, name: str, lines: int, _: int) -> float:
        return self._run(name, lines).rate

    def _run(self, name: str, lines: int) -> Report:
        command = self._command(name, lines)
        report = self.material.shell.evaluate(name, command)
        if name == "save":
            shutil.rmtree(self._saved)
        if name == "knn":  # fairseq's own line is of the mixture
            found = json.loads(self._results.read_text())
            self.knn_perplexity = found["perplexity"]
            report = Report(**vars(report) | {"loss": f"{found['base_loss']:.4f}"})
        self.reports.setdefault(name, []).append(report)
        return report

    def _check(self) -> None:
        """Refuses rivals that did not do the same.

        Raises:
            RunError: where losses differ by more than the fourth decimal's rounding, or tokens.
        """
        reports = [
            report for name, runs in self.reports.items() if name != "forward" for report in runs
        ]
        losses = [float(report.loss) for report in reports]
        tokens = {report.tokens for report in reports}
        if max(losses) - min(losses) > ONE_DIGIT or len(tokens) > 1:
            raise RunError(f"the evaluations differ: losses {set(losses)}, tokens {tokens}")

    def _command(self, name: str, lines: int) -> list[object]:
        stock = self.material.stock("test", lines)
        if name == "stock":
            return stock
        if name == "forward":
            return [sys.executable, ROOT / "benchmarks/forward.py", *stock[1:]]
        options: dict[str, list[Any]] = {
            "base": [],
            "save": ["--save-knnlm-dstore", "--dstore-mmap", self._saved],
        }
        return [*stock, *PLUGIN, *(self._neighbours() if name == "knn" else options[name])]

    def _neighbours(self) -> list[object]:
        assert self.fitted is not None
        return [*fixed_mixture(self.material, self.fitted), "--results-json", self._results]

    @property
    def _results(self) -> Any:
        return self.material.folder / "knn.json"

    @property
    def _saved(self) -> Any:
        return self.material.folder / "timed-save"


def fixed_mixture(material: Material, fitted: Fitted) -> list[object]:
    """The flags of a kNN-LM with the automatic index, the same weight everywhere."""
    store = ["--knnlm", "--dstore-filename", material.store.path]
    index = ["--indexfile", material.index_file("auto", EXAMINED), "--k", material.choice.k]
    mixture = ["--lmbda", fitted.lmbda, "--knn-temp", fitted.temperature]
    return [*store, *index, "--knn-sim-func", FROM_INDEX, *mixture]
