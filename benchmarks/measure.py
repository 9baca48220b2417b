"""Fair timing, and what is kept of it: rivals in turn, paired ratios, the machine."""

import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
from common.commands import usable_cores
from tqdm import tqdm

from fairseq_knnlm.cli.tables import show
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
class Figure:
    """What is measured: a ratio of two rivals, or one rival's own.

    Attributes:
        kind: how it is measured.
        over: whose figure it is.
        under: whom it is compared with; empty for nobody.
        unit: of what is measured.
        led_to: two searches, the perplexities that they lead to being compared.
        least: what the figure should be at least.
        most: what it should be at most.
    """

    kind: str
    over: str
    under: str
    unit: str
    led_to: tuple[str, str] | None = None
    least: float | None = None
    most: float | None = None

    def entry(self, rates: Rates) -> dict[str, Any]:
        """What ``results.json`` says of it, perplexities aside."""
        rivals = [name for name in (self.over, self.under) if name]
        pairs = [rates[name] for name in rivals]
        ratio = Ratio.of(pairs[0], pairs[1] if self.under else [1.0] * len(pairs[0]))
        return {
            "value": ratio.value,
            "spread": [ratio.low, ratio.high],
            "unit": self.unit,
            "rates": {name: summary(rates[name]) for name in rivals},
            **self._aim(ratio.value),
        }

    def _aim(self, value: float) -> dict[str, Any]:
        """What the figure should be, where that was said, and whether it is."""
        if self.least is None and self.most is None:
            return {}
        above = self.least is None or value >= self.least
        below = self.most is None or value <= self.most
        aims = {"least": self.least, "most": self.most}
        said = {name: aim for name, aim in aims.items() if aim is not None}
        return {"target": said, "reached": above and below}


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


def show_entries(entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints what was measured: the ratio, or the one figure, and the medians that it is of."""
    rows = [[name, *_cells(entry)] for name, entry in entries.items()]
    titles = ["figure", "value", "target", "spread", "medians", "unit", "perplexity"]
    show(titles, rows)


def _cells(entry: Mapping[str, Any]) -> list[str]:
    if entry["value"] is None:
        return ["failed", "", "", "", "", ""]
    medians = (f"{rival} {rate['median']:,.4g}" for rival, rate in entry["rates"].items())
    found = entry.get("perplexity")
    signs = {"least": "≥", "most": "≤"}
    target = " ".join(f"{signs[n]} {aim:g}" for n, aim in entry.get("target", {}).items())
    if target:
        target += "" if entry["reached"] else ", missed"
    excess = f"{found['excess']:+.2%} over {found['over']}" if found and "over" in found else ""
    spread = "{:.3g} to {:.3g}".format(*entry["spread"])
    return [f"{entry['value']:.3g}", target, spread, ", ".join(medians), entry["unit"], excess]
