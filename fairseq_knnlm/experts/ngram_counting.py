"""Counting n-grams: one sort for each order (``kneser_ney`` says how grams are numbered)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from tqdm import tqdm


def count_grams(
    tokens: np.ndarray, vocabulary: int, order: int, progress: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Keys and counts as in ``Order``, of each order, lowest first."""
    # Keys fit: there are no more numbers than tokens, and 2^45 tokens of 2^18 types are no text.
    assert len(tokens) * vocabulary < 2**63
    dtype = np.dtype(np.int32 if len(tokens) < 2**31 else np.int64)
    numbers, keys, counts = _number(np.zeros(len(tokens), dtype), tokens, vocabulary)
    label = "counting n-grams"
    for n in tqdm(range(1, order), desc=label, unit=" orders", delay=2, disable=not progress):
        longer, longer_keys, longer_counts = _number(numbers[:-1], tokens[n:], vocabulary)
        yield keys, _continuations(longer, numbers[1:], len(longer_keys), len(keys))
        numbers, keys, counts = longer, longer_keys, longer_counts
    yield keys, counts


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
