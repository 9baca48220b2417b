#!/usr/bin/env python
"""Makes the receipts of README's figures: the results JSONs of the runs that they come of.

The demo's need nothing but `make demo`, which is run where it has not been. Those of WikiText-2 and
of Penn Treebank need data of yours, in a folder that --shared names: data/wikitext-2
(train.tokens, valid.tokens, test.tokens), ckpt/wt2-small.pt, an LM of it, and data/ptb-columns (see
examples/penn_treebank); what lacks is left out, and it is said so. What is made already, in demo/
and build/receipts/, is not made again: remove both where the code that makes it was changed. About
25 minutes on two cores: 8 for the demo, 15 for WikiText-2, 1 for Penn Treebank.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]  # this checkout, whatever is installed

from common.commands import RunError, Steps, clock, environment  # noqa: E402

from fairseq_knnlm.cli.tables import show  # noqa: E402

#: From the root of the checkout, where commands run: paths stand in receipts as they are typed.
RECEIPTS, WORK, DEMO = Path("docs/receipts"), Path("build/receipts"), Path("demo")
DOMAINS = ("docstrings", "reference")
SPLITS = ("train", "valid", "test")
#: Of WikiText-2, each token after 193 to 256 of context.
READING = ["--tokens-per-sample", 256, "--context-window", 192, "--sample-break-mode", "none"]
READING += ["--max-tokens", 2048]
NEIGHBOURS = ["--k", 1024]
#: What of WikiText-2's test is mixed in which run.
MIXTURES: dict[str, list[object]] = {
    "paper": ["--experts", "knn", "--lmbda", 0.25, "--knn-temp", 1],
    "knn": ["--experts", "knn", "--mixer", "fixed"],
    "best": [],
}


@dataclass(frozen=True)
class Figure:
    """A perplexity that README tells.

    Attributes:
        place: the row and the column of its table; or a pattern of its text, whose group it is.
        receipt: name of the receipt.
        field: of the receipt; ``"fixed weights"`` for that mixture of all columns.
    """

    place: tuple[str, str] | str
    receipt: str
    field: str


def _row(name: str, receipt: str) -> list[Figure]:
    return [
        Figure((name, "LM alone"), f"{receipt}-knn", "base_perplexity"),
        Figure((name, "with nearest neighbours"), f"{receipt}-knn", "perplexity"),
        Figure((name, "best mixture"), f"{receipt}-best", "perplexity"),
    ]


FIGURES = [
    *_row("WikiText-2", "wikitext2"),
    *_row("Python's docstrings (demo)", "demo-docstrings"),
    *_row("Python's language reference (demo)", "demo-reference"),
    Figure(r"WikiText-2 has ([\d.]+): worse than no datastore", "wikitext2-paper", "perplexity"),
    Figure(r"have ([\d.]+) together", "penn-treebank", "fixed weights"),
    Figure(r"together and ([\d.]+)\s+with the text read so far", "penn-treebank", "perplexity"),
]


def in_readme(text: str, figure: Figure) -> str:
    """The figure as README tells it.

    Raises:
        KeyError: where it does not.
    """
    _, section = text.split("## What you get\n")
    if isinstance(figure.place, str):
        found = re.search(figure.place, section)
        if found is None:
            raise KeyError(figure.place)
        return found[1]
    name, column = figure.place
    header, _, *rows = re.findall(r"^\|(.*)\|$", section, flags=re.MULTILINE)
    columns = [cell.strip() for cell in header.split("|")]
    cells = {row.split("|")[0].strip(): row.split("|") for row in rows}
    return cells[name][columns.index(column)].strip()


def in_receipt(found: Mapping[str, Any], figure: Figure) -> str:
    """The figure as its receipt tells it."""
    if figure.field != "fixed weights":
        return f"{found[figure.field]:.2f}"
    fixed = [one for one in found["mixtures"] if one["mixture"].endswith(", fixed")]
    alone = [one for one in fixed if not {"history", "ngram"} & set(_experts(one["mixture"]))]
    widest = max(alone, key=lambda one: len(_experts(one["mixture"])))
    return f"{widest['perplexity']:.2f}"


def _experts(mixture: str) -> list[str]:
    """As a mixture's name tells them: ``a+b, fixed``."""
    return mixture.split(",")[0].split("+")


class Making:
    """The steps, each left out where what it makes is there.

    Args:
        shared: folder of the data that is not made here.
    """

    def __init__(self, shared: Path) -> None:
        self.shared = shared
        env = environment()
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
        self.steps = Steps(6 + len(MIXTURES), WORK / "logs", env)
        self.made: list[str] = []

    def run(self) -> None:
        """All receipts that can be made here."""
        self.demo()
        self.wikitext2()
        self.penn_treebank()

    def step(self, title: str, made: Path, command: Sequence[object], pattern: str = "") -> None:
        """Runs a command, unless what it makes is there."""
        if made.exists():
            self.steps.skip(title, made)
        else:
            self.steps.run(title, command, show=pattern)

    def keep(self, results: Path, name: str) -> None:
        """Puts results among the receipts."""
        shutil.copyfile(results, RECEIPTS / f"{name}.json")
        self.made.append(name)

    def demo(self) -> None:
        """What the demo evaluates."""
        files = [DEMO / "scores" / f"{one}-{name}.json" for one in DOMAINS for name in KINDS]
        if not all(map(has_receipt, files)):
            self.steps.run("Demo", ["python", "examples/demo.py", "--out", DEMO], show=r"^\|")
        else:
            self.steps.skip("Demo", DEMO)
        for file in files:
            self.keep(file, f"demo-{file.stem}")

    def wikitext2(self) -> None:
        """Save, build, tune, and an evaluation for each mixture, as README types them."""
        text, checkpoint = self.shared / "data/wikitext-2", self.shared / "ckpt/wt2-small.pt"
        if not all((text / f"{split}.tokens").is_file() for split in SPLITS):
            print(f"\nno WikiText-2 in {text}: its receipts are left out")
            return
        if not checkpoint.is_file():
            print(f"\nno LM of WikiText-2 at {checkpoint}: its receipts are left out")
            return
        work = WORK / "wikitext-2"
        work.mkdir(parents=True, exist_ok=True)
        data, store, model = work / "data", work / "dstore", work / "lm.pt"
        if not model.exists():
            model.symlink_to(checkpoint.resolve())
        lm = ["--path", model, *READING]
        texts = [f"--{split}pref={text / split}.tokens" for split in SPLITS]
        words = ["fairseq-preprocess", "--only-source", *texts, "--destdir", data]
        self.step("WikiText-2: binarise", data / "test.idx", words)
        words = ["fairseq-knnlm", "save", data, *lm, "--dstore", store]
        self.step("WikiText-2: save a datastore", store, words, "saved")
        words = ["fairseq-knnlm", "build-index", "--dstore", store]
        self.step("WikiText-2: build its index", store / "knn.index", words, "bytes a key")
        words = ["fairseq-knnlm", "tune", "--dstore", store, "--data", data, *lm, *NEIGHBOURS]
        self.step("WikiText-2: tune on valid", store / "calibration.json", words, "<- used|alone")
        plugin = ["--user-dir", "fairseq_knnlm", "--task", "knn_lm", "--gen-subset", "test"]
        memory = ["--knnlm", "--dstore-filename", store, *NEIGHBOURS]
        for name, flags in MIXTURES.items():
            results = work / f"{name}.json"
            words = ["fairseq-eval-lm", data, *plugin, *lm, *memory, *flags]
            words += ["--results-json", results]
            self.step(f"WikiText-2: evaluate, {name}", results, words, "perplexity [0-9.]+, loss")
            self.keep(results, f"wikitext2-{name}")

    def penn_treebank(self) -> None:
        """What the example reports of test."""
        columns, work = self.shared / "data/ptb-columns", WORK / "penn-treebank"
        if not (columns / "valid.npz").is_file():
            print(f"\nno columns of Penn Treebank in {columns}: their receipt is left out")
            return
        script = "examples/penn_treebank/mixture.py"
        words = ["python", script, columns, "--out", work]
        self.step("Penn Treebank", work / "report.json", words, r"^\|")
        self.keep(work / "report.json", "penn-treebank")


#: The demo's two evaluations of each text.
KINDS = ("knn", "best")


def has_receipt(path: Path) -> bool:
    """Whether results are there, and not of a version that wrote no receipt."""
    return path.is_file() and json.loads(path.read_text()).get("receipt") is not None


def differences(made: Sequence[str]) -> Iterator[tuple[str, str, str, str]]:
    """README's figures beside those of their receipts: name, README, receipt, and a mark."""
    text = Path("README.md").read_text(encoding="utf-8")
    for figure in FIGURES:
        if figure.receipt in made:
            found = json.loads((RECEIPTS / f"{figure.receipt}.json").read_text())
            told, right = in_readme(text, figure), in_receipt(found, figure)
            yield figure.receipt, told, right, "" if told == right else "README differs"


def main() -> int:
    """Makes the receipts; 1 where a command fails, or README tells other figures."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/receipts.py --shared ../shared",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--shared", type=Path, default=ROOT.parent / "shared", help="folder of data and LM"
    )
    making = Making(parser.parse_args().shared.resolve())
    os.chdir(ROOT)
    for folder in (WORK / "logs", RECEIPTS):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        making.run()
    except RunError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    rows = list(differences(making.made))
    print()
    show(("receipt", "README", "receipt's", ""), rows)
    print(f"\n{clock(making.steps.elapsed)} in all; the receipts are in {RECEIPTS}/")
    return int(any(mark for *_, mark in rows))


if __name__ == "__main__":
    sys.exit(main())
