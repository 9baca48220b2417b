"""Finding where documents begin in a text of any length, a part of it at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np
from tqdm import tqdm

from fairseq_knnlm.datastore.documents import MOST_EXPRESSION, Documents
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.files import check_mapped

#: Values that are looked at at a time.
VALUES_AT_A_TIME = 2**20
#: Tokens of a line that an expression sees: a beginning needs no more, and a text may be one line.
LINE = 256

#: Writes the tokens of a line, without its end, as text.
Spell = Callable[[list[int]], str]


def check_expression(flag: str, expression: str) -> re.Pattern[str]:
    """The expression that is told by a flag, ready to match.

    Raises:
        ConfigError: where it is none.
    """
    try:
        expression.encode()  # what cannot be written down cannot be kept
        if not 1 <= len(expression) <= MOST_EXPRESSION:
            raise ValueError(f"{len(expression):,} characters")
        return re.compile(expression)
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        shown = expression[:100].encode("utf-8", "backslashreplace").decode()
        raise ConfigError(
            f"{flag} is no regular expression",
            expected=f"one of Python's, of at most {MOST_EXPRESSION:,} characters, as in '= [^=]'",
            found=f"{shown!r}: {error or type(error).__name__}",
        ) from None


def after_empty_lines(values: np.ndarray, eos: int) -> Documents:
    """Documents that begin after an empty line, one that is nothing but its end.

    Several empty lines are as one. Those before all other text belong to the first document.

    Args:
        values: (N,) token ids, mapped or not.
        eos: the token that ends a line.
    """

    def begin(values: np.ndarray, start: int, stop: int) -> np.ndarray:
        part = np.asarray(values[max(start - 2, 0) : stop]) == eos
        line_ends = np.concatenate([np.ones(max(2 - start, 0), bool), part])  # before all text
        return start + np.flatnonzero(line_ends[:-2] & line_ends[1:-1] & ~line_ends[2:])

    return _found(values, eos, begin, None)


def at_matching_lines(
    values: np.ndarray, eos: int, expression: re.Pattern[str], spell: Spell
) -> Documents:
    """Documents that begin with a line whose text matches an expression at its beginning.

    What stands before the first of them is a document too, unless it is nothing but empty lines.

    Args:
        values: (N,) token ids, mapped or not.
        eos: the token that ends a line.
        expression: is given the first ``LINE`` tokens of every line, empty ones too.
        spell: writes them as text.
    """

    def begin(values: np.ndarray, start: int, stop: int) -> np.ndarray:
        part = np.asarray(values[max(start - 1, 0) : min(stop + LINE, len(values))])
        if start == 0:
            part = np.concatenate([np.array([eos], part.dtype), part])
        ends = np.append(np.flatnonzero(part == eos), len(part))
        firsts = ends[:-1] + 1
        lasts = np.minimum(ends[1:], firsts + LINE)
        matching = [
            first
            for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True)
            if first <= stop - start and expression.match(spell(part[first:last].tolist()))
        ]
        return start - 1 + np.array(matching, np.int64)

    return _found(values, eos, begin, expression.pattern)


def _found(
    values: np.ndarray,
    eos: int,
    begin: Callable[[np.ndarray, int, int], np.ndarray],
    boundary: str | None,
) -> Documents:
    """Documents that begin where ``begin`` says of a stretch of rows that they do."""
    found = [begin(values, start, stop) for start, stop in _stretches(values)]
    starts = np.concatenate([np.zeros(1, np.int64), *found])
    starts = starts[np.append(True, starts[1:] > _first_word(values, eos))]
    return Documents(starts, len(values), eos, boundary)


def _first_word(values: np.ndarray, eos: int) -> int:
    """The row of the first token that is no end of a line; the last row where there is none."""
    for start in range(0, len(values), VALUES_AT_A_TIME):
        words = np.flatnonzero(np.asarray(values[start : start + VALUES_AT_A_TIME]) != eos)
        if len(words):
            return start + int(words[0])
    return len(values) - 1


def _stretches(values: np.ndarray) -> Iterator[tuple[int, int]]:
    starts = range(0, len(values), VALUES_AT_A_TIME)
    for start in tqdm(starts, desc="finding documents", unit=" chunks", delay=2):
        check_mapped(values, "values")
        yield start, min(start + VALUES_AT_A_TIME, len(values))
