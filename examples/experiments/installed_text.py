"""The docstrings of every package of a Python environment, split by package so that nothing leaks.

Real text of some million words, at hand wherever Python packages are installed. The files are
parsed, never imported. Writes ``docstrings/train.txt``, ``valid.txt`` and ``test.txt``, a
paragraph a line, and ``packages.json``: which packages of which versions it was, and a fingerprint
of the text.
"""

import argparse
import hashlib
import json
import platform
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

# Also from a checkout that is not installed; and the demo, which reads docstrings too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo_corpus import (
    SPLITS,
    Corpus,
    Document,
    count_words,
    docstring_documents,
    drop_leaks,
    drop_repeats,
)

EXAMPLE = "example: python examples/experiments/installed_text.py --out text"
#: A held-out split is of this many packages at least, since each has words of its own.
PACKAGES = 10
#: A package with more than this share of all words trains: most of it would go unread elsewhere.
LARGE = 0.02


@dataclass(frozen=True)
class Package:
    """A release, such as ``attrs 26.1.0``, with its documents (modules) by name."""

    name: str
    documents: tuple[Document, ...]

    def first(self, words: int) -> list[Document]:
        """The first paragraphs, up to so many words."""
        kept = []
        for document in self.documents:
            paragraphs = []
            for paragraph in document.paragraphs:
                words -= len(paragraph.split())
                if words < 0:
                    break
                paragraphs.append(paragraph)
            if paragraphs:
                kept.append(Document(document.name, tuple(paragraphs)))
            if words < 0:
                break
        return kept


def read_packages(library: Path) -> list[Package]:
    """The packages under ``library``, each paragraph once in all of them."""
    release = releases(library)
    members: dict[str, list[Document]] = {}
    for document in drop_repeats(docstring_documents(library), set()):
        name = document.name.split(".")[0]
        members.setdefault(release.get(name, name), []).append(document)
    return [Package(name, tuple(documents)) for name, documents in members.items()]


def releases(library: Path) -> dict[str, str]:
    """Which release each name that can be imported is of: ``{"yaml": "PyYAML 6.0.2"}``.

    A release may hold several (``_pytest`` and ``pytest``), which must not be split.
    """
    return {
        name: f"{found.metadata['Name']} {found.version}"
        for found in distributions(path=[str(library)])
        for name in {Path(file.parts[0]).stem for file in found.files or ()}
    }


def shuffled(names: Iterable[str]) -> list[str]:
    """Names in an order that hangs on each alone, but for its version: the same everywhere."""
    return sorted(names, key=lambda name: hashlib.sha256(name.split(" ")[0].encode()).digest())


def split(packages: list[Package], held_out: int, words: int | None = None) -> Corpus:
    """Deals packages into train, valid and test.

    The documents of train are shuffled: the first part of it is a sample of all. A held-out
    package gives at most ``held_out // PACKAGES`` words; the rest of it is left out.

    Args:
        packages: of different names.
        held_out: words of valid, and of test.
        words: of train at most, a sample of its documents (default: all).
    """
    by_name = {package.name: package for package in packages}
    total = sum(count_words(package.documents) for package in packages)
    room = {"test": held_out, "valid": held_out}
    corpus: Corpus = {name: [] for name in SPLITS}
    for name in shuffled(by_name):
        package = by_name[name]
        some = package.first(held_out // PACKAGES)
        small = count_words(package.documents) <= LARGE * total
        to = next((s for s in room if small and count_words(some) <= room[s]), "train")
        if to in room:
            room[to] -= count_words(some)
        corpus[to] += some if to in room else package.documents
    train = {document.name: document for document in corpus["train"]}
    corpus["train"] = [train[name] for name in shuffled(train)]
    if words is not None:
        corpus["train"] = Package("train", tuple(corpus["train"])).first(words)
    drop_leaks([corpus])
    return corpus


def described(corpus: Corpus, packages: list[Package]) -> Iterator[dict[str, object]]:
    """Of each package in a corpus: its name, split and words."""
    for name, documents in corpus.items():
        words = {document.name: document.words for document in documents}
        for package in packages:
            if found := sum(words.get(document.name, 0) for document in package.documents):
                yield {"package": package.name, "split": name, "words": found}


def write(packages: list[Package], corpus: Corpus, folder: Path) -> dict[str, Any]:
    """Writes a corpus of packages and ``packages.json``; returns what the latter says."""
    (folder / "docstrings").mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    for name in SPLITS:
        text = "".join(p + "\n" for document in corpus[name] for p in document.paragraphs)
        data = text.encode("utf-8", errors="replace")
        (folder / "docstrings" / f"{name}.txt").write_bytes(data)
        digest.update(data)
    card = {
        "python": platform.python_version(),
        "sha256": digest.hexdigest(),
        "words": {name: count_words(corpus[name]) for name in SPLITS},
        "packages": list(described(corpus, packages)),
    }
    (folder / "packages.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return card


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--out", type=Path, required=True, help="folder to write")
    option(
        "--library",
        type=Path,
        default=Path(sysconfig.get_path("purelib")),
        help="folder of packages (default: site-packages of the Python that runs this)",
    )
    option("--held-out", type=int, default=25_000, help="words of valid, and of test (25000)")
    option("--words", type=int, help="words of train at most (default: all)")
    args = parser.parse_args()
    packages = read_packages(args.library)
    card = write(packages, split(packages, args.held_out, args.words), args.out)
    for name, words in card["words"].items():
        members = [row for row in card["packages"] if row["split"] == name]
        print(f"{name}: {words:,} words in {len(members)} packages")
    print(f"sha256 of the text: {card['sha256']}")


if __name__ == "__main__":
    main()
