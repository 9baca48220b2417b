"""The package's folders: imports run one way, and each outside library has its place.

Every file of the package is held to this, whatever its folder. The order of the folders and what
each does stand in docs/architecture.md.
"""

from __future__ import annotations

import ast
import re
import sys
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
    *(GROUND, "files", "lm", "datastore", "index", "retrieval", "cluster"),
    *("experts", "mixture", "calibration", "explanation", "generation", "runs", "tasks", "cli"),
)
#: Folders that share no more than the ground: a datastore and an index know no language model.
APART = {"datastore": {"lm"}, "index": {"lm"}}
EVERYWHERE = set(FOLDERS)
WITH_TORCH = EVERYWHERE - {GROUND, "files", "datastore", "cli"}
#: Libraries, and those of the standard library that need watching -> folders or files.
LIBRARIES = {
    "argparse": {"cli", "tasks/converting"},
    "faiss": {"index"},
    "fairseq": {"tasks", "cli"},
    "fairseq_cli": {"tasks", "cli"},
    "matplotlib": {"calibration/curves"},
    "msgspec": EVERYWHERE,
    "numpy": EVERYWHERE,
    "omegaconf": {"tasks", "cli"},
    "ray": {"cluster"},
    "rich": {"cli"},
    "sentencepiece": {"runs/tokenizer"},
    "safetensors": {"calibration", "datastore", "files", "lm/hf_folder"},
    "subprocess": {"index/trial", "runs/conversion"},
    "torch": WITH_TORCH,
    "tqdm": EVERYWHERE - {GROUND},
    "tokenizers": {"runs/tokenizer"},
    "transformers": {"lm/causal"},
}
#: A file is read in one sitting.
LINES = 400
#: Names that stand for flags as they were typed.
FLAGS = {"args", "cfg"}
#: What runs text or a shell.
RUNNING = {"eval", "exec", "os.system", "os.popen"}
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
        return folder_of(self.name)

    @cached_property
    def text(self) -> str:
        return (self.package / f"{self.name}.py").read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def imported(self) -> set[str]:
        """Dotted names of all that is imported, inside functions too."""
        names: set[str] = set()
        for node in ast.walk(self.tree):
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

    def siblings(self) -> set[str]:
        """The package's files that it imports."""
        found = {self._file(name) for name in self.imported}
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

    def libraries(self) -> set[str]:
        names = {name.split(".")[0] for name in self.imported}
        return names - {PACKAGE, "__future__"}

    @cached_property
    def calls(self) -> list[ast.Call]:
        return [node for node in ast.walk(self.tree) if isinstance(node, ast.Call)]

    @cached_property
    def called(self) -> dict[str, list[int]]:
        """Functions by the name they are called by, as ``print`` or ``os.system``; the lines."""
        found: dict[str, list[int]] = {}
        for call in self.calls:
            found.setdefault(ast.unparse(call.func), []).append(call.lineno)
        return found

    @property
    def flags(self) -> list[str]:
        """Parameters and variables that stand for flags, with their lines."""
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.arg):
                annotation = ast.unparse(node.annotation) if node.annotation else ""
                if node.arg in FLAGS or "Namespace" in annotation:
                    found.append(f"{node.lineno}: {node.arg}")
            elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
                name = node.id if isinstance(node, ast.Name) else node.attr
                found += [f"{node.lineno}: {name}"] if name in FLAGS else []
        return found


def modules_of(package: Path) -> dict[str, Module]:
    files = sorted(package.rglob("*.py"))
    names = [file.relative_to(package).with_suffix("").as_posix() for file in files]
    return {name: Module(package, name) for name in names}


def folder_of(name: str) -> str:
    return name.rpartition("/")[0]


def inside(name: str, places: set[str]) -> bool:
    """Whether a file is one of these or lies in one of them."""
    return name in places or folder_of(name) in places


MODULES = modules_of(ROOT / PACKAGE)
TOP = MODULES["__init__"]
BELOW_THE_TOP = [module for module in MODULES.values() if module is not TOP]


def test_every_folder_has_its_place() -> None:
    """And no place in the order is empty."""
    assert {module.folder for module in MODULES.values()} == set(FOLDERS)


def test_the_order_is_the_documents() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z]+)/` \|", text, flags=re.MULTILINE)
    assert rows == [folder for folder in FOLDERS if folder != GROUND]


def test_imports_run_one_way() -> None:
    for module in BELOW_THE_TOP:
        place = FOLDERS.index(module.folder)
        before = set(FOLDERS[: place + 1]) - APART.get(module.folder, set())
        above = {name for name in module.siblings() if folder_of(name) not in before}
        assert not above, f"{module.name} may import from {sorted(before)}, and imports {above}"


def test_nobody_imports_the_edge() -> None:
    """The command line is imported by nobody, the task by the command line alone."""
    for module in BELOW_THE_TOP:
        reached = {folder_of(name) for name in module.siblings()} - {module.folder}
        assert "cli" not in reached, module.name
        assert "tasks" not in reached or module.folder == "cli", module.name


def test_the_package_itself_imports_the_task_at_most() -> None:
    assert TOP.siblings() <= {"tasks/__init__", "errors", "versions"}


def test_no_cycles() -> None:
    """Between files, within a folder as well."""
    TopologicalSorter({name: module.siblings() for name, module in MODULES.items()}).prepare()


def test_every_library_has_its_place() -> None:
    watched = sys.stdlib_module_names - set(LIBRARIES)
    for module in MODULES.values():
        for library in module.libraries() - watched:
            assert library in LIBRARIES, f"say where {library} may be imported ({module.name})"
            places = LIBRARIES[library]
            assert inside(module.name, places), f"{module.name}: {library} has {sorted(places)}"


def test_flags_stay_at_the_edge() -> None:
    """Below tasks and cli there are typed options, and no flags as they were typed."""
    below = [module for module in MODULES.values() if module.folder not in {"tasks", "cli"}]
    assert not {module.name: module.flags for module in below if module.flags}


def test_only_the_edge_prints() -> None:
    """What goes wrong before fairseq can say so is said by tasks/host."""
    printing = {name for name, module in MODULES.items() if "print" in module.called}
    assert not {name for name in printing if not inside(name, {"cli", "tasks/host"})}


def test_nothing_runs_what_it_reads() -> None:
    """No pickle, no evaluation of text, no shell."""
    for module in MODULES.values():
        assert not module.libraries() & {"pickle", "cPickle", "dill", "cloudpickle", "joblib"}
        assert not set(module.called) & RUNNING, module.name
        keywords = [
            (keyword.arg, keyword.value.value)
            for call in module.calls
            for keyword in call.keywords
            if isinstance(keyword.value, ast.Constant)
        ]
        assert not {("shell", True), ("allow_pickle", True)} & set(keywords), module.name


def test_numpy_is_told_to_refuse_pickle() -> None:
    """Every numpy.load says so, though it is the default."""
    for module in MODULES.values():
        for call in module.calls:
            if ast.unparse(call.func) in {"np.load", "numpy.load"}:
                said = {keyword.arg for keyword in call.keywords}
                assert "allow_pickle" in said, f"{module.name}:{call.lineno}"


def test_pytorch_is_told_to_open_weights_alone() -> None:
    """Every torch.load says so, though it is the default; by another name nobody calls it."""
    for module in MODULES.values():
        assert not {"torch.load", "torch.serialization.load"} & module.imported, module.name
        for call in module.calls:
            if ast.unparse(call.func).endswith("torch.load"):
                said = {word.arg: ast.unparse(word.value) for word in call.keywords}
                assert said.get("weights_only") == "True", f"{module.name}:{call.lineno}"


def test_every_module_says_what_it_is_for() -> None:
    assert not [name for name, module in MODULES.items() if not ast.get_docstring(module.tree)]


def test_every_file_is_read_in_one_sitting() -> None:
    lengths = {name: len(module.text.splitlines()) for name, module in MODULES.items()}
    assert not {name: length for name, length in lengths.items() if length > LINES}


def words_of_our_own(text: str) -> list[str]:
    """Those of ``OUR_OWN`` that stand in a text, alone or in a name of any spelling."""
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", text)
    return OUR_OWN.findall(parts.lower())


def written() -> list[Path]:
    """All that is written for people, code and documents.

    Without this file, which has to name the words, and the change log, which says what became of
    names of before.
    """
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "Makefile", ROOT / "setup.py"]
    for folder in (PACKAGE, "tests", "examples", "benchmarks", "tools"):
        found += [path for end in ("py", "sh", "md") for path in ROOT.glob(f"{folder}/**/*.{end}")]
    return sorted(set(found) - {Path(__file__).resolve(), ROOT / "CHANGELOG.md"})


def test_the_words_are_those_of_the_field() -> None:
    found = {}
    for path in written():
        name = str(path.relative_to(ROOT))
        lines = [name, *path.read_text(encoding="utf-8").splitlines()]
        at = [number for number, line in enumerate(lines) if words_of_our_own(line)]
        found |= {f"{name}:{number}": lines[number].strip() for number in at}
    assert not found, "\n".join(f"{place}: {line}" for place, line in found.items())


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
    assert bad.libraries() == {"pickle", "faiss"}
    assert bad.called["eval"] == bad.called["print"] == [8]
    assert bad.called["np.load"] == [10]
    assert sorted(bad.flags) == ["4: args", "4: cfg", "4: x", "6: cfg"]


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
