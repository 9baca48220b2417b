"""What README and the guide tell a reader to type, typed in order on a tiny text and model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, write_corpus

from fairseq_knnlm.datastore import open_datastore

README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
#: Sizes that a test has no time for. Each has to be there, so that none slips through unscaled.
SCALED = {
    "--decoder-layers 4": "--decoder-layers 1",
    "--decoder-embed-dim 256": "--decoder-embed-dim 32",
    "--decoder-input-dim 256": "--decoder-input-dim 32",
    "--decoder-output-dim 256": "--decoder-output-dim 32",
    "--decoder-ffn-embed-dim 1024": "--decoder-ffn-embed-dim 64",
    "--warmup-updates 200": "--warmup-updates 5",
    "--max-update 4000": "--max-update 30",
}
SCALED_IN_GUIDE = {"--pca 128": "--pca 16"}
SCALED_LARGE = {"--block-rows 100000": "--block-rows 1000", "--max-tokens 4096": "--max-tokens 512"}
#: How the blocks of a shell begin; others show what a command prints.
COMMANDS = ("fairseq-", "head ", "python ", "READ=", "for ")


def section(title: str, page: str = README) -> str:
    """What stands under a heading, up to the next one."""
    _, text = page.split(f"## {title}\n")
    return re.split(r"^#+ ", text, flags=re.MULTILINE)[0]


def blocks(text: str, language: str = "") -> list[str]:
    """The fenced blocks of a language, without their fences."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [block for kind, block in found if kind == language]


def commands(text: str) -> list[str]:
    """Blocks to be typed as they are; those with brackets are patterns."""
    return [block for block in blocks(text) if block.startswith(COMMANDS) and "[" not in block]


def scaled(script: str, sizes: dict[str, str]) -> str:
    for large, small in sizes.items():
        assert large in script, f"{large} is not typed any more: mend the table of sizes"
        script = script.replace(large, small)
    return script


def run_as_typed(*words: str, cwd: Path) -> str:
    """Runs a command with the environment active, as README wants it."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run(
        words,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def run_script(script: str, place: Path) -> str:
    return run_as_typed("bash", "-euo", "pipefail", "-c", script, cwd=place)


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A place like the clone in which all was typed, and what was printed there."""
    place = tmp_path_factory.mktemp("clone")
    for folder in ("fairseq_knnlm", "examples"):
        (place / folder).symlink_to(ROOT / folder)
    (place / "text").mkdir()
    write_corpus(place / "text", held_out=200)
    script = scaled("\n".join(commands(section("The same with your own text"))), SCALED)
    return place, run_script(script, place)


@pytest.mark.slow
def test_the_commands_for_your_own_text_work_in_order(typed: tuple[Path, str]) -> None:
    place, said = typed
    ours = section("The same with your own text")
    for line in blocks(ours.split("The end of the report looks like this")[1])[0].splitlines():
        start, *_ = line.split("...")  # figures are left out, and k is smaller here
        assert re.search(re.escape(start.split(" 1024,")[0]) + ".*", said), line
    for made in ("valid.npz", "calibration.json", "knn.index", "ngram.npz"):
        assert (place / "dstore" / made).is_file()
    assert (place / "test.json").is_file()


@pytest.mark.slow
def test_the_commands_of_the_first_screen_work(typed: tuple[Path, str]) -> None:
    place, _ = typed
    first, _ = README.split("## The idea\n")
    said = run_script("\n".join(commands(first)), place)
    assert "(calibrated on valid)" in said
    assert (place / "memory" / "calibration.json").is_file()


@pytest.mark.slow
def test_the_commands_that_generate_go_on_with_prompts(typed: tuple[Path, str]) -> None:
    place, _ = typed
    ours = section("Generating")
    interactive, split, explained = commands(ours)
    test = (place / "text" / "test.txt").read_text(encoding="utf-8").splitlines()
    written = hypotheses(run_script(interactive, place))
    assert [text[:4] for text in written.values()] == [line.split()[:4] for line in test[:2]]
    assert any(len(text) > 4 for text in written.values())
    continued = hypotheses(run_script(split, place))
    assert continued.keys() == set(range(len(test)))
    assert all(text[:4] == test[number].split()[:4] for number, text in continued.items())
    assert any(text != test[number].split() for number, text in continued.items())
    (script,) = blocks(ours, "python")
    *_, said = run_as_typed("python", "-c", script, cwd=place).splitlines()
    assert len(said.split()) > len("tokens as in the training text".split())
    said = run_script(explained, place)
    assert "written to explain.html" in said
    assert (place / "explain.html").is_file()


@pytest.mark.slow
def test_larger_memories_are_the_same_whoever_makes_them(typed: tuple[Path, str]) -> None:
    place, _ = typed
    alone, shared, on_ray = (
        scaled(part, SCALED_LARGE) for part in commands(section("Larger memories"))
    )
    read, *_ = alone.splitlines()
    said = [run_script(f"{read}\n{script}", place) for script in (alone, shared, on_ray)]
    stores = [open_datastore(place / name) for name in ("large", "shared", "clustered")]
    assert len({store.fingerprint for store in stores}) == 1
    assert len(stores[0].blocks) > 2
    joined = re.findall(r"^kNN-LM\b.*?perplexity ([0-9.]+)", "\n".join(said), flags=re.MULTILINE)
    (*_, searched) = re.findall(r"\bPerplexity: ([0-9.]+)", said[2])
    assert joined == [searched, searched]


def hypotheses(said: str) -> dict[int, list[str]]:
    """The words of fairseq's H- lines, by their number."""
    found = re.findall(r"^H-(\d+)\t\S+\t(.*)$", said, flags=re.MULTILINE)
    return {int(number): words.split() for number, words in sorted(found)}


@pytest.mark.slow
def test_the_commands_of_the_guide_work_in_order(typed: tuple[Path, str]) -> None:
    place, _ = typed
    said = run_script(scaled("\n".join(commands(GUIDE)), SCALED_IN_GUIDE), place)
    assert "fitted on valid" in said
    for made in ("streamed/knn.index", "smaller/knn.index", "test.npz"):
        assert (place / made).is_file()


@pytest.mark.slow
def test_the_checkpoint_does_not_need_the_plugin(typed: tuple[Path, str]) -> None:
    from fairseq.checkpoint_utils import load_checkpoint_to_cpu

    place, _ = typed
    state = load_checkpoint_to_cpu(str(place / "checkpoints" / "checkpoint_best.pt"))
    assert state["cfg"]["task"]["_name"] == "language_modeling"


@pytest.mark.slow
def test_what_is_written_in_python_works(typed: tuple[Path, str]) -> None:
    place, _ = typed
    found = blocks(section("From Python", GUIDE), "python")
    assert len(found) == 2
    run_as_typed("python", "-c", "\n".join(found), cwd=place)


def test_the_picture_shows_the_table() -> None:
    """docs/figures/results.py draws it from README; here, that it was drawn since."""
    picture = (ROOT / "docs" / "figures" / "results.svg").read_text(encoding="utf-8")
    shown = re.findall(r">([0-9]+\.[0-9]{2})</text>", picture)
    table = re.findall(r"^\| .* \|$", section("What you get"), flags=re.MULTILINE)
    assert shown == re.findall(r"\b[0-9]+\.[0-9]{2}\b", "\n".join(table))
    assert len(shown) == 3 * 3


def test_links_lead_somewhere() -> None:
    """To files that are there and headings that they have."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/*.md")]
    assert len(pages) > 10
    for document in pages:
        text = document.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("http"):
                continue
            name, _, anchor = target.partition("#")
            file = (document.parent / name) if name else document
            assert file.exists(), f"{document.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), flags=re.MULTILINE)
                assert anchor in map(slug, headings), f"{document.name}: {target}"


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
