"""The text read so far, as a memory that fades: what lately followed the same few words.

    p(w | the last n words) = sum of 2^-(distance / half-life) over the earlier places that stand
                              after the same n words and hold w, divided by the sum over all of them

At n = 0 this is a unigram cache (Kuhn & De Mori, 1990) that fades (Clarkson & Robinson, 1997). It
takes the words and no language model, so it serves beside whatever scored the text. It abstains
(NaN) where no earlier place, or none that is not forgotten, stands after the same words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np

NAME = "history"
#: Words before a place that must be the same.
SUFFIXES = (0, 1, 2, 3, 4)
#: Tokens after which a place counts half. The longest fades little in a text of this size.
HALF_LIVES = (30.0, 100.0, 300.0, 1000.0, 30000.0)
#: Those at which it is a feature how often the last words were met.
FEATURE_HALF_LIVES = (100.0, 30000.0)


@dataclass(frozen=True, order=True)
class HistorySetting:
    """Which places count, and how long.

    Attributes:
        suffix: words before a place that must be those before the token.
        half_life: distance, in tokens, at which a place counts half.
    """

    suffix: int
    half_life: float


@dataclass(frozen=True)
class History:
    """What the text before each of N tokens says of it.

    Attributes:
        settings: S of them, a column each.
        log_probs: (N, S) float32, natural log; -inf of a token that never stood there, NaN where
            there is nothing to go by.
        features: by name, (N, M) float32, of what stands before each token and never of itself.
    """

    settings: list[dict[str, Any]]
    log_probs: np.ndarray
    features: dict[str, np.ndarray]


def history(tokens: np.ndarray) -> History:
    """Reads a text, each token after those before it.

    Args:
        tokens: (N,) ids.
    """
    columns, met = [], []
    for contexts in preceding(tokens, SUFFIXES[-1]):
        places = faded_counts(contexts, HALF_LIVES)
        same = faded_counts(joined(contexts, tokens), HALF_LIVES)
        with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 abstains, log 0 is -inf
            columns.append(np.log(same / places))
        met.append(places[:, [HALF_LIVES.index(one) for one in FEATURE_HALF_LIVES]])
    settings = [asdict(HistorySetting(*one)) for one in product(SUFFIXES, HALF_LIVES)]
    # How much of the text there is at all (suffix 0) tells little but at its beginning.
    features = {f"{NAME}_met": np.log1p(np.concatenate(met[1:], axis=1)).astype(np.float32)}
    return History(settings, np.concatenate(columns, axis=1).astype(np.float32), features)


def preceding(tokens: np.ndarray, most: int) -> list[np.ndarray]:
    """For n from 0 to ``most``, (N,) int64: equal where the n tokens before two places are equal.

    -1 where there are fewer than n tokens before.
    """
    found = [np.zeros(len(tokens), np.int64)]
    for _ in range(most):
        # The n + 1 tokens before a place are the n before the last place, and its token.
        grams = joined(found[-1], tokens)
        found.append(np.concatenate([[-1], grams])[: len(tokens)])
    return found


def joined(contexts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """(N,) int64, equal where both are equal: numbers from 0; -1 where a context is."""
    keys = contexts * (int(tokens.max(initial=0)) + 1) + tokens
    numbers = np.unique(keys, return_inverse=True)[1]
    return np.where(contexts < 0, -1, numbers)


def faded_counts(groups: np.ndarray, half_lives: Sequence[float]) -> np.ndarray:
    """(N, H) float64: how often the group of each place was met before it, fading.

    Args:
        groups: (N,) int64; -1 is no group, and never met.
        half_lives: H of them, in places.
    """
    return faded_sums(groups, np.ones((len(groups), len(half_lives))), half_lives)


def faded_sums(groups: np.ndarray, values: np.ndarray, half_lives: Sequence[float]) -> np.ndarray:
    """(N, C) float64: sums of values over the earlier places of the same group, fading.

    Args:
        groups: (N,) int64; -1 is no group, and never met.
        values: (N, C).
        half_lives: C of them, in places; infinity does not fade.
    """
    before = _same_before(groups)
    known = np.flatnonzero(before >= 0)
    last = before[known]
    kept = np.exp2(-(known - last)[:, None] / np.asarray(half_lives))
    sums = np.zeros(values.shape)
    for place, earlier, part in zip(known, last, kept, strict=True):
        sums[place] = (sums[earlier] + values[earlier]) * part
    return sums


def _same_before(groups: np.ndarray) -> np.ndarray:
    """(N,) int64: the last place before each that is of the same group; -1 where there is none."""
    order = np.argsort(groups, kind="stable")
    sorted_ = groups[order]
    same = (sorted_[1:] == sorted_[:-1]) & (sorted_[1:] >= 0)
    before = np.full(len(groups), -1)
    before[order[1:][same]] = order[:-1][same]
    return before
