"""The figures of the benchmark, and how each of them is measured."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from common.commands import RunError
from material import Material
from measure import Figure, Rates, Ratio, interleaved, summary
from memory import peaks
from perplexity import Perplexities
from rivals import UNEXAMINED, Searches
from speeds import MIXED, Speeds
from writers import Texts, Writing

from fairseq_knnlm.errors import KnnlmError
from fairseq_knnlm.experts.contract import Timeless

#: Those of a kind are measured together, in this order.
FIGURES = {
    "search_over_published": Figure(
        "search", "ours", "published", "queries/s", ("ours", "published")
    ),
    "search_over_ivfpq": Figure("search", "ours", "ivfpq", "queries/s", ("ours", "ivfpq")),
    "exact_over_published": Figure(
        "search", "ours_exact", "published", "queries/s", ("ours_exact", "exact")
    ),
    "base_over_stock": Figure("command", "base", "stock", "tokens/s"),
    "knn_over_stock_base": Figure(
        "command", "knn", "stock", "tokens/s", ("ours", "exact"), least=1.7
    ),
    "mixture_over_stock": Figure("command", "mixture", "stock", "tokens/s", least=1.2),
    "lean_over_stock": Figure("command", "lean", "stock", "tokens/s", least=1.5),
    "skipping_over_searching": Figure("command", "skipping", "mixture", "tokens/s", least=1),
    "table_over_stock": Figure("command", "stock", "table", "tokens/s", most=0.9),
    "saving_over_forward": Figure("command", "save", "base", "tokens/s"),
    "bfloat16_base_over_stock": Figure("command", "base_bfloat16", "stock", "tokens/s", least=4),
    "bfloat16_knn_over_stock": Figure("command", "knn_bfloat16", "stock", "tokens/s", least=2.8),
    "bfloat16_mixture_over_stock": Figure(
        "command", "mixture_bfloat16", "stock", "tokens/s", least=2
    ),
    "bfloat16_saving_over_stock": Figure(
        "command", "save_bfloat16", "stock", "tokens/s", least=3.5
    ),
    "tune_over_stock": Figure("tuning", "tune", "stock", "seconds", most=0.6),
    "generate_over_stock": Figure("writing", "plain_16", "stock_16", "tokens/s"),
    "speculate_over_stock": Figure("writing", "speculating_1", "stock_1", "tokens/s"),
    "build_over_paper": Figure("build", "auto", "paper", "seconds"),
    "bytes_per_entry": Figure("size", "streamed", "", "bytes", ("streamed", "exact")),
    "l2_memory": Figure("memory", "l2", "", "GiB"),
    "help_over_numpy": Figure("start", "help", "numpy", "seconds"),
    "info_over_numpy": Figure("start", "info", "numpy", "seconds"),
}
#: Bytes read at a time to bring a file into memory.
READ_BYTES = 2**24


@dataclass(frozen=True)
class Repeats:
    """How often things are timed.

    Attributes:
        rounds: of whole commands.
        searches: of all sampled queries of test.
        builds: of indexes.
    """

    rounds: int
    searches: int
    builds: int


class Bench:
    """Measures figures.

    Args:
        material: what is worked on.
        repeats: how often.
        texts: what is written.
    """

    def __init__(self, material: Material, repeats: Repeats, texts: Texts) -> None:
        self.material = material
        self.repeats = repeats
        self.searches = Searches(material, material.choice.k)
        self.perplexities = Perplexities(material, self.searches)
        self.speeds = Speeds(material)
        self.writing = Writing(material, self.perplexities, texts)
        self.peaks: dict[str, float] = {}

    def measure(self, wanted: Sequence[str], done: Callable[[dict[str, Any]], None]) -> bool:
        """Measures figures by name; ``done`` is given the entries of each kind as they are known.

        Returns:
            Whether all could be measured; the entries of others say what was in the way.
        """
        whole = True
        for kind in dict.fromkeys(figure.kind for figure in FIGURES.values()):
            chosen = {n: f for n, f in FIGURES.items() if n in wanted and f.kind == kind}
            try:
                entries = self._entries(kind, chosen) if chosen else {}
            except (RunError, KnnlmError) as error:
                whole = False
                print(f"\n{error}\n", file=sys.stderr)
                entries = {name: {"value": None, "error": str(error)} for name in chosen}
            done(entries)
        return whole

    def _entries(self, kind: str, chosen: dict[str, Figure]) -> dict[str, Any]:
        compared = {n: self.perplexities.compare(*f.led_to) for n, f in chosen.items() if f.led_to}
        names = dict.fromkeys(name for f in chosen.values() for name in (f.over, f.under) if name)
        measure = {
            "search": self._searches,
            "command": self._commands,
            "writing": self._writing,
            "tuning": self._tuning,
            "build": self._builds,
            "size": self._sizes,
            "memory": self._memory,
            "start": self._starts,
        }
        rates = measure[kind](list(names))
        entries = {name: figure.entry(rates) for name, figure in chosen.items()}
        for name, comparison in compared.items():
            entries[name]["perplexity"] = comparison
        if kind == "memory":
            entries["l2_memory"]["by_k_and_width"] = self.peaks
        if kind == "command":
            for name, figure in chosen.items():
                entries[name] |= self._beside(figure, rates)
        if kind == "writing":
            for name, figure in chosen.items():
                entries[name] |= self.writing.beside(figure, rates)
        return entries

    def _searches(self, names: Sequence[str]) -> Rates:
        """Queries a second, in such batches of the test sample as an evaluation makes."""
        batches = self.perplexities.samples["test"].keys.split(Timeless.at_a_time)
        if "published" in names:
            self.searches.check_published(batches[0])

        def rate(name: str, _: int) -> float:
            return self.searches.rate(name, batches)

        return interleaved(
            {name: partial(rate, name) for name in names}, self.repeats.searches, "searches"
        )

    def _commands(self, names: Sequence[str]) -> Rates:
        """Tokens a second, as ``fairseq-eval-lm`` reports them."""
        if {"knn", "knn_bfloat16"} & set(names):
            self.speeds.fitted = self.perplexities.of("ours")
        if any(name.startswith(MIXED) for name in names):
            self.material.calibrated()
        if "lean" in names:
            self.material.lean()
        if "save" in names:
            names = [*names, "forward"]
        return self.speeds.measure(names, self.repeats.rounds)

    def _beside(self, figure: Figure, rates: Rates) -> dict[str, Any]:
        """What else is worth knowing of two commands."""
        names = (figure.over, figure.under)
        found: dict[str, Any] = {
            "wall_seconds": {name: summary(self.speeds.wall(name)) for name in names},
            "peak_gib_by_tokens": {name: self.speeds.peaks(name) for name in names},
            "base_loss": {name: self.speeds.loss(name) for name in names},
            "lines": self.material.choice.lines or "all",
            "tokens": self.speeds.tokens,
        }
        if figure.over in self.speeds.perplexities:
            found["perplexity_of_run"] = self.speeds.perplexities[figure.over]
        if figure.over == "save":
            features = Ratio.of(rates["save"], rates["forward"])
            found["over_features_alone"] = {
                "value": features.value,
                "spread": [features.low, features.high],
                "rates": {"features": summary(rates["forward"])},
            }
        return found

    def _tuning(self, names: Sequence[str]) -> Rates:
        """Seconds that fitting takes, and those of the stock scorer on the same tokens, once."""
        self.material.calibrated()
        took = {"tune": self.material.tune, "stock": lambda: self.speeds.seconds("stock", "valid")}
        return {name: [took[name]()] for name in names}

    def _writing(self, names: Sequence[str]) -> Rates:
        """Tokens a second that follow prompts."""
        return self.writing.measure(names, self.repeats.rounds)

    def _builds(self, names: Sequence[str]) -> Rates:
        """Seconds of training and adding; indexes are not examined."""
        with (self.material.store.path / "keys.npy").open("rb") as file:
            while file.read(READ_BYTES):  # so that the first to build does not read for the others
                pass

        def seconds(name: str, _: int) -> float:
            started = time.perf_counter()
            self.material.build(name, UNEXAMINED)
            return time.perf_counter() - started

        return interleaved(
            {name: partial(seconds, name) for name in names}, self.repeats.builds, "builds"
        )

    def _sizes(self, names: Sequence[str]) -> Rates:
        """Bytes an entry of everything in the folder."""
        files = (path for path in self.material.streamed().rglob("*") if path.is_file())
        size = sum(file.stat().st_size for file in files)
        return {name: [size / len(self.material.store)] for name in names}

    def _memory(self, names: Sequence[str]) -> Rates:
        """GiB that distances recomputed on the keys take at most, whatever k and width."""
        self.peaks = peaks()
        return {name: [max(self.peaks.values())] for name in names}

    def _starts(self, names: Sequence[str]) -> Rates:
        """Seconds of commands that have next to nothing to do, from their start to their end."""
        commands: dict[str, list[object]] = {
            "help": ["fairseq-knnlm", "--help"],
            "info": ["fairseq-knnlm", "info", "--dstore", self.material.store.path],
            "numpy": ["python", "-c", "import numpy"],
        }

        def seconds(name: str, _: int) -> float:
            return self.material.shell.seconds(f"start-{name}", commands[name])

        for name in names:
            seconds(name, 0)  # brings its files into memory
        return interleaved(
            {name: partial(seconds, name) for name in names}, self.repeats.searches, "starts"
        )
