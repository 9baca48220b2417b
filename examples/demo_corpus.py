"""Real text that every Python carries, split so that nothing leaks.

Two domains: the docstrings of the standard library, and the language reference that
``help()`` shows (``pydoc_data.topics``). Both are read from the running Python's own
files: nothing is downloaded and no module of the library is imported.

A document is a module or a help topic; a paragraph becomes one line of text. Across both
domains together:

* a paragraph stands once, whatever its case, spacing, punctuation and digits;
* a document lies in one split;
* no paragraph of a held-out split shares ``RUN`` consecutive words with another split.
"""

import argparse
import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

RUN = 10  # words in a row that count as copied
SPLITS = ("train", "valid", "test")
SEED = 1

# Not the library's own prose: other people's packages, tests, and the reference itself.
SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "pydoc_data", "__pycache__"),
    *("test", "tests", "idle_test"),
}


@dataclass(frozen=True)
class Document:
    """A module's docstrings or one help topic, as paragraphs in reading order."""

    name: str
    paragraphs: tuple[str, ...]

    @property
    def words(self) -> int:
        """The number of words that white space separates."""
        return sum(len(paragraph.split()) for paragraph in self.paragraphs)


Corpus = dict[str, list[Document]]  # split -> documents


# -- reading ---------------------------------------------------------------------------


def paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of ``text``, each on one line, without rulers and underlines."""
    for block in re.split(r"\n\s*\n", text):
        lines = (line for line in block.splitlines() if re.search(r"\w", line))
        if paragraph := " ".join(" ".join(lines).split()):
            yield paragraph


def docstring_documents(library: Path | None = None) -> list[Document]:
    """Read every docstring under ``library`` (default: this Python's own library).

    The files are parsed, never imported. Files that are not valid Python are left out.
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts):
            name = ".".join(relative.with_suffix("").parts)
            documents.append(Document(name, tuple(_docstring_paragraphs(path))))
    return documents


def _docstring_paragraphs(path: Path) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old library code has invalid escapes
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    # ast.walk goes level by level; the reader goes from top to bottom
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        yield from paragraphs(ast.get_docstring(node) or "")


def reference_documents() -> list[Document]:
    """Read the language reference, one document a help topic."""
    from pydoc_data.topics import topics

    return [Document(name, tuple(paragraphs(text))) for name, text in sorted(topics.items())]


# -- splitting -------------------------------------------------------------------------


def normalise(paragraph: str) -> list[str]:
    """The words of ``paragraph`` as they are compared: lower case, every digit a zero."""
    return re.findall(r"\w+", re.sub(r"\d", "0", paragraph.lower()))


def runs(words: list[str]) -> set[tuple[str, ...]]:
    """All runs of ``RUN`` consecutive words; the whole paragraph where it is shorter."""
    return {tuple(words[i : i + RUN]) for i in range(max(1, len(words) - RUN + 1))}


def drop_repeats(documents: Iterable[Document], seen: set[tuple[str, ...]]) -> list[Document]:
    """Keep the first occurrence of each paragraph; ``seen`` is carried from call to call."""
    kept = []
    for document in documents:
        fresh = []
        for paragraph in document.paragraphs:
            key = tuple(normalise(paragraph))
            if key not in seen:
                seen.add(key)
                fresh.append(paragraph)
        kept.append(Document(document.name, tuple(fresh)))
    return [document for document in kept if document.paragraphs]


def split_documents(documents: list[Document], held_out: float, seed: int = SEED) -> Corpus:
    """Deal documents into train, valid and test.

    ``held_out`` is the share of words that test gets; valid, on which mixtures are fitted, half
    of that. The order hangs on a hash of each name, so the split is the same on every machine and
    barely moves from one Python to the next. What is too long for a held-out split trains.
    """
    words = held_out * count_words(documents)
    room = {"test": words, "valid": words / 2}
    corpus: Corpus = {split: [] for split in SPLITS}
    for document in sorted(documents, key=lambda d: _shuffle_key(d.name, seed)):
        split = next((s for s in room if document.words <= room[s]), "train")
        if split in room:
            room[split] -= document.words
        corpus[split].append(document)
    return corpus


def _shuffle_key(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def drop_leaks(corpora: Iterable[Corpus]) -> None:
    """Remove, in place, held-out paragraphs that copy from a split before theirs.

    Training text of all domains comes first, then all valid, then all test: a reference
    sentence that a docstring quotes cannot be tested if the LM trained on the docstring.
    """
    corpora = list(corpora)
    seen: set[tuple[str, ...]] = set()
    for split in SPLITS:
        new: set[tuple[str, ...]] = set()
        for corpus in corpora:
            clean = []
            for document in corpus[split]:
                kept = tuple(p for p in document.paragraphs if seen.isdisjoint(runs(normalise(p))))
                if kept:
                    clean.append(Document(document.name, kept))
            corpus[split] = clean
            new.update(*(runs(normalise(p)) for document in clean for p in document.paragraphs))
        seen |= new


def build_corpora(seed: int = SEED) -> dict[str, Corpus]:
    """The two domains, ``docstrings`` and ``reference``, split and free of leaks."""
    seen: set[tuple[str, ...]] = set()
    docstrings = drop_repeats(docstring_documents(), seen)
    reference = drop_repeats(reference_documents(), seen)
    corpora = {
        "docstrings": split_documents(docstrings, held_out=0.06, seed=seed),
        "reference": split_documents(reference, held_out=0.12, seed=seed),
    }
    drop_leaks(corpora.values())
    return corpora


def count_words(documents: Iterable[Document]) -> int:
    """The number of words of some documents."""
    return sum(document.words for document in documents)


def write_corpora(folder: Path, seed: int = SEED) -> dict[str, Corpus]:
    """Write ``folder/DOMAIN/SPLIT.txt``, a paragraph a line, and return what was written."""
    corpora = build_corpora(seed)
    for domain, corpus in corpora.items():
        (folder / domain).mkdir(parents=True, exist_ok=True)
        for split, documents in corpus.items():
            lines = (p + "\n" for document in documents for p in document.paragraphs)
            (folder / domain / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
    return corpora


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write the documentation that Python carries, split without leaks.",
        epilog="example: python examples/demo_corpus.py --out demo/text",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the split (default: {SEED})")
    args = parser.parse_args()
    for domain, corpus in write_corpora(args.out, args.seed).items():
        sizes = (f"{split} {count_words(documents):,}" for split, documents in corpus.items())
        print(f"{domain}: words in {', '.join(sizes)}")


if __name__ == "__main__":
    main()
