"""README's figures and the receipts in docs/receipts: each has the other."""

from __future__ import annotations

import json
import re
import sys

import pytest
from conftest import ROOT

from fairseq_knnlm.runs.receipt import TableReceipt, read_results
from fairseq_knnlm.runs.replay import check_figures

sys.path.insert(0, str(ROOT / "tools"))
import receipts

README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDER = ROOT / "docs" / "receipts"
#: With two digits behind the point README tells perplexities alone; lambda is below 1.
PERPLEXITY = re.compile(r"(?<![\d.])[1-9]\d*\.\d{2}(?![\d.])")
MADE = sorted(file.stem for file in FOLDER.glob("*.json"))


def test_every_perplexity_of_readme_has_its_receipt() -> None:
    told = [receipts.in_readme(README, figure) for figure in receipts.FIGURES]
    _, section = README.split("## What you get\n")
    assert sorted(told) == sorted(PERPLEXITY.findall(section))


def test_every_receipt_is_there_and_names_figures_of_readme() -> None:
    """All of them, or none where they are still to be made."""
    assert MADE in ([], sorted({figure.receipt for figure in receipts.FIGURES}))


@pytest.mark.parametrize("figure", receipts.FIGURES, ids=lambda figure: str(figure.place))
def test_figures_are_those_of_their_receipts(figure: receipts.Figure) -> None:
    for name in {figure.receipt} & set(MADE):
        found = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        assert receipts.in_receipt(found, figure) == receipts.in_readme(README, figure)


@pytest.mark.parametrize("name", MADE or ["none is made yet"])
def test_receipts_can_be_read_anywhere(name: str) -> None:
    """Their seals and figures hold, and they name no place outside the checkout."""
    for path in [FOLDER / f"{name}.json"] if MADE else []:
        found, receipt = read_results(path)
        if not isinstance(receipt, TableReceipt):
            check_figures(found, path)
        assert not re.search(r'"(/|\.\./|~)', path.read_text(encoding="utf-8"))


def test_figures_are_read_off_a_receipt() -> None:
    mixtures = [
        {"mixture": name, "perplexity": perplexity}
        for name, perplexity in (
            ("language model alone", 90.0),
            ("a, fixed", 80.0),
            ("a+b, fixed", 70.126),
            ("a+b, gate", 60.0),
            ("a+b+history, fixed", 50.0),
        )
    ]
    found = {"perplexity": 40.004, "base_perplexity": 90.0, "mixtures": mixtures}
    told = {
        field: receipts.in_receipt(found, receipts.Figure("", "", field))
        for field in ("perplexity", "base_perplexity", "fixed weights")
    }
    assert told == {"perplexity": "40.00", "base_perplexity": "90.00", "fixed weights": "70.13"}
