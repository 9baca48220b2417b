"""What README tells a reader to type, typed in order on a tiny text with a tiny model."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, write_corpus

from fairseq_knnlm.cli import main

README = (ROOT / "README.md").read_text(encoding="utf-8")
#: Sizes that a test has no time for. Each has to be there, so that none slips through unscaled.
SCALED = {
    "--decoder-layers 4": "--decoder-layers 1",
    "--decoder-embed-dim 256": "--decoder-embed-dim 32",
    "--decoder-input-dim 256": "--decoder-input-dim 32",
    "--decoder-output-dim 256": "--decoder-output-dim 32",
    "--decoder-ffn-embed-dim 1024": "--decoder-ffn-embed-dim 64",
    "--warmup-updates 200": "--warmup-updates 5",
    "--max-update 4000": "--max-update 30",
    "--pca 128": "--pca 16",
}
#: How the blocks of a shell begin; others show what a command prints.
COMMANDS = ("fairseq-", "python ", "READ=")


def section(title: str) -> str:
    """What stands under a heading, up to the next one."""
    _, text = README.split(f"## {title}\n")
    return re.split(r"^#+ ", text, flags=re.MULTILINE)[0]


def blocks(text: str, language: str = "") -> list[str]:
    """The fenced blocks of a language, without their fences."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    return [block for block in blocks(text) if block.startswith(COMMANDS)]


def scaled(script: str) -> str:
    for large, small in SCALED.items():
        assert large in script, f"{large} is not in README any more: mend SCALED"
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


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A place like the clone in which all was typed, and what was printed there."""
    place = tmp_path_factory.mktemp("clone")
    for folder in ("fairseq_knnlm", "examples"):
        (place / folder).symlink_to(ROOT / folder)
    (place / "text").mkdir()
    write_corpus(place / "text", held_out=200)
    script = scaled("\n".join(commands(section("The same with your own text"))))
    return place, run_as_typed("bash", "-euo", "pipefail", "-c", script, cwd=place)


@pytest.mark.slow
def test_the_commands_for_your_own_text_work_in_order(typed: tuple[Path, str]) -> None:
    place, said = typed
    ours = section("The same with your own text")
    for line in blocks(ours.split("The end of the report looks like this")[1])[0].splitlines():
        start, *_ = line.split("...")  # figures are left out, and k is smaller here
        assert re.search(re.escape(start.split(" 1024,")[0]) + ".*", said), line
    for made in ("valid.npz", "calibration.json", "knn.index", "ngram.npz"):
        assert (place / "dstore" / made).is_file()
    for made in ("streamed/knn.index", "smaller/knn.index", "test.json"):
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
    found = blocks(section("From Python"), "python")
    assert len(found) == 2
    run_as_typed("python", "-c", "\n".join(found), cwd=place)


def test_every_flag_is_in_the_table() -> None:
    from fairseq.tasks.language_modeling import LanguageModelingConfig

    from fairseq_knnlm.tasks.flags import KnnlmConfig

    def flags(cls: type) -> set[str]:
        return {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(cls)}

    ours = flags(KnnlmConfig) - flags(LanguageModelingConfig)
    table, _ = section("Flags").split("The command `fairseq-knnlm`")
    rows = re.findall(r"^\| (`--.*?) \|", table, flags=re.MULTILINE)
    assert set(re.findall(r"--[a-z0-9-]+", " ".join(rows))) <= ours
    assert ours <= set(re.findall(r"--[a-z0-9-]+", table))


def test_every_subcommand_is_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    there = re.findall(r"^    ([a-z-]+)\b", capsys.readouterr().out, flags=re.MULTILINE)
    named = re.findall(r"^\| `([a-z][a-z-]*) ", section("Flags"), flags=re.MULTILINE)
    assert sorted(named) == sorted(there)


def test_links_lead_somewhere() -> None:
    """In README and the other documents: to files that are there and headings that they have."""
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]:
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
