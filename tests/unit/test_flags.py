"""docs/flags.md says what the code says."""

from __future__ import annotations

import dataclasses
import re
import sys

import pytest
from conftest import ROOT

from fairseq_knnlm.cli import main

sys.path.insert(0, str(ROOT / "tools"))
import flags

PAGE = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
TASK, COMMAND = PAGE.split("## The command `fairseq-knnlm`\n")


def rows(text: str) -> list[list[str]]:
    """The cells of each flag's row."""
    found = re.findall(r"^\| `(.*) \|$", text, flags=re.MULTILINE)
    return [re.split(r" \| ", row.replace("` |", " |", 1)) for row in found]


def test_the_page_is_what_the_generator_prints() -> None:
    assert "\n".join(flags.page()) + "\n" == PAGE, "python tools/flags.py > docs/flags.md"


def test_every_flag_of_the_task_is_there_once() -> None:
    from fairseq.tasks.language_modeling import LanguageModelingConfig

    from fairseq_knnlm.tasks.flags import KnnlmConfig

    def names(cls: type) -> set[str]:
        return {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(cls)}

    there = [name for name, *_ in rows(TASK)]
    assert sorted(there) == sorted(names(KnnlmConfig) - names(LanguageModelingConfig))


def test_every_row_says_what_its_flag_does() -> None:
    for name, value, default, what in rows(PAGE):
        assert what, name
        assert value or default == "off", name


def test_every_subcommand_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    there = re.findall(r"^    ([a-z-]+)\b", capsys.readouterr().out, flags=re.MULTILINE)
    assert re.findall(r"^### (.*)$", COMMAND, flags=re.MULTILINE) == there


@pytest.mark.parametrize("name", re.findall(r"^###+ (.*)$", COMMAND, flags=re.MULTILINE))
def test_every_flag_of_a_subcommand_is_there(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    said = capsys.readouterr().out.split("options:")[1].split("example:")[0]
    ours = COMMAND.split(f"# {name}\n")[1].split("##")[0]
    there = {flag for flag, *_ in rows(ours) if flag.startswith("--")}
    assert there == set(re.findall(r"^  (--[a-z0-9-]+)", said, flags=re.MULTILINE))


def test_a_flag_that_no_group_knows_goes_to_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    known = flags.task_flags()
    new = flags.Flag("--oracle-lmbda", "`X`", "0.1", "weight of the oracle")
    monkeypatch.setattr(flags, "task_flags", lambda: {**known, "oracle_lmbda": new})
    _, text = "\n".join(flags.page()).split("### Experts and their mixture\n")
    assert new.row() in text.split("###")[0].splitlines()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("one (default: 3)", ("one", "3")),
        ("one (default: 3); more", ("one; more", "3")),
        ("default: l2", ("", "l2")),
        ("one", ("one", "")),
    ],
)
def test_defaults_are_told_from_what_a_flag_does(text: str, found: tuple[str, str]) -> None:
    assert flags._without_default(text) == found
