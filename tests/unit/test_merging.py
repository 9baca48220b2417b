"""What shards found, merged. The oracle sorts everything."""

from __future__ import annotations

import numpy as np
import pytest

from fairseq_knnlm.cluster.actors import place_of
from fairseq_knnlm.cluster.merging import Found, doubtful, merged, replaced
from fairseq_knnlm.cluster.shard import grouped
from fairseq_knnlm.datastore import Block, Stretch

QUERIES, ENTRIES, K = 40, 300, 50
HELD = (100, 7, 193)


def scores() -> np.ndarray:
    """Distances (N, entries), of which many are the same."""
    return np.random.default_rng(3).integers(0, 400, (QUERIES, ENTRIES)).astype(np.float32)


def best(found: np.ndarray, first: int, k: int, largest: bool, width: int) -> Found:
    """The k best of some columns, and -1 to fill up the width."""
    order = np.argsort(-found if largest else found, axis=1, kind="stable")[:, :k]
    distances = np.full((QUERIES, width), -np.inf if largest else np.inf, np.float32)
    rows = np.full((QUERIES, width), -1, np.int32)
    distances[:, : order.shape[1]] = np.take_along_axis(found, order, axis=1)
    rows[:, : order.shape[1]] = order + first
    return Found(distances, rows)


def answers(every: np.ndarray, widths: tuple[int, ...], largest: bool) -> list[Found]:
    """What each of three shards finds."""
    found, first = [], 0
    for held, width in zip(HELD, widths, strict=True):
        found.append(best(every[:, first : first + held], first, width, largest, width))
        first += held
    return found


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("widths", [(50, 50, 50), (50, 7, 50), (50, 7, 49)])
def test_merged_are_the_best_of_all(largest: bool, widths: tuple[int, ...]) -> None:
    every = scores()
    distances, rows, *_ = merged(answers(every, widths, largest), K, largest=largest)
    expected = best(every, 0, K, largest, K).distances
    assert np.array_equal(distances, expected)
    assert np.array_equal(np.take_along_axis(every, rows, axis=1), expected)
    assert all(len(set(row)) == K for row in rows.tolist())


def test_missing_ones_come_last() -> None:
    every = scores()[:, :20]
    found = [best(every[:, :5], 0, 5, False, 30), best(every[:, 5:], 5, 15, False, 30)]
    distances, rows, *_ = merged(found, 30, largest=False)
    assert np.array_equal(distances[:, :20], np.sort(every, axis=1))
    assert (rows[:, 20:] == -1).all()


def test_one_shard_is_the_whole() -> None:
    found = merged([best(scores(), 0, K, False, K)], K, largest=False)
    assert np.array_equal(found.distances, np.sort(scores(), axis=1)[:, :K])


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("widths", [(20, 7, 30), (50, 3, 50), (17, 2, 33), (50, 7, 50), (9, 7, 9)])
def test_nothing_is_missing_where_it_says_so(largest: bool, widths: tuple[int, ...]) -> None:
    """Whatever shards are asked for; and what is in doubt, asked for all, makes it whole."""
    every = scores()
    found, full = answers(every, widths, largest), answers(every, (K, 7, K), largest)
    some = merged(found, K, largest=largest)
    doubts = doubtful(found, HELD, some, largest=largest)
    true = best(every, 0, K, largest, K).distances
    wrong = (some[0] != true).any(axis=1)
    assert not (wrong & ~doubts.any(axis=0)).any()
    assert not doubts[1].any() or widths[1] < 7  # it told all that it holds
    for number, (which, whole) in enumerate(zip(doubts, full, strict=True)):
        if which.any():
            better = whole.each(lambda array, which=which: array[which])  # type: ignore[misc]
            found[number] = replaced(found[number], better, which)
    mended = merged(found, K, largest=largest)
    assert np.array_equal(mended[0], true)
    assert np.array_equal(np.take_along_axis(every, mended[1], axis=1), true)


@pytest.mark.parametrize("largest", [False, True])
def test_what_is_known_of_an_entry_stays_with_it(largest: bool) -> None:
    """Also where a shard is asked again, and where some are missing."""
    every = scores()[:, :60]
    tokens, exact = np.arange(300) % 7, np.arange(300, dtype=np.float32) / 3

    def told(found: Found) -> Found:
        return found._replace(values=tokens[found.rows], exact=exact[found.rows])

    first = told(best(every[:, :20], 0, 5, largest, 5))
    which = np.arange(QUERIES) % 2 == 0
    whole = told(best(every[:, :20], 0, 30, largest, 30))
    first = replaced(first, whole.each(lambda array: array[which]), which)
    found = merged([first, told(best(every[:, 20:], 20, 25, largest, 25))], 50, largest=largest)
    there = found.rows >= 0
    assert found.values is not None and found.exact is not None
    assert np.array_equal(found.values[there], tokens[found.rows[there]])
    assert np.array_equal(found.exact[there], exact[found.rows[there]])
    assert there.sum(axis=1).tolist() == [45, 30] * (QUERIES // 2)


def test_an_index_that_visits_few_lists_may_be_complete() -> None:
    """A shard that had no more to tell misses nothing, though all together are fewer than k."""
    every = scores()[:, :20]
    found = [best(every[:, :5], 0, 5, False, 10), best(every[:, 5:], 5, 9, False, 10)]
    some = merged(found, 30, largest=False)
    assert not doubtful(found, (100, 200), some, largest=False).any()
    found[1] = best(every[:, 5:], 5, 10, False, 10)  # here it may have had
    some = merged(found, 30, largest=False)
    doubts = doubtful(found, (100, 200), some, largest=False)
    assert doubts.tolist() == [[False] * QUERIES, [True] * QUERIES]


@pytest.mark.parametrize(
    ("sizes", "shards", "expected"),
    [
        ((10, 10, 10, 10), 2, (2, 2)),
        ((10, 10, 10, 10), 3, (1, 2, 1)),
        ((10, 10, 10, 10), 4, (1, 1, 1, 1)),
        ((400, 1, 499, 300), 2, (2, 2)),
        ((1000, 1, 1, 1), 3, (1, 1, 2)),
        ((1, 1, 1, 1000), 3, (2, 1, 1)),
        ((7,), 1, (1,)),
    ],
)
def test_blocks_are_shared_out(
    sizes: tuple[int, ...], shards: int, expected: tuple[int, ...]
) -> None:
    """In their order, none left out, about as many entries each."""
    blocks, first = [], 0
    for number, rows in enumerate(sizes):
        blocks.append(Block(__file__, first, Stretch(f"{number:06d}", rows, "a" * 64, [0], [])))  # type: ignore[arg-type]
        first += rows
    groups = grouped(blocks, shards)
    assert [block for group in groups for block in group] == blocks
    assert tuple(map(len, groups)) == expected


@pytest.mark.parametrize("places", range(1, 7))
@pytest.mark.parametrize("replicas", range(1, 4))
def test_copies_lie_on_different_machines(places: int, replicas: int) -> None:
    for shard in range(8):
        homes = {place_of(shard, replica, replicas, places) for replica in range(replicas)}
        assert len(homes) == min(places, replicas)
        assert homes <= set(range(places))
