"""The package's rooms: imports run downwards, and each outside library has its place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = "fairseq_knnlm"
#: From the ground up. A module imports from the rows below its own, never from its own row.
STOREYS = [
    {"arrays", "background", "distances", "errors", "mixing", "report", "versions"},
    {"bounds", "files", "lm", "mixers", "recipes", "trial"},
    {"config", "datastore", "stock", "index", "calibration", "fitting", "ngram", "tables"},
    {"compress", "exact", "exam", "host", "legacy", "neighbours", "plots", "snapshots", "tune"},
    {"checks", "experts", "indexing", "verify"},
    {"cache", "panel", "pointers"},
    {"mixture", "scorer"},
    {"memory", "saving"},
    {"evaluation"},
    {"task", "cli"},
    {"__init__"},
]
#: What the design allows a module to import of the package, where it names it.
ALLOWED = {
    "arrays": set(),
    "errors": set(),
    "bounds": {"errors"},
    "mixers": {"errors"},
    "mixing": set(),
    "files": {"errors"},
    "report": set(),
    "host": {"errors", "stock"},
    "stock": {"bounds", "errors"},
    "lm": {"errors"},
    "recipes": {"errors"},
    "trial": set(),
    "datastore": {"arrays", "errors", "files"},
    "index": {"errors", "files", "trial"},
    "ngram": {"arrays", "errors", "files"},
    "tables": {"arrays", "errors", "files", "mixers"},
    "compress": {"bounds", "datastore", "errors", "files", "index"},
    "distances": set(),
    "exact": {"distances", "index"},
    "exam": {"index"},
    "neighbours": {"datastore", "distances", "errors", "files", "index"},
    "fitting": {"mixers", "mixing"},
    "experts": {"lm", "mixing", "neighbours", "ngram"},
    "panel": {"experts", "mixers", "mixing"},
    "pointers": {"experts", "neighbours"},
    "__init__": {"host", "task"},
}
MODULES = sorted(file.stem for file in (ROOT / PACKAGE).glob("*.py"))
every_module = pytest.mark.parametrize("module", MODULES)


@cache
def tree(module: str) -> ast.Module:
    return ast.parse((ROOT / PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def imported(module: str) -> set[str]:
    """Dotted names of all that is imported, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = f"{PACKAGE}.{node.module or ''}".rstrip(".") if node.level else node.module
            assert origin is not None
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


def neighbours_of(module: str) -> set[str]:
    """The package's modules that a module imports."""
    parts = [name.split(".") for name in imported(module)]
    return {rest[0] for first, *rest in parts if first == PACKAGE and rest}


def libraries_of(module: str) -> set[str]:
    return {name.split(".")[0] for name in imported(module)}


def calls(module: str) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree(module)) if isinstance(node, ast.Call))


def called(module: str, name: str) -> list[int]:
    """Lines on which the built-in of that name is called."""
    return [
        call.lineno
        for call in calls(module)
        if isinstance(call.func, ast.Name) and call.func.id == name
    ]


def test_the_package_is_flat() -> None:
    assert not [file for file in (ROOT / PACKAGE).rglob("*.py") if file.parent.name != PACKAGE]


@every_module
def test_every_module_has_its_place(module: str) -> None:
    storeys = [number for number, storey in enumerate(STOREYS) if module in storey]
    assert len(storeys) == 1, f"say in STOREYS, once, what {module} may be imported by"


def test_no_place_is_empty() -> None:
    """Modules that are gone leave the tables too."""
    assert set.union(*STOREYS) | set(ALLOWED) <= set(MODULES)


@every_module
def test_imports_run_downwards(module: str) -> None:
    height = next(number for number, storey in enumerate(STOREYS) if module in storey)
    below = set().union(*STOREYS[:height])
    assert neighbours_of(module) <= below


def test_no_cycles() -> None:
    """Whatever the table above says."""
    TopologicalSorter({module: neighbours_of(module) for module in MODULES}).prepare()


@pytest.mark.parametrize("module", sorted(ALLOWED))
def test_the_design_is_kept(module: str) -> None:
    assert neighbours_of(module) <= ALLOWED[module]


@every_module
def test_ends_of_the_chain(module: str) -> None:
    """Nobody imports the command line, and the task only by importing the package."""
    assert "cli" not in neighbours_of(module)
    assert "task" not in neighbours_of(module) or module == "__init__"


@every_module
def test_faiss_has_a_room_to_build_to_examine_to_search_and_to_be_tried(module: str) -> None:
    assert "faiss" not in libraries_of(module) or module in {"index", "exam", "indexing", "trial"}


@every_module
def test_fairseq_stays_at_the_edge(module: str) -> None:
    """fairseq is imported where flags are read, where its scorer's name is lent to ours, and where
    its failures are told."""
    assert not libraries_of(module) & {"fairseq", "fairseq_cli"} or module in {
        *("config", "task", "cli", "host", "stock")
    }


@every_module
def test_flags_go_no_further_than_the_mixture(module: str) -> None:
    """Modules that read flags do so by way of ``config``; the others take plain arguments."""
    reads = "config" in neighbours_of(module) or "argparse" in libraries_of(module)
    assert not reads or module in {
        *("task", "cli", "config", "checks", "evaluation", "memory", "mixture")
    }


@every_module
def test_only_the_edge_prints(module: str) -> None:
    assert not called(module, "print") or module in {"cli", "host"}


@every_module
def test_nothing_runs_what_it_reads(module: str) -> None:
    """No pickle, no evaluation of text, no shell."""
    assert not libraries_of(module) & {"pickle", "cPickle", "dill", "cloudpickle", "joblib"}
    assert not called(module, "eval") + called(module, "exec")
    keywords = [
        (keyword.arg, keyword.value.value)
        for call in calls(module)
        for keyword in call.keywords
        if isinstance(keyword.value, ast.Constant)
    ]
    assert ("shell", True) not in keywords
    assert ("allow_pickle", True) not in keywords


@every_module
def test_numpy_is_told_to_refuse_pickle(module: str) -> None:
    """Every numpy.load says so, though it is the default."""
    for call in calls(module):
        function = call.func
        if (
            isinstance(function, ast.Attribute)
            and function.attr == "load"
            and isinstance(function.value, ast.Name)
            and function.value.id == "np"
        ):
            assert "allow_pickle" in {keyword.arg for keyword in call.keywords}


@every_module
def test_every_module_says_what_it_is_for(module: str) -> None:
    assert ast.get_docstring(tree(module))


def test_the_checks_see_what_they_look_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a module that does everything it should not."""
    (tmp_path / PACKAGE).mkdir()
    (tmp_path / PACKAGE / "bad.py").write_text(
        "import pickle\nfrom . import cli\nfrom .task import x\nimport fairseq_knnlm.lm.transformer\n"
        "def f():\n    import faiss.contrib\n    from fairseq_knnlm import index as i\n"
        "    from fairseq_knnlm.files import publish\n"
        "    print(eval('1'))\n    model.eval()\n"
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    tree.cache_clear()
    assert neighbours_of("bad") == {"cli", "task", "lm", "index", "files"}
    assert {"pickle", "faiss"} <= libraries_of("bad")
    assert called("bad", "eval") == called("bad", "print") == [9]
    tree.cache_clear()
