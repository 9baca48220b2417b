"""Counting n-grams: one sort for each order (``kneser_ney`` says how grams are numbered)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from tqdm import tqdm


def count_grams(
    tokens: np.ndarray, lengths: np.ndarray, vocabulary: int, order: int, progress: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Keys and counts as in ``Order``, of each order, lowest first.

    Args:
        tokens: (N,) ids, of one text or of several one after another.
        lengths: (T,) of the texts, each 1 or more; no gram goes from one to the next.
        vocabulary: types in the dictionary, V.
        order: tokens of the longest n-grams.
        progress: show a bar.
    """
    # Keys fit: there are no more numbers than tokens, and 2^45 tokens of 2^18 types are no text.
    assert len(tokens) * vocabulary < 2**63
    dtype = np.dtype(np.int32 if len(tokens) < 2**31 else np.int64)
    numbers, keys, counts = _number(np.zeros(len(tokens), dtype), tokens, vocabulary)
    label = "counting n-grams"
    for _ in tqdm(range(1, order), desc=label, unit=" orders", delay=2, disable=not progress):
        # A gram of one token more begins where a gram does, but for the last one of each text; its
        # last token, and all tokens but its first, are those of the gram after that.
        tokens, suffixes = (_without_first(each, lengths) for each in (tokens, numbers))
        contexts = _without_last(numbers, lengths)
        longer, longer_keys, longer_counts = _number(contexts, tokens, vocabulary)
        yield keys, _continuations(longer, suffixes, len(longer_keys), len(keys))
        numbers, keys, counts = longer, longer_keys, longer_counts
        lengths = lengths[lengths > 1] - 1
    yield keys, counts


def _without_first(array: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """An array that is cut into stretches of such lengths, without the first of each."""
    return array[1:] if len(lengths) == 1 else np.delete(array, np.cumsum(lengths) - lengths)


def _without_last(array: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The same without the last of each."""
    return array[:-1] if len(lengths) == 1 else np.delete(array, np.cumsum(lengths) - 1)


def _number(
    contexts: np.ndarray, tokens: np.ndarray, vocabulary: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers the grams of a text by their keys.

    Returns:
        (M,) the number of each, (G,) the distinct keys, ascending, and (G + 1,) how often each
        came, with a 0 at the end.
    """
    # np.unique does this too, at twice the memory.
    keys = np.multiply(contexts, vocabulary, dtype=np.int64)
    keys += tokens
    places = np.argsort(keys)
    keys = keys[places]
    first = first_of_each(keys)
    keys = keys[first]
    numbers = np.empty_like(contexts)
    numbers[places] = np.cumsum(first, dtype=contexts.dtype) - 1
    del places
    ends = [len(first)] * 2
    return numbers, keys, np.diff(np.flatnonzero(first), append=ends).astype(contexts.dtype)


def first_of_each(ascending: np.ndarray) -> np.ndarray:
    """True where a value comes for the first time."""
    first = np.ones(len(ascending), bool)
    np.not_equal(ascending[1:], ascending[:-1], out=first[1:])
    return first


def _continuations(
    grams: np.ndarray, suffixes: np.ndarray, distinct: int, shorter: int
) -> np.ndarray:
    """Distinct tokens before each of the ``shorter`` grams: the distinct grams that end in it.

    A 0 follows at the end.

    Args:
        grams: (M,) numbers of the grams of a text, below ``distinct``.
        suffixes: (M,) numbers of the same without their first tokens, below ``shorter``.
    """
    suffix_of = np.empty(distinct, suffixes.dtype)
    suffix_of[grams] = suffixes
    return np.bincount(suffix_of, minlength=shorter + 1).astype(suffixes.dtype)


def text_lengths(breaks: Sequence[int] | np.ndarray, tokens: int) -> np.ndarray:
    """(T,) int64, of the texts that begin at such places of so many tokens, those without none."""
    lengths = np.diff(np.asarray(breaks, np.int64), append=tokens)
    return lengths[lengths > 0]
