"""What is built of the package has all of it, and works where nothing else of the tree is."""

from __future__ import annotations

import shutil
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, Lab, must
from stores import random_entries, write_store

import fairseq_knnlm

VERSION = fairseq_knnlm.__version__
#: What is no part of the source, though it may lie in its folder.
LEFT_BEHIND = shutil.ignore_patterns(
    *(".*", "__pycache__", "*.egg-info", "build", "dist", "demo", "bench", "checkpoints", "outputs")
)


@pytest.fixture(scope="module", autouse=True)
def _no_other_way() -> Iterator[None]:
    """Nothing is imported from where the tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONPATH", raising=False)
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and a source distribution, made of a copy of the tree."""
    place = tmp_path_factory.mktemp("built")
    tree, dist = place / "tree", place / "dist"
    shutil.copytree(ROOT, tree, ignore=LEFT_BEHIND)
    must(sys.executable, "setup.py", "-q", "sdist", "-d", dist, cwd=tree)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    must(*pip, "-w", dist, tree, cwd=place)
    return dist


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The executables of a fresh environment with the wheel in it.

    The libraries are those of this environment: their folder is on its path, but neither its
    ``.pth`` files nor, with them, the package as it is installed here.
    """
    place = tmp_path_factory.mktemp("environment")
    must(sys.executable, "-m", "venv", "--without-pip", place, cwd=place)
    libraries = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (libraries_of(place) / "libraries.pth").write_text("\n".join(libraries))
    pip = [sys.executable, "-m", "pip", "--python", place / "bin/python", "install", "--no-index"]
    must(*pip, "--no-deps", *built.glob("*.whl"), cwd=place)
    return place / "bin"


def libraries_of(environment: Path) -> Path:
    base = {"base": str(environment), "platbase": str(environment)}
    return Path(sysconfig.get_path("purelib", "venv", base))


def package_files() -> set[str]:
    package = ROOT / "fairseq_knnlm"
    files = {*package.rglob("*.py"), package / "py.typed", *package.glob("explanation/template/*")}
    return {str(file.relative_to(ROOT)) for file in files}


def test_the_wheel_has_every_file(built: Path) -> None:
    (wheel,) = built.glob(f"*-{VERSION}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if ".dist-info/" not in name} == package_files()


def test_the_source_has_every_file_and_what_a_reader_looks_for(built: Path) -> None:
    (source,) = built.glob(f"*-{VERSION}.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    documents = {str(file.relative_to(ROOT)) for file in (ROOT / "docs").rglob("*.md")}
    assert names >= package_files() | documents
    assert names >= {"LICENSE", "README.md", "CHANGELOG.md", "setup.py", "pyproject.toml"}


def test_it_is_the_installed_package_that_runs(installed: Path, tmp_path: Path) -> None:
    found = must(
        *(installed / "python", "-c"),
        "import fairseq_knnlm as p, importlib.metadata as m\n"
        "print(p.__file__, p.__version__, m.version('fairseq-knnlm'))",
        cwd=tmp_path,
    )
    file, *versions = found.split()
    assert Path(file).is_relative_to(installed.parent)
    assert versions == [VERSION, VERSION]


def test_the_command_works_from_anywhere(installed: Path, tmp_path: Path) -> None:
    command = installed / "fairseq-knnlm"
    assert "build-index" in must(command, "--help", cwd=tmp_path)
    write_store(tmp_path / "store", *random_entries(300, 8))
    assert "300 entries of width 8" in must(command, "info", "--dstore", "store", cwd=tmp_path)
    must(command, "build-index", "--dstore", "store", cwd=tmp_path)
    assert "index        Flat" in must(command, "info", "--dstore", "store", cwd=tmp_path)


def test_fairseq_takes_the_installed_folder(
    installed: Path, lab: Lab, datastore: Path, tmp_path: Path
) -> None:
    """As ``--user-dir``. ``fairseq-eval-lm`` is a script of this environment, run by the other."""
    package = libraries_of(installed.parent) / "fairseq_knnlm"
    knn = ["--user-dir", package, "--knnlm", "--dstore-filename", datastore, "--k", 8]
    said = must(
        installed / "python",
        Path(sys.executable).with_name("fairseq-eval-lm"),
        *lab.command("valid", *knn),
        cwd=tmp_path,
    )
    assert "kNN-LM" in said
