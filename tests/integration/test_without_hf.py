"""The extra ``hf``: what is said where it is missing, and that nobody loads it who has no need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_calls import Capture, refuse
from conftest import BLOCKS, ROOT, Lab, eval_lm
from tiny_world import PLUGIN

from fairseq_knnlm.errors import ConfigError

#: What comes with the extra, directly or not.
EXTRA = {"transformers", "tokenizers", "huggingface_hub"}
#: Runs a console command in a process of its own, and writes what it has loaded.
PROGRAM = """
import atexit, importlib, json, sys
name, to, *sys.argv[1:] = sys.argv[1:]
atexit.register(lambda: open(to, "w").write(json.dumps(sorted(sys.modules))))
sys.exit(importlib.import_module(name).cli_main())
"""


def loaded(to: Path, command: str, *words: object) -> set[str]:
    """The modules in memory when a command of fairseq's ends, which must be well."""
    typed = [sys.executable, "-c", PROGRAM, command, *map(str, [to, *words])]
    path = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        typed, env={**os.environ, **path}, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return set(json.loads(to.read_text()))


def test_who_uses_models_of_fairseq_loads_nothing_of_it(
    lab: Lab, datastore: Path, tmp_path: Path
) -> None:
    """Evaluating with a memory, from beginning to end, installed or not."""
    knn = ("--knnlm", "--dstore-filename", datastore, "--k", 4, "--lmbda", 0.2)
    found = loaded(tmp_path / "names", "fairseq_cli.eval_lm", *lab.command("test", *knn))
    assert "fairseq_knnlm.tasks.knn_lm" in found
    assert EXTRA.isdisjoint(found)


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both libraries, as if they were not installed."""
    for name in ("transformers", "tokenizers"):
        monkeypatch.setitem(sys.modules, name, None)


INSTALL = "pip install 'fairseq-knnlm[hf]'"


def told_once(said: str) -> None:
    assert said.count("error: ") == 1
    assert "is not installed" in said and INSTALL in said


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory: Any) -> Path:
    """A model of transformers in ``hf``, wrapped in ``out``, and some text in its tokens."""
    from hf_models import save_model

    from fairseq_knnlm.runs.wrapping import wrap

    folder: Path = tmp_path_factory.mktemp("wrapped")
    save_model(folder / "hf", "gpt2")
    wrap(folder / "hf", folder / "out", None, None)
    (folder / "train.txt").write_text("w5 w6 w7\n")
    return folder


@pytest.mark.usefixtures("missing")
def test_commands_that_need_it(wrapped: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    told_once(refuse(capsys, "wrap", "--hf", wrapped / "hf", "--out", out))
    for tokenizer in ("hf", "out"):
        words = (wrapped / "train.txt", "--tokenizer", wrapped / tokenizer, "--out", out)
        told_once(refuse(capsys, "encode", *words))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("missing")
@pytest.mark.parametrize("command", ["save", "generate", "explain", "eval-lm"])
def test_a_wrapped_model(
    lab: Lab, datastore: Path, wrapped: Path, tmp_path: Path, capsys: Capture, command: str
) -> None:
    """Any command that opens it, before the model is looked for in any other way."""
    model = (lab.data, "--path", wrapped / "out" / "checkpoint.pt", "--cpu")
    if command == "eval-lm":
        words = [*model, *PLUGIN, "--gen-subset", "test", *BLOCKS, "--num-workers", 0]
        with pytest.raises(ConfigError, match="is not installed") as told:
            eval_lm([str(word) for word in words])
        assert INSTALL in str(told.value)
        return
    (tmp_path / "prompts").write_text("w1\n")
    more = {
        "save": ("--dstore", tmp_path / "store", *BLOCKS),
        "generate": ("--dstore", datastore, "--prompts", tmp_path / "prompts"),
        "explain": ("--dstore", datastore, "--text", "w1 w2"),
    }[command]
    told_once(refuse(capsys, command, *model, *more))
    assert not (tmp_path / "store").exists()


@pytest.mark.usefixtures("missing")
def test_bpe_of_a_wrapped_model(wrapped: Path) -> None:
    from omegaconf import OmegaConf

    from fairseq_knnlm.tasks.hf_tokenizer import HfTokenizer

    file = str(wrapped / "out" / "tokenizer.json")
    with pytest.raises(ConfigError, match="is not installed") as told:
        HfTokenizer(OmegaConf.create({"hf_tokenizer": file}))
    assert INSTALL in str(told.value)
