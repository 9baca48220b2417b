"""``fairseq-knnlm``: words to a subcommand, failures to exit codes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cli_calls import Capture, call, small_store
from conftest import run

from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.runs import build_index


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    return small_store(tmp_path)


@pytest.mark.parametrize("words", [[], ["nonsense"], ["info"], ["info", "--dstore", "x", "--y"]])
def test_wrong_words_get_the_usage(words: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        call(*words)
    assert caught.value.code == 2
    assert "usage: fairseq-knnlm" in capsys.readouterr().err


def test_an_interruption_is_told_without_a_traceback(
    store: Datastore, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build_index, "build", interrupt)
    assert call("build-index", "--dstore", store.path) == 130
    assert "nothing was published" in capsys.readouterr().err
    assert not store.index_path.exists()


@pytest.mark.slow
def test_info_into_a_pipe_that_closes(store: Datastore) -> None:
    """``info | head``, as a process."""
    command = f"fairseq-knnlm info --dstore {store.path} | head -n 1; echo ${{PIPESTATUS[@]}}"
    ran = run("bash", "-c", f"export PATH={Path(sys.executable).parent}:$PATH; {command}")
    assert ran.out.splitlines() == [f"{store.path}: 400 entries of width 8", "0 0"]


def test_it_is_a_module_too() -> None:
    ran = run(sys.executable, "-m", "fairseq_knnlm.cli", "info", "--help")
    assert (ran.code, ran.out.partition("\n")[0].split()[:3]) == (
        0,
        "usage: fairseq-knnlm info".split(),
    )


def test_without_faiss_the_message_says_what_to_install(store: Datastore) -> None:
    """And nothing else is the worse for it."""
    program = (
        "import sys; sys.modules['faiss'] = None\n"
        "from fairseq_knnlm.cli import main; sys.exit(main())"
    )
    ran = run(sys.executable, "-c", program, "build-index", "--dstore", store.path)
    assert ran.code == 1
    assert ran.out.startswith("error: FAISS is not installed")
    assert "pip install faiss-cpu" in ran.out
    assert run(sys.executable, "-c", program, "info", "--dstore", store.path).code == 0
