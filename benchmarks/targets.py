"""What the plugin should reach, and how each of it is measured."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from commands import BenchError
from material import Material
from measure import Rates, Ratio, Target, interleaved, summary
from memory import peaks
from perplexity import Perplexities
from rivals import UNEXAMINED, Searches
from speeds import Speeds

from fairseq_knnlm.errors import KnnlmError
from fairseq_knnlm.experts.contract import Timeless

#: Those of a kind are measured together, in this order.
TARGETS = {
    "search_over_published": Target(
        "search", "ours", "published", "queries/s", 20, within=("ours", "published", 0.002)
    ),
    "search_over_ivfpq": Target(
        "search", "ours", "ivfpq", "queries/s", 5, within=("ours", "ivfpq", 0.002)
    ),
    "exact_over_published": Target(
        "search", "ours_exact", "published", "queries/s", 8, within=("ours_exact", "exact", 0.003)
    ),
    "base_over_stock": Target("command", "base", "stock", "tokens/s", 1.7),
    "knn_over_stock_base": Target(
        "command", "knn", "stock", "tokens/s", 1.2, within=("ours", "exact", 0.01)
    ),
    "saving_over_forward": Target("command", "save", "base", "tokens/s", 0.95),
    "build_over_paper": Target("build", "auto", "paper", "seconds", at_most=1 / 3),
    "bytes_per_entry": Target(
        "size", "streamed", "", "bytes", at_most=80, within=("streamed", "exact", 0.01)
    ),
    "l2_memory": Target("memory", "l2", "", "GiB", at_most=0.25),
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
    """Measures targets.

    Args:
        material: what is worked on.
        repeats: how often.
    """

    def __init__(self, material: Material, repeats: Repeats) -> None:
        self.material = material
        self.repeats = repeats
        self.searches = Searches(material, material.choice.k)
        self.perplexities = Perplexities(material, self.searches)
        self.speeds = Speeds(material)
        self.peaks: dict[str, float] = {}

    def measure(self, wanted: Sequence[str], done: Callable[[dict[str, Any]], None]) -> bool:
        """Measures targets by name; ``done`` is given the entries of each kind as they are known.

        Returns:
            Whether all could be measured; the entries of others say what was in the way.
        """
        whole = True
        for kind in dict.fromkeys(target.kind for target in TARGETS.values()):
            chosen = {n: t for n, t in TARGETS.items() if n in wanted and t.kind == kind}
            try:
                entries = self._entries(kind, chosen) if chosen else {}
            except (BenchError, KnnlmError) as error:
                whole = False
                print(f"\n{error}\n", file=sys.stderr)
                failed = {"value": None, "met": False, "error": str(error)}
                entries = {name: {**failed, "target": t.bound} for name, t in chosen.items()}
            done(entries)
        return whole

    def _entries(self, kind: str, chosen: dict[str, Target]) -> dict[str, Any]:
        compared = {n: self.perplexities.compare(*t.within) for n, t in chosen.items() if t.within}
        names = dict.fromkeys(name for t in chosen.values() for name in (t.over, t.under) if name)
        measure = {
            "search": self._searches,
            "command": self._commands,
            "build": self._builds,
            "size": self._sizes,
            "memory": self._memory,
        }
        rates = measure[kind](list(names))
        entries = {name: target.entry(rates) for name, target in chosen.items()}
        for name, comparison in compared.items():
            entries[name] |= {
                "met": entries[name]["met"] and comparison["within"],
                "perplexity": comparison,
            }
        if kind == "memory":
            entries["l2_memory"]["by_k_and_width"] = self.peaks
        if kind == "command":
            for name, target in chosen.items():
                entries[name] |= self._beside(target, rates)
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
        if "knn" in names:
            self.speeds.fitted = self.perplexities.of("ours")
        if "save" in names:
            names = [*names, "forward"]
        return self.speeds.measure(names, self.repeats.rounds)

    def _beside(self, target: Target, rates: Rates) -> dict[str, Any]:
        """What else is worth knowing of two commands."""
        names = (target.over, target.under)
        found: dict[str, Any] = {
            "wall_seconds": {name: summary(self.speeds.wall(name)) for name in names},
            "peak_gib_by_tokens": {name: self.speeds.peaks(name) for name in names},
            "base_loss": {name: self.speeds.loss(name) for name in names},
            "lines": self.material.choice.lines or "all",
            "tokens": self.speeds.tokens,
        }
        if target.over == "knn":
            found["perplexity_of_run"] = self.speeds.knn_perplexity
        if target.over == "save":
            features = Ratio.of(rates["save"], rates["forward"])
            found["over_features_alone"] = {
                "value": features.value,
                "spread": [features.low, features.high],
                "rates": {"features": summary(rates["forward"])},
            }
        return found

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
        size = sum(file.stat().st_size for file in self.material.streamed().iterdir())
        return {name: [size / len(self.material.store)] for name in names}

    def _memory(self, names: Sequence[str]) -> Rates:
        """GiB that distances recomputed on the keys take at most, whatever k and width."""
        self.peaks = peaks()
        return {name: [max(self.peaks.values())] for name in names}
