"""What must load at once, in fresh processes: a datastore or a score table, anywhere, and help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli_calls import Capture, whole_store
from conftest import ROOT

#: Libraries that take seconds to load, are not everywhere, or only print what takes long itself.
HEAVY = {"faiss", "fairseq", "fairseq_cli", "matplotlib", "omegaconf", "ray", "rich", "torch"}
HEAVY |= {"sentencepiece", "tokenizers", "transformers"}
SUBCOMMANDS = (
    "encode",
    *("save", "build-index", "tune", "report", "replay", "explain", "info", "verify"),
    *(
        "compress",
        "forget",
        "compact",
        "append",
        "import",
        "cluster",
        "columns",
        "convert-checkpoint",
        "wrap",
    ),
)


def loaded(program: str, *words: object) -> set[str]:
    """The libraries in memory at the end of a program."""
    ending = f"""
import atexit, json, sys
sys.path.insert(0, {str(ROOT)!r})
tops = lambda: sorted({{name.partition('.')[0] for name in sys.modules}})
atexit.register(lambda: print('\\n' + json.dumps(tops())))
{program}
"""
    command = [sys.executable, "-c", ending, *map(str, words)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    return set(json.loads(done.stdout.splitlines()[-1]))


COMMAND = "from fairseq_knnlm.cli import main\nsys.exit(main())"


@pytest.mark.parametrize(
    "module",
    [
        "fairseq_knnlm",
        "fairseq_knnlm.files",
        "fairseq_knnlm.datastore",
        "fairseq_knnlm.datastore.legacy",
        "fairseq_knnlm.calibration.table",
    ],
)
def test_what_is_read_anywhere_loads_nothing_heavy(module: str) -> None:
    assert not loaded(f"import {module}") & HEAVY


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in SUBCOMMANDS)])
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    assert not loaded(COMMAND, *words) & HEAVY


def test_info_loads_nothing_heavy(tmp_path: Path, capsys: Capture) -> None:
    """With all that it can say something of."""
    store = whole_store(tmp_path, capsys)
    assert not loaded(COMMAND, "info", "--dstore", store.path) & HEAVY


def test_the_task_loads_nothing_of_transformers() -> None:
    """Nor what comes with it; a wrapped model does, where there is one."""
    optional = {"transformers", "tokenizers", "huggingface_hub", "sentencepiece"}
    assert not loaded("import fairseq_knnlm.tasks") & optional


def test_the_watch_sees_what_it_looks_for() -> None:
    assert "torch" in loaded("import torch")
