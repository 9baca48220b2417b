"""Text cut into tokens by several processes at a time, and what is counted of it on the way."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from signal import SIG_IGN, SIG_UNBLOCK, SIGINT, SIGTERM, pthread_sigmask, signal

import numpy as np

from fairseq_knnlm.errors import KnnlmError
from fairseq_knnlm.runs.text_files import (
    LEAD,
    Part,
    documents_of,
    is_separator,
    lines_of,
    read_part,
)
from fairseq_knnlm.runs.tokenizer import Tokenizer, open_tokenizer
from fairseq_knnlm.signals import undisturbed

#: The place of the end of a line or document among a tokenizer's ids.
END = -1
#: Parts that wait for each process, so that none waits for work.
AHEAD = 3


@dataclass(frozen=True)
class Cut:
    """A part of a text as tokens.

    Attributes:
        ids: (n,) int32, the tokenizer's own; ``END`` where a line or document ends.
        items: (m,) int64, how many of these each line or document has; the last one may go on.
        words: what white space separates.
        bytes: in UTF-8, line ends included.
        changed: lines, or documents or parts of one, whose tokens are another text than theirs.
    """

    ids: np.ndarray
    items: np.ndarray
    words: int
    bytes: int
    changed: int

    def of(self, places: np.ndarray) -> Cut:
        """The same in other ids.

        Args:
            places: (S + 1,) int32, by the tokenizer's id; the last is that of ``END``.
        """
        return replace(self, ids=places[self.ids])


@dataclass(frozen=True)
class Cutting:
    """How text is cut.

    Attributes:
        kind, path, special: of the tokenizer, as ``open_tokenizer`` has them.
        separator: of documents, as ``parts_of`` has it.
    """

    kind: str
    path: Path
    special: dict[str, int]
    separator: str | None

    def opened(self) -> Tokenizer:
        """The tokenizer."""
        return open_tokenizer(self.kind, self.path, self.special)


def cut_part(tokenizer: Tokenizer, separator: str | None, part: Part) -> Cut:
    """The tokens of a part.

    Raises:
        ConfigError: where it is not in UTF-8.
    """
    text = read_part(part)
    if tokenizer.lines:
        lines = lines_of(text)
        texts = ["" if is_separator(line, separator) else line for line in lines]
        size = part.stop - part.start - (_bytes(lines) - _bytes(texts))
    else:
        texts = [text] if part.goes_on else documents_of(text, separator)
        size = _bytes(texts)
    lead = tokenizer.ids(LEAD) if part.goes_on else []
    found, items, changed = [], [], 0
    for one in texts:
        ids = tokenizer.ids(LEAD + one if part.goes_on else one)
        assert ids[: len(lead)] == lead
        changed += tokenizer.text(ids).removeprefix(LEAD if part.goes_on else "") != one
        ids = ids[len(lead) :]
        found += [*ids, END] if part.ends else ids
        items.append(len(ids) + part.ends)
    return Cut(
        np.array(found, np.int32),
        np.array(items, np.int64),
        sum(len(one.split()) for one in texts),
        size,
        changed,
    )


def _bytes(texts: Iterable[str]) -> int:
    return sum(len(one.encode()) for one in texts)


def cut_parts(
    cutting: Cutting, parts: Iterable[Part], workers: int, told: Callable[[int], object]
) -> Iterator[tuple[Part, Cut]]:
    """Cuts parts, so many at a time, and hands them out in their order.

    Args:
        cutting: how.
        parts: of files.
        workers: processes; with one it is this one.
        told: is called with the bytes of each part once it is handed out.

    Raises:
        ConfigError: where a part is not in UTF-8.
        KnnlmError: where a process came to an end.
    """
    if workers == 1:
        tokenizer = cutting.opened()
        for part in parts:
            yield part, cut_part(tokenizer, cutting.separator, part)
            told(part.stop - part.start)
        return
    with undisturbed():
        pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, (cutting,))
    try:
        for part, cut in _in_order(pool, parts, workers * AHEAD):
            yield part, cut
            told(part.stop - part.start)
    except BrokenProcessPool as error:
        raise KnnlmError(
            "a process that cuts the text came to an end",
            expected=f"{workers:,} processes that finish",
            found="one that was ended, perhaps since memory was full",
            do="pass a smaller --workers",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, parts: Iterable[Part], most: int
) -> Iterator[tuple[Part, Cut]]:
    waiting: deque[tuple[Part, Future[Cut]]] = deque()
    for part in parts:
        with undisturbed():  # it may start processes and a thread, which are there or not
            waiting.append((part, pool.submit(_do, part)))
        if len(waiting) >= most:
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()


#: What a process of the pool cuts by, once it has begun.
_mine: list[tuple[Tokenizer, str | None]] = []


def _begin(cutting: Cutting) -> None:
    """Begins a process of the pool, which ends with the one that asks, whatever ends that."""
    signal(SIGINT, SIG_IGN)  # of the terminal, which the process that asks hears too
    pthread_sigmask(SIG_UNBLOCK, {SIGINT, SIGTERM})  # blocked as it was begun
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _mine.append((cutting.opened(), cutting.separator))


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(part: Part) -> Cut:
    ((tokenizer, separator),) = _mine
    return cut_part(tokenizer, separator, part)


def whole_items(
    cuts: Iterable[tuple[Part, Cut]],
) -> Iterator[tuple[Part, Cut, Sequence[np.ndarray]]]:
    """Lines or documents, put together of the parts that they lie in.

    Yields:
        Each part as it was cut, with the items (n,) int32 that end in it.
    """
    begun: list[np.ndarray] = []
    for part, cut in cuts:
        if not part.ends:
            begun.append(cut.ids)
            yield part, cut, []
            continue
        items = np.split(cut.ids, np.cumsum(cut.items)[:-1]) if len(cut.items) else []
        if begun:
            items[0] = np.concatenate([*begun, items[0]])
            begun = []
        yield part, cut, items
