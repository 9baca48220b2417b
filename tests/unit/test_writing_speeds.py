"""Of the speed of writing in `make bench`: prompts, which texts differ, where the time goes."""

from __future__ import annotations

import json
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from common.commands import RunError
from figures import FIGURES
from measure import show_entries
from write import Parts, Written
from writers import GIVEN, Texts, Writing, beginnings, differences

LINES = [f"{name} " + "w " * (GIVEN - 1 + more) for more, name in enumerate("abcdefg")]


def test_prompts_are_beginnings_of_long_lines_from_first_to_last() -> None:
    found = beginnings(["", "too short", *LINES], 3)
    assert [prompt[0] for prompt in found] == ["a", "d", "g"]
    assert all(len(prompt.split()) == GIVEN for prompt in found)


def test_too_few_long_lines_are_refused() -> None:
    with pytest.raises(RunError, match="7 lines"):
        beginnings([*LINES, "too short"], 8)


def written(*texts: list[int], log_probs: list[float]) -> Written:
    """Texts of one prompt, whose new tokens all have these log-probabilities."""
    return Written([[0] * GIVEN + text for text in texts], [log_probs for _ in texts])


def test_texts_that_part_by_more_than_rounding_differ() -> None:
    one = written([1, 2], [1, 2], log_probs=[-1.0, -2.0])
    assert differences(one, one) == []
    assert differences(one, written([1, 2], [1, 3], log_probs=[-1.0, -1.5])) == [1]


def test_texts_that_part_where_two_tokens_are_equally_likely_do_not() -> None:
    one = written([1, 2, 3], log_probs=[-1.0, -2.0, -3.0])
    other = written([1, 4, 5], log_probs=[-1.0, -2.00001, -9.0])
    assert differences(one, other) == []


def test_a_part_takes_its_time_without_those_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    class Work:
        def outer(self) -> int:
            return self.inner() + self.inner()

        def inner(self) -> int:
            return 1

    parts, clock = Parts(), iter([0.0, 1.0, 3.0, 4.0, 8.0, 9.0])
    parts.watch(Work, "outer", "outside")
    parts.watch(Work, "inner", "inside")
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    found = Work().outer()
    monkeypatch.undo()
    assert found == 2
    # From 0 to 9, of which 1 to 3 and 4 to 8 are inside.
    assert parts.seconds == {"outside": 3.0, "inside": 6.0}


def test_a_figure_is_shown_beside_what_it_should_be(capsys: pytest.CaptureFixture[str]) -> None:
    """As read from results.json, those of other figures and of texts alike."""
    material: Any = SimpleNamespace(source=SimpleNamespace(name="any"))
    unasked: Any = None
    writing = Writing(material, unasked, Texts(1))
    writing.runs["plain_16"] = [Written([[0]], [[-1.0]], tokens=1, seconds=2.0)]
    rates = {"plain_16": [6.0, 6.0], "stock_16": [10.0, 10.0], "base": [9.0], "stock": [2.0]}
    rates |= {"mixture": [4.0]}
    texts = FIGURES["generate_over_stock"]
    entries = {
        name: FIGURES[name].entry(rates) for name in ("base_over_stock", "mixture_over_stock")
    }
    entries["generate_over_stock"] = texts.entry(rates) | writing.beside(texts, rates)
    show_entries(json.loads(json.dumps(entries)))
    rows = capsys.readouterr().out.splitlines()[-3:]
    assert [("≥" in row, "missed" in row) for row in rows] == [
        (False, False),
        (True, False),
        (True, True),
    ]
