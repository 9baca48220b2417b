"""The demo's text: nothing leaks, nothing is lost without reason, every machine agrees."""

from itertools import combinations
from pathlib import Path

import demo_corpus
import pytest
from demo_corpus import Corpus, Document, count_words, normalise, runs


@pytest.fixture(scope="module")
def corpora() -> dict[str, Corpus]:
    return demo_corpus.build_corpora()


def lines(documents: list[Document]) -> list[str]:
    return [paragraph for document in documents for paragraph in document.paragraphs]


def all_runs(documents: list[Document]) -> set[tuple[str, ...]]:
    return set().union(*(runs(normalise(line)) for line in lines(documents)))


def test_no_run_of_words_stands_in_two_splits(corpora: dict[str, Corpus]) -> None:
    text = {
        split: [d for corpus in corpora.values() for d in corpus[split]]
        for split in demo_corpus.SPLITS
    }
    for one, other in combinations(demo_corpus.SPLITS, 2):
        assert not all_runs(text[one]) & all_runs(text[other])


def test_no_paragraph_stands_twice(corpora: dict[str, Corpus]) -> None:
    found = [
        " ".join(normalise(line))
        for corpus in corpora.values()
        for documents in corpus.values()
        for line in lines(documents)
    ]
    assert len(found) == len(set(found))


def test_a_document_lies_in_one_split(corpora: dict[str, Corpus]) -> None:
    for corpus in corpora.values():
        names = [document.name for documents in corpus.values() for document in documents]
        assert len(names) == len(set(names))


def test_sizes(corpora: dict[str, Corpus]) -> None:
    words = {
        (domain, split): count_words(documents)
        for domain, corpus in corpora.items()
        for split, documents in corpus.items()
    }
    assert words["docstrings", "train"] > 150_000
    assert words["reference", "train"] > 30_000
    assert 10_000 < words["docstrings", "test"] < words["docstrings", "train"] / 10
    assert 4_000 < words["reference", "test"] < words["reference", "train"] / 5
    for domain in corpora:
        half = words[domain, "test"] / 2
        assert 0.8 * half < words[domain, "valid"] < 1.2 * half


def test_two_builds_write_the_same_files(corpora: dict[str, Corpus], tmp_path: Path) -> None:
    assert demo_corpus.write_corpora(tmp_path) == corpora
    for domain, corpus in corpora.items():
        for split, documents in corpus.items():
            written = (tmp_path / domain / f"{split}.txt").read_text(encoding="utf-8")
            assert written.splitlines() == lines(documents)


def test_another_seed_deals_otherwise(corpora: dict[str, Corpus]) -> None:
    documents = demo_corpus.reference_documents()
    one, other = (demo_corpus.split_documents(documents, 0.12, seed) for seed in (1, 2))
    assert one["test"] != other["test"]


def test_docstrings_are_read_without_importing(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "skipped.py").write_text('"""A test."""')
    (tmp_path / "broken.py").write_text('"""Not Python."""\nprint "hello"\n')
    (tmp_path / "module.py").write_text(
        '"""The module.\n\nSecond   paragraph,\non two lines.\n"""\n'
        "raise RuntimeError('imported')\n"
        "def first():\n    '''A function\n    ----------\n    underlined.'''\n"
        "class Second:\n    '''A class.'''\n    def method(self): 'A method.'\n"
    )
    found = {d.name: d.paragraphs for d in demo_corpus.docstring_documents(tmp_path)}
    assert "tests.skipped" not in found
    assert found["broken"] == ()
    assert found["module"] == (
        "The module.",
        "Second paragraph, on two lines.",
        "A function underlined.",
        "A class.",
        "A method.",
    )


def test_a_copied_sentence_is_dropped_from_the_later_split() -> None:
    sentence = "one two three four five six seven eight nine ten"
    train = Document("a", (f"Before it, {sentence}, and after it.",))
    copied = Document("b", (f"Quoting: {sentence.upper()}!", "Something of its own."))
    corpus: Corpus = {"train": [train], "valid": [], "test": [copied]}
    demo_corpus.drop_leaks([corpus])
    assert corpus["train"] == [train]
    assert corpus["test"] == [Document("b", ("Something of its own.",))]


def test_pages_that_differ_by_a_number_are_one() -> None:
    pages = [Document(f"cp{n}", (f"Codec of code page {n}.",)) for n in (437, 850)]
    assert demo_corpus.drop_repeats(pages, set()) == pages[:1]
