"""Draws the page of an explained text, as it stands in README.md.

    fairseq-knnlm explain ... --html page.html
    python docs/figures/screenshots.py page.html docs/figures

writes ``explain.png``, ``explain-dark.png`` and ``explain-narrow.png``. It needs selenium, pillow,
Chromium and its driver (``tools/browser.sh``). On them stands what stands out: of the tokens at the
beginning the one that a datastore helped most, with a source that agrees.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

#: Width, height, and the colours that a reader prefers.
PICTURES = {
    "explain": (1280, 900, "light"),
    "explain-dark": (1280, 900, "dark"),
    "explain-narrow": (400, 860, "light"),
}
#: Tokens that are surely on the first screen.
FIRST = 120


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", type=Path, help="what --html wrote")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--token", type=int, help="to show another token; the first is 1")
    words = parser.parse_args()
    driver = browser()
    try:
        for name, (width, height, colours) in PICTURES.items():
            look(driver, width, height, colours)
            driver.get(words.page.resolve().as_uri())
            WebDriverWait(driver, 20).until(is_ready)
            index = words.token - 1 if words.token else helped_most(driver)
            driver.execute_script("document.activeElement.blur()")
            choose(driver, index)
            save(driver.get_screenshot_as_png(), words.folder / f"{name}.png")
    finally:
        driver.quit()


def browser() -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    for flag in ["--headless=new", "--hide-scrollbars", "--disable-dev-shm-usage", *root]:
        options.add_argument(flag)
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    return webdriver.Chrome(options=options, service=service)


def look(driver: webdriver.Chrome, width: int, height: int, colours: str) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": colours}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def is_ready(driver: webdriver.Chrome) -> bool:
    return bool(driver.execute_script("return 'ready' in document.documentElement.dataset"))


def helped_most(driver: webdriver.Chrome) -> int:
    """The first of the tokens that gained most whose first source agrees; the first of all else."""
    fields = {name: driver.find_element(By.NAME, name) for name in ("expert", "order")}
    experts = [option.text for option in Select(fields["expert"]).options]
    if "knn" in experts:
        Select(fields["expert"]).select_by_value("knn")
    Select(fields["order"]).select_by_value("gain")
    rows = driver.find_elements(By.CSS_SELECTOR, "#ranking [data-index]")
    order = [int(row.get_attribute("data-index") or 0) for row in rows]
    Select(fields["order"]).select_by_value("text")
    Select(fields["expert"]).select_by_value("")
    for index in order:
        if index < FIRST:
            choose(driver, index)
            if driver.find_elements(By.CSS_SELECTOR, ".sources > .agrees:first-child"):
                return index
    return 0


def save(png: bytes, path: Path) -> None:
    """In 256 colours, which are as many as the eye sees here, and a third of the bytes."""
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(
        path, optimize=True
    )


def choose(driver: webdriver.Chrome, index: int) -> None:
    token = driver.find_element(By.CSS_SELECTOR, f"#text [data-index='{index}']")
    driver.execute_script("arguments[0].click()", token)


if __name__ == "__main__":
    main()
