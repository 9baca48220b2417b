"""How well each expert did on the tokens before: features that need only the past.

Whoever has no more of an expert than the probabilities it gave can still tell where it is to be
trusted: it did well on the last token, on the last few, or whenever the same word went before.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fairseq_knnlm.experts.history import faded_sums, preceding

#: Half-life, in tokens, of how an expert did lately.
LATELY = 20.0
#: So many tokens of the average are added to those that followed the same word, which may be few.
ADDED = 2.0
#: An expert is no better or worse than the language model than this, in nats: -inf is a number too.
MOST = 5.0


def past_features(
    tokens: np.ndarray, lm: np.ndarray, experts: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Features of each token that depend on the tokens before it alone.

    Of each expert, ``NAME_last``, ``NAME_lately`` and ``NAME_after``: what it gained on the
    language model on the last token, on the last few, and on those that followed the same word, in
    nats; of the language model itself, ``lm_last``, ...: its log-probabilities there.

    Args:
        tokens: (N,) ids.
        lm: (N,) log p of the language model, natural log.
        experts: by name, (N,) or (N, S) log p of an expert; -inf and NaN allowed.

    Returns:
        (N, S) float32 each; NaN where there is nothing before.
    """
    values = {"lm": lm[:, None].astype(np.float64)}
    for name, column in experts.items():
        gain = column.reshape(len(lm), -1) - values["lm"]
        values[name] = np.clip(np.nan_to_num(gain, nan=0.0), -MOST, MOST)
    names = list(values)
    every = np.concatenate(list(values.values()), axis=1)
    whole = np.zeros(len(lm), np.int64)
    found = {
        "last": np.concatenate([np.full_like(every[:1], np.nan), every[:-1]]),
        "lately": faded_means(whole, every, LATELY),
        "after": _after_same_word(tokens, every),
    }
    cuts = np.cumsum([values[name].shape[1] for name in names])[:-1]
    return {
        f"{name}_{kind}": part.astype(np.float32)
        for kind, columns in found.items()
        for name, part in zip(names, np.split(columns, cuts, axis=1), strict=True)
    }


def faded_means(groups: np.ndarray, values: np.ndarray, half_life: float) -> np.ndarray:
    """(N, C) float64: means over the earlier places of the same group; NaN where there are none."""
    sums = _sums_and_counts(groups, values, half_life)
    with np.errstate(invalid="ignore"):
        return sums[:, :-1] / sums[:, -1:]


def _after_same_word(tokens: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(N, C) float64: means over the earlier places after the same word, and a little of all."""
    of_all = faded_means(np.zeros(len(tokens), np.int64), values, np.inf)
    sums = _sums_and_counts(preceding(tokens, 1)[1], values, np.inf)
    return (sums[:, :-1] + ADDED * of_all) / (sums[:, -1:] + ADDED)


def _sums_and_counts(groups: np.ndarray, values: np.ndarray, half_life: float) -> np.ndarray:
    """(N, C + 1) float64: of values, and of ones."""
    ones = np.ones((len(values), 1))
    columns = np.concatenate([values, ones], axis=1)
    return faded_sums(groups, columns, [half_life] * columns.shape[1])
