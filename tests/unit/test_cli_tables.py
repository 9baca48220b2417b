"""``cli/tables``: tables as they are printed."""

from __future__ import annotations

import pytest
from cli_calls import Capture

from fairseq_knnlm.cli.tables import show


@pytest.fixture(params=["a pipe", "a narrow terminal that wants colours"], autouse=True)
def surroundings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "a pipe":
        for name, value in (("COLUMNS", "20"), ("FORCE_COLOR", "1"), ("TERM", "xterm-256color")):
            monkeypatch.setenv(name, value)


def test_a_table_is_what_markdown_has(capsys: Capture) -> None:
    show(
        ["mixture", "perplexity", ""], [["knn+cache, fixed", "87.65", "<- used"], ["lm2", 102, ""]]
    )
    assert capsys.readouterr().out.splitlines() == [
        "| mixture          | perplexity |         |",
        "|------------------|------------|---------|",
        "| knn+cache, fixed |      87.65 | <- used |",
        "| lm2              |        102 |         |",
    ]


def test_nothing_is_cut_coloured_or_taken_for_markup(capsys: Capture) -> None:
    words = "[bold red]" + "long " * 60 + ":smile:"
    show(["experts"], [[words]])
    (_, _, row) = capsys.readouterr().out.splitlines()
    assert row == f"| {words} |"
