"""Fair timing, and what is kept of it: rivals in turn, paired ratios, targets, the machine."""

import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
from demo_steps import usable_cores
from tqdm import tqdm

from fairseq_knnlm.files import write_json
from fairseq_knnlm.versions import versions

Rates = dict[str, list[float]]


def interleaved(
    rivals: Mapping[str, Callable[[int], float]], rounds: int, title: str, unit: str = " runs"
) -> Rates:
    """Measures rivals in turn, round after round, every other round backwards.

    A machine that is slower for a while is then slower for all of them.

    Args:
        rivals: by name; each is given the number of the round and returns what it measured.
        rounds: how many.
        title: of the bar that shows progress.
        unit: what the bar counts.

    Returns:
        What each rival measured, round by round.
    """
    found: Rates = {name: [] for name in rivals}
    with tqdm(total=rounds * len(rivals), desc=title, unit=unit) as bar:
        for number in range(rounds):
            for name in list(rivals)[:: 1 if number % 2 == 0 else -1]:
                bar.set_postfix_str(name)
                found[name].append(rivals[name](number))
                bar.update()
    return found


@dataclass(frozen=True)
class Ratio:
    """How many times ``over`` is ``under``: the median of the rounds' ratios, and their range."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, over: Sequence[float], under: Sequence[float]) -> "Ratio":
        pairs = [a / b for a, b in zip(over, under, strict=True)]
        return cls(statistics.median(pairs), min(pairs), max(pairs))


@dataclass(frozen=True)
class Target:
    """What a figure should be: a ratio of two rivals, or one rival's own.

    Attributes:
        kind: how it is measured.
        over: whose figure it is.
        under: whom it is compared with; empty for nobody.
        unit: of what is measured.
        at_least: the figure should not be below this.
        at_most: the figure should not be above this.
        within: a search, another, and the share by which its perplexity may be above that one's.
    """

    kind: str
    over: str
    under: str
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    within: tuple[str, str, float] | None = None

    @property
    def bound(self) -> dict[str, float]:
        bounds = {"at_least": self.at_least, "at_most": self.at_most}
        return {name: bound for name, bound in bounds.items() if bound is not None}

    def met(self, value: float) -> bool:
        high_enough = self.at_least is None or value >= self.at_least
        return high_enough and (self.at_most is None or value <= self.at_most)

    def entry(self, rates: Rates) -> dict[str, Any]:
        """What ``results.json`` says of it, perplexities aside."""
        rivals = [name for name in (self.over, self.under) if name]
        pairs = [rates[name] for name in rivals]
        ratio = Ratio.of(pairs[0], pairs[1] if self.under else [1.0] * len(pairs[0]))
        return {
            "value": ratio.value,
            "target": self.bound,
            "met": self.met(ratio.value),
            "spread": [ratio.low, ratio.high],
            "unit": self.unit,
            "rates": {name: summary(rates[name]) for name in rivals},
        }


def summary(rounds: Sequence[float]) -> dict[str, Any]:
    """The median of the rounds, and all of them."""
    return {"median": statistics.median(rounds), "rounds": list(rounds)}


def default_threads() -> int:
    """Those that OMP_NUM_THREADS allows, else one a core."""
    return int(os.environ.get("OMP_NUM_THREADS", usable_cores()))


def machine(threads: int) -> dict[str, Any]:
    """What was measured on."""
    return {
        "cpu": _cpu(),
        "cores": usable_cores(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "faiss_built_for": faiss.get_compile_options().strip(),
        "os": f"{_os()}, {platform.release()}",
        "load_before": [round(load, 2) for load in os.getloadavg()],
        **versions(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _os() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return platform.system()


def keep(path: Path, entries: Mapping[str, Any], **about: Any) -> dict[str, Any]:
    """Puts entries into a JSON file, and what they are about.

    Entries that it has from before stay where all that they are about is the same, the machine's
    load aside.

    Returns:
        All that the file then holds.
    """
    before = json.loads(path.read_text()) if path.is_file() else {}
    alike = all(_lasting(before.get(name)) == _lasting(part) for name, part in about.items())
    everything = {**(before if alike else {}), **about, **entries}
    write_json(path, everything)
    return everything


def _lasting(part: Any) -> Any:
    """As JSON has it, without what changes from run to run."""
    kept = json.loads(json.dumps(part))
    return {n: v for n, v in kept.items() if n != "load_before"} if isinstance(kept, dict) else kept


def table(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """The targets for a person to read."""
    lines = [f"{'target':24}{'value':>10}{'spread':>20}{'wanted':>12}   "]
    lines.append("-" * 72)
    for name, entry in entries.items():
        (kind, bound), value = next(iter(entry["target"].items())), entry["value"]
        spread = "{:.3g} to {:.3g}".format(*entry["spread"]) if "spread" in entry else ""
        wanted = f"{'>=' if kind == 'at_least' else '<='} {bound:.3g}"
        shown = "failed" if value is None else f"{value:.3g}"
        verdict = "met" if entry["met"] else "NOT met"
        lines.append(f"{name:24}{shown:>10}{spread:>20}{wanted:>12}   {verdict}")
    return "\n".join(lines)
