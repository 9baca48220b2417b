"""The page in a browser: what is shown of a record, by mouse, by keys, and in how much time.

It needs Chromium and its driver (``tools/browser.sh`` installs both where it can) and selenium. All
figures that are expected here follow from the records of ``pages`` by hand.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pages
import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
#: Of the text ``cats``, by their place in it.
SAT, ON, MAT, AND, OTHER_MAT, DOT, LINE = range(2, 9)


class Reader:
    """Somebody who looks at a page."""

    def __init__(self) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        root = ["--no-sandbox"] if os.geteuid() == 0 else []
        for flag in ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", *root]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = webdriver.ChromeService(executable_path=DRIVER)
        self.driver = webdriver.Chrome(options=options, service=service)

    def open(self, path: Path, width: int = 1280, height: int = 900) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get(path.as_uri())
        WebDriverWait(self.driver, 20).until(lambda _: self.run("return performance.timing && "
            "document.documentElement.dataset.ready !== undefined"))  # fmt: skip

    def run(self, script: str, *arguments: object) -> object:
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.one(selector).text

    def texts(self, selector: str) -> list[str]:
        return [" ".join(each.text.split()) for each in self.all(selector)]

    def token(self, index: int) -> WebElement:
        return self.one(f"#text [data-index='{index}']")

    def press(self, *keys: str) -> None:
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)

    def choose(self, name: str, value: str) -> None:
        Select(self.one(f"[name={name}]")).select_by_value(value)

    def search(self, words: str) -> None:
        field = self.one("[name=query]")
        field.clear()
        field.send_keys(words)

    @property
    def chosen(self) -> int | None:
        found = self.all("#text [aria-selected=true]")
        return int(found[0].get_attribute("data-index") or -1) if found else None

    def fitting(self) -> list[int]:
        """Tokens that are not faded."""
        return [int(each.get_attribute("data-index") or -1) for each in self.all("#text .fits")]

    def marked(self, kind: str) -> list[int]:
        return [int(each.get_attribute("data-index") or -1) for each in self.all(f"#text .{kind}")]

    def complaints(self) -> list[str]:
        return [each["message"] for each in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    if BROWSER is None or DRIVER is None:
        pytest.skip("there is no chromium with its chromedriver: tools/browser.sh")
    found = Reader()
    yield found
    found.driver.quit()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pages.page(tmp_path_factory.mktemp("page_of_cats"), pages.cats(), pages.dogs())


@pytest.fixture
def cats(reader: Reader, path: Path) -> Reader:
    reader.open(path)
    return reader


def test_it_opens_without_a_complaint_and_fetches_nothing(cats: Reader) -> None:
    assert cats.complaints() == []
    assert cats.run("return performance.getEntriesByType('resource').length") == 0
    assert cats.text("#text") == "The cat sat on mat and mat.↵"
    assert cats.run("return document.title") == "prompt 1 · where each word came from"


def test_the_runs_figures_are_at_the_top(cats: Reader) -> None:
    """Of the nine written tokens 1/16 before, and 11 bits gained in all."""
    figures = dict(
        zip(cats.texts("#figures dt"), cats.texts("#figures dd"), strict=True),
    )
    assert figures["Perplexity without memory"] == "16.0"
    assert figures["Perplexity with memory"] == f"{2 ** (4 - 11 / 9):.1f}"
    assert figures["Bits gained a token"] == f"+{11 / 9:.2f}"
    assert figures["Tokens"] == "9"
    assert figures["Datastore of knn2"] == "plants 678 entries"
    cats.one("#run summary").click()
    about = cats.text("#run")
    for words in (pages.RUN.mixture, "IVF8,SQ8", "bbbb", "0123abcd", "torch 2.13.0"):
        assert words in about


def test_colours_say_what_was_gained_and_lost(cats: Reader) -> None:
    classes = [str(cats.token(index).get_attribute("class")).split() for index in range(9)]
    coloured = [
        next((name for name in names if name.startswith(("gain", "loss"))), "") for names in classes
    ]
    assert coloured == ["", "", "gain3", "loss2", "gain3", "", "", "gain3", "gain2"]
    assert ["given" in names for names in classes] == [True, True, *[False] * 7]
    assert len(cats.all("#text .border")) == 1
    labels = [cats.token(index).get_attribute("aria-label") for index in (SAT, ON, LINE)]
    assert labels == ["sat, gained 3.0 bits", "on, lost 1.0 bits", "↵, gained 1.0 bits"]


def test_a_click_shows_experts_alternatives_and_sources(cats: Reader) -> None:
    cats.token(MAT).click()
    assert cats.chosen == MAT
    assert cats.text("#details h2") == "mat"
    assert "token 5 of 9" in cats.text("#details .heading")
    assert cats.texts(".probabilities .number") == ["6.3%", "25%"]
    assert cats.text(".bits") == "+2.0 bits"
    assert cats.texts(".experts tbody tr") == [
        "language model 50% 6.3%",
        "knn 25% 25% +2.0",
        "cache 25% – 0.0",
    ]
    assert cats.texts(".guesses h4") == ["without memory", "with memory"]
    assert cats.texts(".guesses li") == ["dog 50%", "mat 6.3%", "mat 25%", "dog 5%"]
    assert cats.texts(".agreement .number") == ["75%"]
    assert cats.texts(".source .words") == [
        "…seen in row 7: the cat mat and so on…",
        "…seen in row 9: the cat mat and so on…",
        "…seen in row 5: the cat fern and so on…",
    ]
    assert cats.texts(".source .value") == ["mat", "mat", "fern"]
    assert cats.texts(".source .share") == ["50%", "30%", "20%"]
    assert cats.texts(".source .document") == ["Of cats", "Of cats", "plants"]
    assert cats.texts(".source .facts")[2] == "plants · row 5 · distance 5.000"
    assert [str(each.get_attribute("class")).split()[1] for each in cats.all(".source")] == [
        "agrees",
        "agrees",
        "differs",
    ]


def test_words_that_match_are_marked(cats: Reader) -> None:
    """Two tokens before *sat* stand before its source too, but the first had a capital there."""
    cats.token(SAT).click()
    assert cats.run("return document.querySelector('.source mark').textContent") == "he cat"
    cats.token(MAT).click()  # "sat on" stands before it, and "the cat" before its sources
    assert cats.run("return document.querySelector('.source mark').textContent") == ""


def test_a_source_without_surroundings_says_so(cats: Reader) -> None:
    cats.token(DOT).click()
    assert cats.texts(".source .words") == [". the datastore no longer knows what stands around"]


def test_a_source_lists_every_token_that_it_helped(cats: Reader) -> None:
    """Row 7 spoke for *sat* and *mat*, and in the other text; rows 9 and 11 are of its document."""
    cats.token(SAT).click()
    cats.all(".source button")[0].click()
    assert cats.texts(".helped h4") == [
        "This entry helped 3 tokens",
        "Its document helped 1 more token",
    ]
    lists = cats.all(".helped ul")
    found = [each.get_attribute("data-index") for each in lists[0].find_elements(By.CSS_SELECTOR, "button")]  # fmt: skip
    assert found == [str(SAT), str(MAT), "1"]
    assert cats.marked("by-entry") == [SAT, MAT]
    assert cats.marked("by-document") == [DOT]
    lists[0].find_elements(By.CSS_SELECTOR, "button")[1].click()
    assert cats.chosen == MAT
    assert cats.marked("by-entry") == []


def test_a_token_of_another_text_is_gone_to(cats: Reader) -> None:
    cats.token(SAT).click()
    cats.all(".source button")[0].click()
    row = cats.all(".helped ul button")[2]
    assert "prompt 2" in row.text
    row.click()
    assert cats.text("#text") == "Dogs sat"
    assert cats.chosen == 1
    assert cats.one("[name=text]").get_attribute("value") == "1"


def test_a_source_that_helped_none_says_so(cats: Reader) -> None:
    cats.token(SAT).click()
    cats.all(".source button")[1].click()
    assert cats.texts(".helped h4") == ["This entry helped no token"]
    cats.all(".source button")[1].click()
    assert not cats.all(".helped")


def test_keys_are_enough(cats: Reader) -> None:
    def focus() -> str:
        return str(cats.run("return document.activeElement.id || document.activeElement.name"))

    cats.press("/")
    assert focus() == "query"
    for _ in range(5):  # four more fields, and then the text
        cats.press(Keys.TAB)
    cats.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert cats.chosen == SAT
    assert cats.text("#details h2") == "sat"
    cats.press(Keys.ARROW_RIGHT, Keys.ARROW_LEFT, Keys.END)
    assert cats.chosen == LINE
    cats.press(Keys.HOME, Keys.ARROW_LEFT)
    assert cats.chosen == 0
    cats.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ENTER)
    assert focus() == "chosen"
    for _ in range(4):  # three buttons, and then the first source
        cats.press(Keys.TAB)
    cats.press(Keys.ENTER)
    assert cats.texts(".helped h4")[0] == "This entry helped 3 tokens"
    cats.press(Keys.ESCAPE)
    assert not cats.all(".helped")
    assert cats.chosen == SAT
    cats.press(Keys.ESCAPE)
    assert cats.chosen is None
    assert cats.text("#details h2") == "Choose a token"
    cats.press(Keys.SPACE)  # where it was
    assert cats.chosen == SAT


def test_a_search_filters_tokens_and_sources(cats: Reader) -> None:
    cats.search("mat")
    assert cats.fitting() == [MAT, OTHER_MAT]
    assert cats.text("#count") == "2 of 9 tokens"
    cats.search("CAT SAT on")
    cats.choose("scope", "text")
    assert cats.fitting() == [1, SAT, ON]
    cats.choose("scope", "sources")
    assert cats.fitting() == []
    cats.search("row 9: the")
    assert cats.fitting() == [MAT]
    cats.token(MAT).click()
    assert cats.texts(".source .facts") == ["animals · row 9 · distance 9.000"]
    cats.one("#details .more").click()
    assert len(cats.all(".source")) == 3
    cats.search("of dogs")
    assert cats.fitting() == [SAT]
    cats.search("zebra")
    assert cats.text("#count") == "0 of 9 tokens"


def test_arrows_walk_where_the_filter_lets_them(cats: Reader) -> None:
    cats.search("mat")
    cats.token(MAT).click()
    cats.press(Keys.ARROW_RIGHT)
    assert cats.chosen == OTHER_MAT


@pytest.mark.parametrize(
    ("kind", "found"), [("gain", [SAT, MAT, DOT, LINE]), ("loss", [ON]), ("all", list(range(9)))]
)
def test_tokens_that_gained_or_lost_are_filtered(cats: Reader, kind: str, found: list[int]) -> None:
    cats.choose("kind", kind)
    assert cats.fitting() == found


@pytest.mark.parametrize(
    ("order", "first"),
    [("gain", [SAT, MAT, DOT, LINE, 0]), ("loss", [ON, 0, 1, AND, OTHER_MAT])],
)
def test_tokens_are_sorted_by_gain_or_loss(cats: Reader, order: str, first: list[int]) -> None:
    cats.choose("order", order)
    rows = cats.all("#ranking .row")
    assert len(rows) == 9
    assert [int(row.get_attribute("data-index") or -1) for row in rows[:5]] == first
    rows[1].click()
    assert cats.run("return document.querySelector('#ranking [aria-selected=true]').dataset.index") == str(first[1])  # fmt: skip
    cats.press(Keys.ARROW_DOWN)
    assert cats.text("#details h2") == {DOT: ".", 1: "cat"}[first[2]]


def test_an_expert_by_itself(cats: Reader) -> None:
    """The cache moved nothing."""
    assert [each.text for each in Select(cats.one("[name=expert]")).options] == [
        "all experts",
        "knn",
        "cache",
    ]
    cats.choose("expert", "cache")
    cats.choose("kind", "gain")
    assert cats.fitting() == []
    cats.choose("expert", "knn")
    assert cats.fitting() == [SAT, MAT, DOT, LINE]


def test_texts_are_chosen_from_a_list(cats: Reader) -> None:
    options = [each.text for each in Select(cats.one("[name=text]")).options]
    assert options == ["prompt 1 · +1.29 bits a token", "prompt 2 · +2.00 bits a token"]
    cats.choose("text", "1")
    assert cats.text("#text") == "Dogs sat"
    assert cats.text("#count") == "2 tokens"


def test_the_picture_shows_query_and_neighbours(cats: Reader) -> None:
    cats.token(MAT).click()
    dots = cats.all(".picture circle")
    assert len(dots) == 2  # the third source has no place
    assert len(cats.all(".picture path.query")) == 1
    rows = {each.get_attribute("data-row"): each for each in dots}
    sizes = {row: float(each.get_attribute("r") or 0) for row, each in rows.items()}
    assert sizes["7"] > sizes["9"]
    assert rows["7"].get_attribute("aria-label") == "mat: share 50%, distance 7.000"
    cats.run("arguments[0].scrollIntoView()", rows["7"])
    webdriver.ActionChains(cats.driver).move_to_element(rows["9"]).perform()
    assert cats.text(".tooltip") == "mat: share 30%, distance 9.000"
    rows["9"].click()
    assert cats.one(".source.open").get_attribute("data-row") == "9"


def test_where_there_is_no_picture_a_sentence_says_so(cats: Reader) -> None:
    cats.token(AND).click()
    assert not cats.all(".picture")
    assert "There is no picture" in cats.text("#details")


def test_text_stays_text(reader: Reader, tmp_path: Path) -> None:
    reader.open(pages.page(tmp_path, pages.hostile(), run=pages.hostile_run()))
    reader.one("#run summary").click()
    reader.token(1).click()
    reader.all(".source button")[0].click()
    reader.search("<script>")
    reader.choose("order", "gain")
    assert reader.run("return document.querySelectorAll('img').length") == 0
    assert reader.run("return document.querySelectorAll('script').length") == 2
    assert reader.complaints() == []  # the policy had nothing to stop
    shown = reader.text("body")
    assert shown.count("<img src=x onerror=alert(2)>") >= 8
    assert "</script>" in shown
    assert "&amp;" in shown
    reader.choose("order", "text")
    assert reader.run("return document.querySelector('#text').textContent").startswith(  # type: ignore[union-attr,attr-defined]
        "plain<script>alert(1)</script></script><!-- <img"
    )


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pages.page(tmp_path_factory.mktemp("long_page"), pages.long_text())


def test_two_thousand_tokens_open_in_under_a_second(
    reader: Reader, long: Path, record_property: Callable[[str, object], None]
) -> None:
    """From the start of the navigation until all is drawn; the best of three, as others may work."""
    times = []
    for _ in range(3):
        reader.open(long)
        times.append(
            float(str(reader.run("return performance.getEntriesByName('ready')[0].startTime")))
        )
    print(f"{min(times):.0f} ms, {long.stat().st_size / 1e6:.1f} MB")
    record_property("milliseconds", min(times))
    assert min(times) < 1000
    assert reader.text("#count") == "2,000 tokens"
    assert long.stat().st_size <= 5 * 2**20


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_wider_than_the_window(reader: Reader, long: Path, width: int) -> None:
    reader.open(long, width=width)

    def fits() -> bool:
        return bool(reader.run("return document.documentElement.scrollWidth <= innerWidth"))

    assert fits()
    reader.one("#run summary").click()
    reader.token(3).click()
    assert reader.text("#details .heading").startswith(reader.token(3).text)
    assert fits()
    assert reader.run("const d = document.getElementById('details'); return d.scrollWidth <= d.clientWidth")  # fmt: skip
    reader.press(Keys.ESCAPE)
    reader.choose("order", "loss")
    assert fits()


def test_where_texts_were_left_out_the_page_says_so(
    reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fairseq_knnlm.explanation.page.MOST_BYTES", 100_000)
    path = tmp_path / "page.html"
    pages.write_page(path, pages.RUN, [pages.cats(), pages.long_text(), pages.dogs()])
    reader.open(path)
    assert "2 more texts did not fit on this page" in reader.text(".reading")
