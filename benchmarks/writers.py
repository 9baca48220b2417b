"""How fast texts go on, beside stock fairseq without a memory: each run is a process of its own."""

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from common.commands import RunError
from material import ROOT, WIKITEXT2, Material
from measure import Figure, Rates, interleaved
from perplexity import Perplexities
from speeds import fixed_mixture
from write import Written

from fairseq_knnlm.files import publish

#: Tokens of a prompt, and new ones; texts at a time.
GIVEN, NEW = 32, 64
BATCHES = (1, 16)
#: Two tokens whose log p differs by no more are equally likely, as far as rounding can tell: the
#: index's codes make steps of what float32 leaves open.
TIE = 1e-3


@dataclass(frozen=True)
class Texts:
    """What is written.

    Attributes:
        prompts: how many texts.
        calibrated: datastores with a calibration, several with : between them, whose mixture is
            timed too; empty for none.
    """

    prompts: int
    calibrated: str = ""


class Writing:
    """Prompts continued by rivals, each named by who writes and how many texts at a time.

    ``stock_1`` is fairseq without a memory; ``plain_1`` ours with the neighbours at fixed weights;
    ``speculating_1`` the same with drafts; ``alone_1`` the same at a weight of 0. In front of
    these, ``default_`` stands for the mixture that a calibration has for best.

    Args:
        material: text, language model, datastore.
        perplexities: who knows the weights that are right for them.
        texts: what is written.
    """

    def __init__(self, material: Material, perplexities: Perplexities, texts: Texts) -> None:
        self.material = material
        self.perplexities = perplexities
        self.texts = texts
        self.runs: dict[str, list[Written]] = {}

    def measure(self, names: Sequence[str], rounds: int) -> Rates:
        """Tokens a second of these and of those beside them, round by round.

        Raises:
            RunError: where rivals that should write the same do not.
        """
        self.runs = {}
        ours = ["plain", *(["speculating"] if "speculating_1" in names else [])]
        writers = ["plain", "stock", *ours[1:]]  # stock right beside those it is compared with
        if self.texts.calibrated:
            writers += [f"default_{writer}" for writer in ours]
        rivals = [f"{writer}_{batch}" for batch in BATCHES for writer in writers]
        for batch in BATCHES:
            self._run(f"alone_{batch}")
            self._run(f"stock_{batch}")
        self._check("alone", "stock")
        self.runs = {}
        rates = interleaved({n: partial(self._rate, n) for n in rivals}, rounds, "writing")
        self._check("plain", "speculating")
        self._check("default_plain", "default_speculating")
        return rates

    def beside(self, figure: Figure, rates: Rates) -> dict[str, Any]:
        """What else is worth knowing of a figure: other batches and mixtures, where time goes."""
        writer, _, _ = figure.over.rpartition("_")
        aimed = replace(figure, least=aim(writer, self.material.source.name))
        found: dict[str, Any] = {
            **aimed.entry(rates),
            "texts": f"{self.texts.prompts} prompts of {GIVEN} tokens, {NEW} new ones",
            **self._took(figure.over),
        }
        others = [f"{mixture}{writer}_{size}" for mixture in ("", "default_") for size in BATCHES]
        for name in others:
            if name != figure.over and name in rates:
                other = Figure(figure.kind, name, f"stock_{name.rpartition('_')[2]}", figure.unit)
                found[name] = other.entry(rates) | self._took(name)
        return found

    def _took(self, name: str) -> dict[str, Any]:
        """Milliseconds a token, and where the time went, of the median run."""
        run = sorted(self.runs[name], key=lambda run: run.seconds)[len(self.runs[name]) // 2]
        found: dict[str, Any] = {
            "ms_a_token": 1000 * run.seconds / run.tokens,
            "share_of_time": {part: spent / run.seconds for part, spent in run.parts.items()},
        }
        if run.drafted:
            found |= {"tokens_a_step": run.tokens / run.steps, "kept": run.kept / run.drafted}
        return found

    def _rate(self, name: str, _: int) -> float:
        run = self._run(name)
        return run.tokens / run.seconds

    def _run(self, name: str) -> Written:
        writer, _, batch = name.rpartition("_")
        material, out = self.material, self.material.folder / "written.json"
        command = [sys.executable, ROOT / "benchmarks/write.py", material.data("test")]
        command += ["--path", material.source.checkpoint, "--prompts", self._prompts, "--out", out]
        command += ["--new", NEW, "--batch", batch, *self._flags(writer)]
        material.shell.seconds(f"writing-{name}", command)
        run = Written(**json.loads(out.read_text(encoding="utf-8")))
        if any(len(text) != GIVEN + NEW for text in run.texts):
            raise RunError(f"{name} wrote texts of other lengths than {GIVEN} + {NEW} tokens")
        self.runs.setdefault(name, []).append(run)
        return run

    def _flags(self, writer: str) -> list[object]:
        if writer == "stock":
            return []
        drafts = ["--speculate", "on" if writer.endswith("speculating") else "off"]
        if writer.startswith("default_"):
            return ["--knnlm", "--dstore-filename", self.texts.calibrated, *drafts]
        alone = ["--lmbda", 0] if writer == "alone" else []
        experts = ["--experts", "knn", "--mixer", "fixed"]
        fitted = self.perplexities.of("ours")
        return [*fixed_mixture(self.material, fitted), *experts, *alone, *drafts]

    @cached_property
    def _prompts(self) -> Path:
        """A file of prompts, a line each."""
        choice, path = self.material.choice, self.material.folder / "prompts.txt"
        with self.material.source.file("test").open(encoding="utf-8") as file:
            lines = list(itertools.islice(file, choice.first or None))
        prompts = beginnings(lines, self.texts.prompts)
        with publish(path) as temporary:
            temporary.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
        return path

    def _check(self, *writers: str) -> None:
        """Refuses rivals that should have written the same, in whatever batch, and did not.

        Raises:
            RunError: naming the first.
        """
        runs = [
            (name, run)
            for name, several in self.runs.items()
            if name.rpartition("_")[0] in writers
            for run in several
        ]
        for name, run in runs:
            if apart := differences(runs[0][1], run):
                raise RunError(f"{runs[0][0]} and {name} write {len(apart)} texts differently")


def aim(writer: str, source: str) -> float:
    """What a writer's speed should be at least, over stock's."""
    if writer == "plain":
        return 0.7
    return 0.9 if source == WIKITEXT2 else 1.0


def beginnings(lines: Sequence[str], count: int) -> list[str]:
    """The first ``GIVEN`` symbols of lines that have as many, evenly spread.

    fairseq ends a text where its prompt has the end of a line, so a prompt is of one line.

    Raises:
        RunError: where there are fewer such lines.
    """
    long = [words[:GIVEN] for line in lines if len(words := line.split()) >= GIVEN]
    if len(long) < count:
        raise RunError(f"{count} prompts are wanted, and {len(long)} lines are long enough")
    return [" ".join(long[place]) for place in np.linspace(0, len(long) - 1, count).astype(int)]


def differences(one: Written, other: Written) -> list[int]:
    """Texts that differ, but for those that part where two tokens are equally likely."""
    found = []
    for number, (mine, yours) in enumerate(zip(one.texts, other.texts, strict=True)):
        pairs = enumerate(zip(mine, yours, strict=True))
        place = next((place for place, (a, b) in pairs if a != b), None)
        if place is None:
            continue
        new = place - GIVEN
        if new < 0 or abs(one.log_probs[number][new] - other.log_probs[number][new]) > TIE:
            found.append(number)
    return found
