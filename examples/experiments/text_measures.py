"""Measures of written texts: variety, repetition, copying, nearness to what people wrote.

Texts are ids of tokens, (T, N): T texts of N tokens each, with N at least the n of the n-grams that
are counted. Shares go from 0 to 1. What is measured for each text by itself is (T,) float64.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from fairseq_knnlm.experts.kneser_ney import NGramModel


def spread(length: int, count: int, size: int) -> np.ndarray:
    """(C,) int64: where C stretches begin in a text, evenly spread, none overlapping.

    Args:
        length: tokens of the whole text.
        count: stretches that are wanted; there are fewer where the text has no room for them.
        size: tokens of each.
    """
    count = min(count, length // size)
    return np.arange(count) * length // max(count, 1)


def distinct(texts: np.ndarray, n: int) -> float:
    """Distinct n-grams of all texts together, of all their n-grams (Li et al., 2016)."""
    grams = sliding_window_view(texts, n, axis=1).reshape(-1, n)
    return len(np.unique(grams, axis=0)) / len(grams)


def repeated(texts: np.ndarray, n: int = 4) -> np.ndarray:
    """(T,) share of n-grams that stood in their text before: seq-rep-n of Welleck et al. (2020)."""
    return 1 - np.array([distinct(text[None], n) for text in texts])


def looping(texts: np.ndarray) -> np.ndarray:
    """(T,) 1 where a text ends in a loop, else 0."""
    return np.array([float(ends_in_loop(text)) for text in texts])


def ends_in_loop(text: np.ndarray, least: int = 2, times: int = 3) -> bool:
    """Whether a text (N,) ends in a phrase said again and again (Holtzman et al., 2020).

    Args:
        text: its tokens.
        least: tokens of the phrase; a single token counts where it fills as many phrases.
        times: that it is said at least, without anything between.
    """
    for size in range(least, len(text) // times + 1):
        end = text[len(text) - times * size :]
        if np.array_equal(end[size:], end[:-size]):
            return True
    return False


def copied(texts: np.ndarray, sources: Iterable[np.ndarray], n: int = 8) -> np.ndarray:
    """(T,) share of each text's n-grams that stand in one of the sources, each (M,) ids."""
    # A datastore's text is long: what is kept is what was written, not what was read.
    written = {gram for text in texts for gram in _keys(text, n)}
    known: set[bytes] = set()
    for source in sources:
        known |= written.intersection(_keys(source, n))
    return np.array([np.mean([gram in known for gram in _keys(text, n)]) for text in texts])


def echoed(texts: np.ndarray, prompts: np.ndarray, n: int = 4) -> np.ndarray:
    """(T,) share of each text's n-grams that stand in its prompt, of (T, P) ids."""
    pairs = zip(texts, prompts, strict=True)
    return np.concatenate([copied(text[None], [prompt], n) for text, prompt in pairs])


def shared(texts: np.ndarray, truths: np.ndarray, n: int) -> np.ndarray:
    """(T,) share of each text's n-grams that the true continuation of its prompt has too.

    Each counts as often as it stands there at most: the precision in BLEU (Papineni et al., 2002).

    Args:
        texts: (T, N) ids.
        truths: (T, M) ids.
        n: tokens of a gram.
    """
    pairs = zip(texts, truths, strict=True)
    grams = [(Counter(_keys(text, n)), Counter(_keys(truth, n))) for text, truth in pairs]
    return np.array([(ours & theirs).total() / ours.total() for ours, theirs in grams])


def _keys(text: np.ndarray, n: int) -> Iterator[bytes]:
    """The n-grams of a text (N,), in whatever type its ids are stored, as keys of a set."""
    if len(text) >= n:
        for gram in sliding_window_view(text.astype(np.int64), n):
            yield gram.tobytes()


def nats(model: NGramModel, prompts: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """(T,) mean of -log p of each text's tokens under an n-gram model, natural log.

    Args:
        model: n-grams of another text.
        prompts: (T, P) ids that stand before each text, P at least the tokens of a context.
        texts: (T, N) ids.

    Raises:
        NGramError: where a token is not below the model's vocabulary.
    """
    start = prompts.shape[1] - (model.order - 1)
    assert start >= 0
    whole = np.concatenate([prompts, texts], axis=1)[:, start:]
    grams = sliding_window_view(whole, model.order, axis=1).reshape(-1, model.order)
    found = model.after(grams[:, :-1]).log_prob(grams[:, -1])
    return -found.reshape(texts.shape).mean(axis=1, dtype=np.float64)


def mean(each: np.ndarray) -> tuple[float, float]:
    """Of numbers (T,), and how far it may be off: 1.96 standard errors; 0 of a single number."""
    error = each.std(ddof=1) / np.sqrt(len(each)) if len(each) > 1 else 0.0
    return float(each.mean()), float(1.96 * error)
