"""What goes from an entry to the one before or after it stops where a text breaks off.

The oracle is the same entries as separate texts, each a list of its own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from stores import (
    asking,
    brute_force,
    build_index,
    random_entries,
    texts_left,
    write_cut,
    write_store,
)

from fairseq_knnlm.datastore import Datastore, Documents, around, first_line
from fairseq_knnlm.experts.knn import KnnSetting
from fairseq_knnlm.experts.ngram import counted
from fairseq_knnlm.experts.pointers import PointerExpert
from fairseq_knnlm.generation.drafts import LONGEST, behind
from fairseq_knnlm.index.search import SearchIndex
from fairseq_knnlm.retrieval.local import LocalRetriever
from fairseq_knnlm.retrieval.neighbours import Neighbours

FORGOTTEN = (((4, 9), (39, 40)), (), ((1, 2), (30, 50)))
#: Rows of the 100 at which a text begins, one of them behind what is forgotten.
BREAKS = [0, 9, 20, 75, 99]
TYPES = 5


@pytest.fixture
def texts() -> list[list[int]]:
    """The tokens of each text that is left."""
    values = random_entries(100, 6, TYPES)[1]
    return [values[rows].tolist() for rows in texts_left(FORGOTTEN, breaks=BREAKS)]


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    values = random_entries(100, 6, TYPES)[1]
    return write_cut(tmp_path / "store", forgotten=FORGOTTEN, breaks=BREAKS, values=values)


def retriever(store: Datastore) -> LocalRetriever:
    index = SearchIndex(*build_index(np.array(store.keys, np.float32), "Flat"))
    return LocalRetriever(index, store, "l2")


def homes(texts: list[list[int]]) -> list[tuple[int, int]]:
    """Of each entry the number of its text, and its place there."""
    return [(number, place) for number, text in enumerate(texts) for place in range(len(text))]


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_tokens_before(store: Datastore, texts: list[list[int]], steps: int) -> None:
    places = homes(texts)
    expected = [texts[n][i - steps] if i >= steps else -1 for n, i in places]
    assert len(places) == len(store)
    ids = torch.arange(len(store))[:, None]
    asked = retriever(store)
    assert asked.tokens_before(ids, steps).flatten().tolist() == expected
    assert asked.tokens_before(torch.tensor([-1]), 1).tolist() == [-1]


def test_what_goes_on(store: Datastore, texts: list[list[int]]) -> None:
    expected = [i + 1 < len(texts[n]) for n, i in homes(texts)]
    found = retriever(store).goes_on(torch.arange(-1, len(store)))
    assert found.tolist() == [False, *expected]


def test_one_text_is_as_ever(tmp_path: Path) -> None:
    flat = write_store(tmp_path / "flat", *random_entries(30, 6, TYPES))
    found = retriever(flat).goes_on(torch.tensor([-1, 0, 28, 29]))
    assert found.tolist() == [False, True, True, False]
    assert [edge.tolist() for edge in flat.texts_of(np.array([0, 29]))] == [[0, 0], [30, 30]]


def test_pointers(store: Datastore, texts: list[list[int]]) -> None:
    """Successors of the nearest whose token was read, in their texts."""
    k, asked = 40, retriever(store)
    keys = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    _, nearest = brute_force(np.array(store.keys), keys.numpy(), k, "l2")
    places, rows = homes(texts), list(range(len(store)))
    for token in range(TYPES):
        before = torch.full((2, 4), -1)
        before[1, 0] = token
        question = asking(keys, torch.zeros(2).long(), before)
        expert = PointerExpert(asked, k, [KnnSetting(temperature=1.0)])
        found = expert.near(question.contexts).ids[1, k:]
        expected = []
        for row in nearest[0].tolist():
            number, place = places[row]
            text = texts[number]
            if text[place] == token and place + 1 < len(text):
                expected.append(rows[row] + 1)
        expected = expected[: expert.most]
        left = set(expected) - set(nearest[1].tolist())
        assert {row for row in found.tolist() if row >= 0} == left


def test_ngrams(store: Datastore, texts: list[list[int]]) -> None:
    """As many of two tokens as the texts have, and not those across."""
    model = counted(store)
    longest = model.orders[-1]
    order = model.order
    grams = {tuple(text[i : i + order]) for text in texts for i in range(len(text) - order + 1)}
    assert len(longest.keys) == len(grams)
    pairs = {tuple(text[i : i + 2]) for text in texts for i in range(len(text) - 1)}
    ids = [(int(key) // 50, int(key) % 50) for key in model.orders[1].keys]
    singles = model.orders[0].keys.tolist()
    assert {(singles[context], token) for context, token in ids} == pairs
    again = counted(store)  # from the file
    assert np.array_equal(again.orders[-1].counts, longest.counts)


def test_drafts(store: Datastore, texts: list[list[int]]) -> None:
    """What a draft proposes, and what it compares, is of one text."""
    places = homes(texts)
    for row, (number, place) in enumerate(places):
        text = texts[number]
        near = Neighbours(
            torch.tensor([[row]]),
            torch.zeros(1, 1),
            torch.tensor([[text[place]]]),
            torch.ones(1, 1, dtype=torch.bool),
        )
        ways = behind([*store.values[max(row - 4, 0) : row].tolist(), text[place]], store, near, 0)
        ((_, tokens, weight),) = ways
        assert tokens == text[place + 1 : place + 1 + LONGEST]
        assert weight == 3.0 ** min(place, 4)


def test_text_around(store: Datastore, texts: list[list[int]]) -> None:
    for row, (number, place) in enumerate(homes(texts)):
        found = around(store, row, 3, 2)
        assert found is not None
        text = texts[number]
        assert found[0].tolist() == text[max(place - 3, 0) : place]
        assert found[1].tolist() == text[place + 1 : place + 3]


def test_a_name_is_of_one_text(store: Datastore, texts: list[list[int]]) -> None:
    """Where what is left of a document begins in the middle of a line, and ends there."""
    documents = Documents(np.array([0, 6]), len(store), 49)
    assert first_line(store, documents, 0).tolist() == texts[0]
