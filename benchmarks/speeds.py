"""How fast whole commands are: each run is a process, timed by what it reports of itself."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from common.commands import RunError
from material import PLUGIN, ROOT, Material
from measure import Rates, interleaved
from perplexity import Fitted
from shell import Report

#: Lines that warm the caches up, and show that losses agree.
WARM_UP = 50
#: Of the fourth decimal of a loss, which is the last that fairseq prints.
ONE_DIGIT = 1.001e-4
#: By how much of a bit the loss may change where the layers compute in bfloat16.
BFLOAT16_COSTS = 5e-4
#: At the end of a name: the layers compute in bfloat16.
BFLOAT16 = "_bfloat16"
#: How names of runs begin that ask all experts, once the mixture is fitted.
MIXED = ("mixture", "skipping", "table", "lean")


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
        #: Of the mixture in the last run of a name.
        self.perplexities: dict[str, float] = {}

    def measure(self, names: Sequence[str], rounds: int) -> Rates:
        """Tokens a second of some of these, round by round, once their losses are known to agree:

        ``stock``, the stock scorer; ``base``, the plugin's; ``knn``; ``save``, a datastore;
        ``forward``, the model up to its features; ``mixture``, the one that was fitted over all
        experts; ``skipping``, the same with half of the searches left out; ``lean``, the best one
        of those that are fast; ``table``, all columns of a score table. With ``_bfloat16``: that is
        what the layers compute in.
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
        if name.startswith("save"):
            shutil.rmtree(self._saved)
        if "--results-json" in command:  # fairseq's own line is of the mixture
            found = json.loads(self._results.read_text())
            self.perplexities[name] = found["perplexity"]
            report = Report(**vars(report) | {"loss": f"{found['base_loss']:.4f}"})
        self.reports.setdefault(name, []).append(report)
        return report

    def _check(self) -> None:
        """Refuses rivals that did not do the same.

        Raises:
            RunError: where losses differ by more than the fourth decimal's rounding, or tokens.
        """
        reports = {
            name: run for name, runs in self.reports.items() if name != "forward" for run in runs
        }
        tokens = {report.tokens for report in reports.values()}
        expected = next(r.loss for name, r in reports.items() if not name.endswith(BFLOAT16))
        for name, report in reports.items():
            allowed = BFLOAT16_COSTS if name.endswith(BFLOAT16) else ONE_DIGIT
            if abs(float(report.loss) - float(expected)) > allowed or len(tokens) > 1:
                losses = {name: report.loss for name, report in reports.items()}
                raise RunError(f"the evaluations differ: losses {losses}, tokens {tokens}")

    def _command(self, name: str, lines: int) -> list[object]:
        stock = self.material.stock("test", lines)
        if name == "stock":
            return stock
        if name == "forward":
            return [sys.executable, ROOT / "benchmarks/forward.py", *stock[1:]]
        plain = name.removesuffix(BFLOAT16)
        options: dict[str, Callable[[], list[object]]] = {
            "base": list,
            "save": lambda: ["--save-knnlm-dstore", "--dstore-mmap", self._saved],
            "knn": self._neighbours,
            "mixture": self._mixture,
            "skipping": lambda: [*self._mixture(), "--skip-searches", 0.5],
            "lean": self._lean,
            "table": lambda: self.material.table_flags(self.material.folder / "timed.npz"),
        }
        precision = ["--lm-dtype", "bfloat16"] if name.endswith(BFLOAT16) else []
        return [*stock, *PLUGIN, *precision, *options[plain]()]

    def _neighbours(self) -> list[object]:
        assert self.fitted is not None
        return [*fixed_mixture(self.material, self.fitted), "--results-json", self._results]

    def _mixture(self) -> list[object]:
        return [*self.material.every_expert(), "--mixer", "gate", "--results-json", self._results]

    def _lean(self) -> list[object]:
        return [*self.material.neighbours(self.material.lean()), "--results-json", self._results]

    def seconds(self, name: str, split: str) -> float:
        """Seconds that a run takes on a whole split, once."""
        report = self.material.shell.evaluate(f"{name}-{split}", self.material.stock(split))
        return report.tokens / report.rate

    @property
    def _results(self) -> Any:
        return self.material.folder / "knn.json"

    @property
    def _saved(self) -> Any:
        return self.material.folder / "timed-save"


def fixed_mixture(material: Material, fitted: Fitted) -> list[object]:
    """The flags of a kNN-LM with the automatic index, the same weight everywhere."""
    return [*material.neighbours(), "--lmbda", fitted.lmbda, "--knn-temp", fitted.temperature]
