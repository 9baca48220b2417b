"""The page as a file: what it holds, what it allows, and when there is none."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html.parser
import re
import weakref
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pages
import pytest
from conftest import ROOT

from fairseq_knnlm.errors import OutputError
from fairseq_knnlm.explanation import page as module
from fairseq_knnlm.explanation.page import MOST_BYTES, write_page
from fairseq_knnlm.explanation.record import Explained, Run

#: How scripts make markup or code of a string.
MAKING = re.compile(
    r"innerHTML|outerHTML|insertAdjacent|document\.write|srcdoc|\beval\b|Function\(|DOMParser"
)
TEMPLATE = sorted((ROOT / "fairseq_knnlm/explanation/template").iterdir())


class Parts(html.parser.HTMLParser):
    """The elements of a page, with their attributes and the text straight behind their start."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], str]] = []
        self.inside = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), ""))
        self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            tag, attributes, text = self.found[-1]
            self.found[-1] = (tag, attributes, text + data)

    def of(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attributes, text) for name, attributes, text in self.found if name == tag]


class Held(Explained, frozen=True, weakref=True):
    """A text that can be watched."""


def record_of(path: Path) -> tuple[Run, list[Explained], int]:
    ((attributes, packed),) = [
        each for each in Parts(path).of("script") if each[0].get("id") == "record"
    ]
    first, *others = gzip.decompress(base64.b64decode(packed)).splitlines()
    run = msgspec.json.decode(first, type=Run)
    texts = [msgspec.json.decode(line, type=Explained) for line in others]
    return run, texts, int(attributes["data-left-out"] or 0)


def test_it_holds_the_record(tmp_path: Path) -> None:
    run, texts, left_out = record_of(pages.page(tmp_path, pages.cats(), pages.dogs()))
    assert run == pages.RUN
    assert not left_out
    for found, text in zip(texts, [pages.cats(), pages.dogs()], strict=True):
        assert (found.name, found.given, len(found.tokens)) == (
            text.name,
            text.given,
            len(text.tokens),
        )
        for one, other in zip(found.tokens, text.tokens, strict=True):
            assert one.sources == other.sources
            assert one.mixture == pytest.approx(other.mixture, rel=1e-4)


def test_only_its_own_style_and_script_are_allowed(tmp_path: Path) -> None:
    parts = Parts(pages.page(tmp_path, pages.cats()))
    (policy,) = [
        attributes["content"]
        for attributes, _ in parts.of("meta")
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    allowed = dict(rule.split(" ", 1) for rule in (policy or "").split("; "))
    assert allowed.pop("default-src") == allowed.pop("base-uri") == "'none'"
    assert allowed.pop("form-action") == "'none'"
    ((_, style),) = parts.of("style")
    (script,) = [text for attributes, text in parts.of("script") if attributes["type"] == "module"]
    for name, text in (("style-src", style), ("script-src", script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert allowed.pop(name) == f"'sha256-{digest}'"
    assert not allowed


def test_it_names_nothing_outside(tmp_path: Path) -> None:
    path = pages.page(tmp_path, pages.cats())
    for _, attributes, _ in Parts(path).found:
        assert not set(attributes) & {"src", "href", "action", "srcset", "style"}
    addresses = set(re.findall(r"\w+://[^\"'\s]+", path.read_text(encoding="utf-8")))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not a place


def test_markup_is_no_markup(tmp_path: Path) -> None:
    plain = pages.page(tmp_path, pages.cats())
    tags = [tag for tag, _, _ in Parts(plain).found]
    path = tmp_path / "hostile.html"
    write_page(path, pages.hostile_run(), [pages.hostile()])
    assert [tag for tag, _, _ in Parts(path).found] == tags
    assert "alert" not in path.read_text(encoding="utf-8")


def test_the_scripts_make_no_markup() -> None:
    """Nothing in them takes a string as markup, or as code, or ends the element they stand in."""
    assert {path.name for path in TEMPLATE} == {
        *("page.html", "page.css"),
        *(f"{name}.js" for name in module.SCRIPTS),
    }
    for path in TEMPLATE:
        if path.suffix == ".js":
            text = path.read_text(encoding="utf-8")
            assert not MAKING.findall(text), path.name
            assert not re.findall(r"</?script|<!--", text, re.IGNORECASE), path.name
            assert len(text.splitlines()) <= 300, path.name


def test_two_thousand_tokens_fit(tmp_path: Path) -> None:
    path = pages.page(tmp_path, pages.long_text())
    assert path.stat().st_size <= MOST_BYTES
    _, (text,), _ = record_of(path)
    assert all(len(token.sources) == 8 for token in text.tokens)


def test_what_does_not_fit_is_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole texts behind the first; of the first, sources with the smallest shares."""
    monkeypatch.setattr(module, "MOST_BYTES", 150_000)
    path = tmp_path / "page.html"
    long = pages.long_text(200)
    assert write_page(path, pages.RUN, [pages.dogs(), long, pages.cats()]) == (1, 2)
    assert record_of(path)[2] == 2
    assert path.stat().st_size <= 150_000
    assert write_page(path, pages.RUN, [long]) == (1, 0)
    assert path.stat().st_size <= 150_000
    _, (text,), _ = record_of(path)
    kept = {len(token.sources) for token in text.tokens}
    assert len(kept) == 1
    assert 0 < kept.pop() < 8
    for found, token in zip(text.tokens, long.tokens, strict=True):
        rows = [each.row for each in found.sources]
        assert rows == [each.row for each in token.sources][: len(rows)]


def test_texts_are_taken_one_at_a_time(tmp_path: Path) -> None:
    """Of ten thousand no two are there at once."""
    seen: list[weakref.ref[Held]] = []

    def texts() -> Iterator[Explained]:
        for number in range(10_000):
            text = Held(f"prompt {number}", 0, pages.dogs().tokens)
            seen.append(weakref.ref(text))
            yield text
            del text
            assert all(each() is None for each in seen[-3:-1])

    assert write_page(tmp_path / "page.html", pages.RUN, texts()) == (10_000, 0)


@pytest.mark.parametrize("texts", [[], [pages.long_text(300, 0)]], ids=["none", "too long"])
def test_a_page_of_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[Explained]
) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 40_000)
    path = tmp_path / "page.html"
    path.write_text("what was there")
    with pytest.raises(OutputError, match="no text that a page can show"):
        write_page(path, pages.RUN, texts)
    assert path.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [path]
