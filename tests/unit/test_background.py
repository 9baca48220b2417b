"""Reading ahead and writing behind: order, errors, and how much may wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from fairseq_knnlm.background import Behind, ahead


def test_ahead_yields_the_same_in_order() -> None:
    assert list(ahead(range(20))) == list(range(20))
    assert list(ahead([])) == []
    assert list(ahead([None, None])) == [None, None]


def test_ahead_is_one_item_ahead_and_no_more() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(5):
            made.append(number)
            yield number

    for number in ahead(items()):
        assert len(made) <= number + 2
    assert made == list(range(5))


def test_ahead_raises_where_the_source_does() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("disk")

    found = ahead(items())
    assert next(found) == 1
    with pytest.raises(OSError, match="disk"):
        next(found)


def test_behind_does_all_in_order() -> None:
    done: list[int] = []
    later = Behind(done.append, pending=2)
    for number in range(50):
        later(number)
    later.wait()
    assert done == list(range(50))
    later.wait()


def test_behind_lets_few_wait() -> None:
    go, started = threading.Event(), []

    def work(number: int) -> None:
        started.append(number)
        assert go.wait(10)

    later = Behind(work, pending=2)
    later(0)
    later(1)
    threading.Timer(0.2, go.set).start()
    later(2)  # waits for the first
    assert go.is_set()
    later.wait()
    assert started == [0, 1, 2]


def test_behind_raises_what_the_work_raised() -> None:
    def fail(number: int) -> None:
        raise ValueError(number)

    later = Behind(fail)
    later(7)
    with pytest.raises(ValueError, match="7"):
        later.wait()
