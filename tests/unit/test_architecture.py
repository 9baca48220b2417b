"""The package's folders: imports run one way, and each outside library has its place.

Every file of the package is held to this, whatever its folder. The order of the folders and what
each does stand in docs/architecture.md.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = "fairseq_knnlm"
#: Modules that lie in no folder; they import one another at most.
GROUND = ""
#: From the ground up. A folder imports itself and those before it.
FOLDERS = (
    *(GROUND, "files", "lm", "datastore", "index", "retrieval", "experts", "mixture"),
    *("calibration", "runs", "tasks", "cli"),
)
#: Folders that share no more than the ground: a datastore and an index know no language model.
APART = {"datastore": {"lm"}, "index": {"lm"}}
EVERYWHERE = set(FOLDERS)
WITH_TORCH = EVERYWHERE - {GROUND, "files", "datastore", "cli"}
#: Libraries, and those of the standard library that need watching -> folders or files.
LIBRARIES = {
    "argparse": {"cli"},
    "faiss": {"index"},
    "fairseq": {"tasks", "cli"},
    "fairseq_cli": {"tasks", "cli"},
    "matplotlib": {"calibration/curves"},
    "msgspec": EVERYWHERE,
    "numpy": EVERYWHERE,
    "omegaconf": {"tasks", "cli"},
    "rich": {"cli", "runs"},
    "safetensors": {"calibration", "datastore", "files"},
    "subprocess": {"index/trial"},
    "torch": WITH_TORCH,
    "tqdm": EVERYWHERE - {GROUND},
}
#: What can be read anywhere, at once -> the libraries that reading it must not load.
LIGHT = (GROUND, "files", "datastore", "calibration/table", "mixture/components")
HEAVY = {"torch", "fairseq", "fairseq_cli", "faiss", "matplotlib", "omegaconf"}
#: A file is read in one sitting.
LINES = 400
#: Names that stand for flags as they were typed.
FLAGS = {"args", "cfg"}
#: Words that a reader would have to learn here first, alone or as a part of a name.
OUR_OWN = re.compile(
    r"(?<![a-z])(panels?|opinions?|verdicts?|passages?|wishes|exams?|storeys?|silent)(?![a-z])"
)


@dataclass(frozen=True)
class Module:
    """A file of the package.

    Attributes:
        package: the package's folder.
        name: the file from there, such as ``index/build`` or ``files/__init__``.
    """

    package: Path
    name: str

    @property
    def folder(self) -> str:
        return self.name.rpartition("/")[0]

    @cached_property
    def text(self) -> str:
        return (self.package / f"{self.name}.py").read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    def imported(self, *, late: bool = True) -> set[str]:
        """Dotted names of all that is imported; inside functions too unless not ``late``."""
        names: set[str] = set()
        for node in ast.walk(self.tree) if late else at_once(self.tree):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                origin = ".".join(filter(None, (self._above(node.level), node.module)))
                names |= {f"{origin}.{alias.name}" for alias in node.names}
        return names

    def _above(self, level: int) -> str:
        """The package that the dots of a relative import stand for."""
        if not level:
            return ""
        parts = [PACKAGE, *self.name.split("/")]
        return ".".join(parts[:-level])

    def siblings(self, *, late: bool = True) -> set[str]:
        """The package's files that it imports."""
        found = {self._file(name) for name in self.imported(late=late)}
        return {name for name in found if name}

    def _file(self, dotted: str) -> str:
        first, *parts = dotted.split(".")
        if first != PACKAGE:
            return ""
        for size in range(len(parts), -1, -1):
            path = "/".join(parts[:size])
            for name in (path, f"{path}/__init__".lstrip("/")):
                if (self.package / f"{name}.py").is_file():
                    return name
        return ""

    def libraries(self, *, late: bool = True) -> set[str]:
        names = {name.split(".")[0] for name in self.imported(late=late)}
        return names - {PACKAGE, "__future__"}

    @property
    def calls(self) -> Iterator[ast.Call]:
        return (node for node in ast.walk(self.tree) if isinstance(node, ast.Call))

    def called(self, name: str) -> list[int]:
        """Lines on which a function is called by such a name, as ``print`` or ``np.load``."""
        return [call.lineno for call in self.calls if ast.unparse(call.func) == name]

    @property
    def flags(self) -> list[str]:
        """Parameters and variables that stand for flags, with their lines.

        What a function or a hook takes by position is called ``args`` too: a tuple.
        """
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.arg):
                annotation = ast.unparse(node.annotation) if node.annotation else ""
                named = node.arg in FLAGS and not annotation.startswith("tuple[")
                if (named or "Namespace" in annotation) and node not in self._by_position:
                    found.append(f"{node.lineno}: {node.arg}")
            elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
                name = node.id if isinstance(node, ast.Name) else node.attr
                found += [f"{node.lineno}: {name}"] if name in FLAGS else []
        return found

    @cached_property
    def _by_position(self) -> list[ast.arg | None]:
        """``*args`` and ``**kwargs``."""
        every = [node for node in ast.walk(self.tree) if isinstance(node, ast.arguments)]
        return [one for node in every for one in (node.vararg, node.kwarg)]


def at_once(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: none in functions or for type checkers."""
    for node in ast.iter_child_nodes(tree):
        checked = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not checked and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
            yield from at_once(node)


def modules_of(package: Path) -> dict[str, Module]:
    files = sorted(package.rglob("*.py"))
    names = [file.relative_to(package).with_suffix("").as_posix() for file in files]
    return {name: Module(package, name) for name in names}


def inside(name: str, places: set[str]) -> bool:
    """Whether a file is one of these or lies in one of them."""
    return name in places or name.rpartition("/")[0] in places


MODULES = modules_of(ROOT / PACKAGE)
TOP = MODULES["__init__"]
BELOW_THE_TOP = [name for name in MODULES if name != "__init__"]
every_module = pytest.mark.parametrize("module", MODULES.values(), ids=list(MODULES))
below_the_top = pytest.mark.parametrize(
    "module", [MODULES[name] for name in BELOW_THE_TOP], ids=BELOW_THE_TOP
)


def test_every_folder_has_its_place() -> None:
    """And no place in the order is empty."""
    assert {module.folder for module in MODULES.values()} == set(FOLDERS)


@below_the_top
def test_imports_run_one_way(module: Module) -> None:
    place = FOLDERS.index(module.folder)
    before = set(FOLDERS[: place + 1]) - APART.get(module.folder, set())
    found = {name for name in module.siblings() if name.rpartition("/")[0] not in before}
    assert not found, f"{module.name} may import from {sorted(before)}"


@below_the_top
def test_nobody_imports_the_edge(module: Module) -> None:
    """The command line is imported by nobody, the task by the command line alone."""
    reached = {name.rpartition("/")[0] for name in module.siblings()} - {module.folder}
    assert "cli" not in reached
    assert "tasks" not in reached or module.folder == "cli"


def test_the_package_itself_imports_the_task_at_most() -> None:
    assert TOP.siblings() <= {"tasks/__init__", "errors", "versions"}


def test_no_cycles() -> None:
    """Between files, within a folder as well."""
    TopologicalSorter({name: module.siblings() for name, module in MODULES.items()}).prepare()


@every_module
def test_every_library_has_its_place(module: Module) -> None:
    outside = module.libraries() - (sys.stdlib_module_names - set(LIBRARIES))
    for library in outside:
        assert library in LIBRARIES, f"say in LIBRARIES where {library} may be imported"
        places = LIBRARIES[library]
        assert inside(module.name, places), f"{library} is imported in {sorted(places)} alone"


@pytest.mark.parametrize("place", LIGHT)
def test_what_is_read_anywhere_loads_nothing_heavy(place: str) -> None:
    """By way of nobody: not when it is imported."""
    waiting = [name for name in BELOW_THE_TOP if inside(name, {place})]
    assert waiting, f"nothing is called {place} any more"
    seen: set[str] = set()
    while waiting:
        module = MODULES[waiting.pop()]
        seen.add(module.name)
        assert not module.libraries(late=False) & HEAVY, f"{place} imports {module.name}"
        waiting += module.siblings(late=False) - seen


@below_the_top
def test_flags_stay_at_the_edge(module: Module) -> None:
    """Below tasks and cli there are typed options, and no flags as they were typed."""
    assert module.folder in {"tasks", "cli"} or not module.flags


@every_module
def test_only_the_edge_prints(module: Module) -> None:
    """What goes wrong before fairseq can say so is said by tasks/host."""
    assert not module.called("print") or inside(module.name, {"cli", "tasks/host"})


@every_module
def test_nothing_runs_what_it_reads(module: Module) -> None:
    """No pickle, no evaluation of text, no shell."""
    assert not module.libraries() & {"pickle", "cPickle", "dill", "cloudpickle", "joblib"}
    for name in ("eval", "exec", "os.system", "os.popen", "torch.load"):
        assert not module.called(name)
    keywords = [
        (keyword.arg, keyword.value.value)
        for call in module.calls
        for keyword in call.keywords
        if isinstance(keyword.value, ast.Constant)
    ]
    assert ("shell", True) not in keywords
    assert ("allow_pickle", True) not in keywords


@every_module
def test_numpy_is_told_to_refuse_pickle(module: Module) -> None:
    """Every numpy.load says so, though it is the default."""
    for call in module.calls:
        if ast.unparse(call.func) in {"np.load", "numpy.load"}:
            assert "allow_pickle" in {keyword.arg for keyword in call.keywords}


@every_module
def test_every_module_says_what_it_is_for(module: Module) -> None:
    assert ast.get_docstring(module.tree)


@every_module
def test_every_file_is_read_in_one_sitting(module: Module) -> None:
    assert len(module.text.splitlines()) <= LINES


def words_of_our_own(text: str) -> list[str]:
    """Those of ``OUR_OWN`` that stand in a text, alone or in a name of any spelling."""
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", text)
    return OUR_OWN.findall(parts.lower())


def written() -> list[Path]:
    """All that is written for people: code and documents. This file has to name the words."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "Makefile", ROOT / "setup.py"]
    for folder in (PACKAGE, "tests", "examples", "benchmarks", "tools"):
        found += [path for end in ("py", "sh", "md") for path in ROOT.glob(f"{folder}/**/*.{end}")]
    return [path for path in sorted(found) if path != Path(__file__).resolve()]


@pytest.mark.parametrize("path", written(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_words_are_those_of_the_field(path: Path) -> None:
    assert not words_of_our_own(str(path.relative_to(ROOT)))
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        assert not words_of_our_own(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def test_the_checks_see_what_they_look_for(tmp_path: Path) -> None:
    """On a module that does everything it should not."""
    package = tmp_path / PACKAGE
    for name, text in {
        "__init__": "",
        "cli/__init__": "",
        "index/build": "",
        "files/__init__": "def publish(): ...",
        "index/bad": (
            "import pickle\nfrom .. import cli\nfrom . import build as b\n"
            "def f(args, x: 'argparse.Namespace', *cfg, hook: tuple[int, ...]):\n"
            "    import faiss.contrib\n    cfg = 1\n"
            "    from fairseq_knnlm.files import publish\n"
            "    print(eval('1'))\n    model.eval()\n    np.load(x)\n"
        ),
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").write_text(text)
    modules = modules_of(package)
    bad = modules["index/bad"]
    assert set(modules) == {
        "__init__",
        "cli/__init__",
        "files/__init__",
        "index/bad",
        "index/build",
    }
    assert bad.siblings() == {"cli/__init__", "index/build", "files/__init__"}
    assert bad.siblings(late=False) == {"cli/__init__", "index/build"}
    assert bad.libraries() == {"pickle", "faiss"}
    assert bad.libraries(late=False) == {"pickle"}
    assert bad.called("eval") == bad.called("print") == [8]
    assert bad.called("np.load") == [10]
    assert sorted(bad.flags) == ["4: args", "4: x", "6: cfg"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a PanelOfExperts", ["panel"]),
        ("_wishes, EXAM and exam_keys", ["wishes", "exam", "exam"]),
        ("examples, examined, wish, silently", []),
        ("PASSAGES", ["passages"]),
    ],
)
def test_words_are_found_in_names_of_any_spelling(text: str, found: list[str]) -> None:
    assert words_of_our_own(text) == found
