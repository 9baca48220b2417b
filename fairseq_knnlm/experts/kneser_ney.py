"""An n-gram model of the datastore's own text: what follows the last few tokens, word for word.

Interpolated modified Kneser-Ney (Kneser & Ney, 1995; Chen & Goodman, 1999). With c an n-gram's
count, D the discount of its order for that count, and the sums over all types v,

    p(w | context) = (c(context w) - D) / sum c(context v)
                   + sum D / sum c(context v) * p(w | context without its first token)

and below the single tokens the uniform distribution over the dictionary. The highest order counts
how often an n-gram was seen; the others count the distinct tokens that it was seen after.

The n-grams of an order are numbered in the order of their keys, where the key of a gram is the
number of its context, a gram one token shorter, times the vocabulary, plus its last token. So a
text is counted by one sort an order, and looked up by one binary search a token and order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from fairseq_knnlm.errors import NGramError
from fairseq_knnlm.experts.ngram_counting import count_grams, first_of_each, text_lengths

#: Discounts of counts 1, 2 and 3 or more, after that of 0, where a text is too small or too regular
#: to estimate them.
FALLBACK = (0.0, 0.5, 1.0, 1.5)
#: The number of a gram that was never seen: arrays indexed by gram end in an entry for it.
UNSEEN = -1


@dataclass(frozen=True)
class Order:
    """The n-grams of one n: G of them, after C contexts of n - 1 tokens.

    Attributes:
        keys: (G,) int64, ascending: context * vocabulary + token.
        counts: (G + 1,) integers; the last is 0, for what was never seen.
        totals: (C + 1,) integers, sum of the counts after a context.
        types: (C + 1,) integers, how many grams with a count follow a context.
        backoff: (C + 1,) float64, the share of the order below; 1 after an unknown context.
        discounts: (4,) float64, by count, from 0 to 3 or more.
    """

    keys: np.ndarray
    counts: np.ndarray
    totals: np.ndarray
    types: np.ndarray
    backoff: np.ndarray
    discounts: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, counts: np.ndarray, contexts: int, vocabulary: int) -> Order:
        """Sums up keys and counts over their contexts, C = ``contexts``."""
        context = keys // vocabulary
        starts = np.flatnonzero(first_of_each(context))
        followed = context[starts]
        del context  # as large as the keys

        def total(amounts: np.ndarray, dtype: np.dtype) -> np.ndarray:
            totals = np.zeros(contexts + 1, dtype)
            # Keys ascend, so the grams of a context stand side by side.
            totals[followed] = np.add.reduceat(amounts[:-1], starts, dtype=dtype)
            return totals

        discounts = estimate_discounts(counts)
        backoff = total(discounts.take(counts, mode="clip"), discounts.dtype)
        totals = total(counts, counts.dtype)
        known = totals > 0
        np.divide(backoff, totals, out=backoff, where=known)
        backoff[~known] = 1
        types = total(counts > 0, counts.dtype)
        return cls(keys, counts, totals, types, backoff, discounts)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The numbers of the grams with these keys, -1 where never seen; an array of any shape."""
        if not len(self.keys):
            return np.full_like(keys, UNSEEN)
        places = np.searchsorted(self.keys, keys)
        found = self.keys.take(places, mode="clip") == keys
        return np.where(found, places, UNSEEN)

    def following(self, contexts: np.ndarray, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
        """The grams that follow contexts (N,): (P,) which of the N, and (P,) the grams' numbers."""
        starts, ends = (np.searchsorted(self.keys, (contexts + n) * vocabulary) for n in (0, 1))
        lengths = ends - starts
        texts = np.repeat(np.arange(len(contexts)), lengths)
        within = np.arange(len(texts)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return texts, starts[texts] + within

    def kept(self, grams: np.ndarray) -> np.ndarray:
        """Counts of grams less their discounts, of the grams' shape, float64."""
        counts = self.counts[grams]
        return counts - self.discounts.take(counts, mode="clip")

    def interpolate(self, contexts: np.ndarray, grams: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """Probabilities of this order from those of the order below, all of one shape, float64."""
        kept = self.kept(grams) / np.maximum(self.totals[contexts], 1)
        return kept + self.backoff[contexts] * lower


@dataclass(frozen=True)
class After:
    """What an n-gram model knows of the tokens that follow N texts.

    Attributes:
        orders: those of the model, lowest first.
        contexts: (N,) for each order, the number of the gram that is its context; -1 where unseen.
        vocabulary: types of the dictionary, V.
    """

    orders: Sequence[Order]
    contexts: Sequence[np.ndarray]
    vocabulary: int

    def log_prob(self, tokens: np.ndarray) -> np.ndarray:
        """log p of one token (N,) after each text: (N,) float32, natural log, finite.

        Raises:
            NGramError: where a token is not in the dictionary.
        """
        check_tokens(tokens, self.vocabulary)
        probs = np.full(len(tokens), 1 / self.vocabulary)
        for order, contexts in zip(self.orders, self.contexts, strict=True):
            # After an unseen context the key is negative, so nothing is found.
            grams = order.find(contexts * self.vocabulary + tokens)
            probs = order.interpolate(contexts, grams, probs)
        return np.log(probs).astype(np.float32)

    def log_probs(self) -> np.ndarray:
        """log p of every token after each text: (N, V) float32, natural log, finite."""
        return np.log(self.probs()).astype(np.float32)

    def probs(self) -> np.ndarray:
        """The probability of every token after each text: (N, V) float64; rows sum to 1."""
        probs = np.full((len(self.contexts[0]), self.vocabulary), 1 / self.vocabulary)
        for order, contexts in zip(self.orders, self.contexts, strict=True):
            probs *= order.backoff[contexts, None]
            texts, grams = order.following(contexts, self.vocabulary)
            tokens = order.keys[grams] - contexts[texts] * self.vocabulary
            probs[texts, tokens] += order.kept(grams) / np.maximum(order.totals[contexts[texts]], 1)
        return probs

    # What a mixer may go by (He et al., 2021, use the like); of the longest context that is known:

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64, its tokens, from 0 to order - 1."""
        known = [
            order.totals[contexts] > 0
            for order, contexts in zip(self.orders, self.contexts, strict=True)
        ]
        return np.stack(known)[1:].sum(axis=0)

    @property
    def counts(self) -> np.ndarray:
        """(N,) float32, natural log of how often it was seen.

        Occurrences at order - 1 tokens, below that distinct pairs of a token before and one after.
        """
        return self._of_longest([order.totals for order in self.orders])

    @property
    def types(self) -> np.ndarray:
        """(N,) float32, natural log of how many distinct tokens followed it."""
        return self._of_longest([order.types for order in self.orders])

    def _of_longest(self, amounts: Sequence[np.ndarray]) -> np.ndarray:
        found = np.ones(len(self.contexts[0]), np.int64)
        for order, contexts, amount in zip(self.orders, self.contexts, amounts, strict=True):
            known = order.totals[contexts] > 0
            found[known] = amount[contexts[known]]
        return np.log(found).astype(np.float32)


class NGramModel:
    """Counts of a text, and the probabilities that follow from them.

    In memory a distinct n-gram takes 12 bytes, and one that is also a context 16 more. At order 5
    that is 63 bytes a token of WikiText-2, and can be no more than 124 of any text.

    Args:
        orders: from single tokens upwards.
        vocabulary: types in the dictionary, V.
        tokens: how many were counted.
    """

    def __init__(self, orders: list[Order], vocabulary: int, tokens: int) -> None:
        self.orders = orders
        self.vocabulary = vocabulary
        self.tokens = tokens

    @property
    def order(self) -> int:
        """Tokens of the longest n-grams."""
        return len(self.orders)

    @classmethod
    def count(
        cls,
        tokens: np.ndarray,
        vocabulary: int,
        order: int = 5,
        progress: bool = True,
        *,
        breaks: Sequence[int] | np.ndarray = (0,),
    ) -> NGramModel:
        """Counts a text, or several.

        While counting, some 30 bytes more a token are in use than the model takes in the end.

        Args:
            tokens: (N,) ids in the order of the text; may be shorter than ``order``, even empty.
            vocabulary: types in the dictionary, V.
            order: tokens of the longest n-grams, 1 or more.
            progress: show a bar.
            breaks: where a text begins, ascending from 0; no n-gram goes over such a place.

        Raises:
            NGramError: where a token is not below ``vocabulary``.
        """
        assert order >= 1
        check_tokens(tokens, vocabulary)
        lengths = text_lengths(breaks, len(tokens))
        grams = list(count_grams(tokens, lengths, vocabulary, order, progress))
        return cls.of(grams, vocabulary, len(tokens))

    @classmethod
    def of(
        cls, grams: list[tuple[np.ndarray, np.ndarray]], vocabulary: int, tokens: int
    ) -> NGramModel:
        contexts = [1] + [len(keys) for keys, _ in grams[:-1]]
        orders = [
            Order.of(keys, counts, size, vocabulary)
            for (keys, counts), size in zip(grams, contexts, strict=True)
        ]
        return cls(orders, vocabulary, tokens)

    def after(self, texts: np.ndarray) -> After:
        """What follows texts, as far as their last order - 1 tokens tell.

        Args:
            texts: (N, M) ids, the latest last; -1 for an unknown token.

        Raises:
            NGramError: where a token is not below the model's vocabulary.
        """
        check_tokens(texts.clip(0), self.vocabulary)
        contexts = [np.zeros(len(texts), np.int64)]
        if texts.shape[1]:
            shorter = islice(self._look_up(texts[:, -self.order :]), self.order - 1)
            contexts += [grams[:, -1] for _, _, grams in shorter]
        else:
            contexts += [np.full(len(texts), UNSEEN)] * (self.order - 1)
        return After(self.orders, contexts, self.vocabulary)

    def _look_up(self, tokens: np.ndarray) -> Iterator[tuple[Order, np.ndarray, np.ndarray]]:
        """Each order, lowest first, with the contexts of (..., M) tokens and the grams they end.

        Both are numbers of the shape of ``tokens``, whose last axis is the text; -1 for a gram
        that was never seen. After such a context the key is negative, so nothing is found; after
        any other an unknown token's would be the key of the gram before.
        """
        contexts, unknown = np.zeros(tokens.shape, np.int64), tokens < 0
        for order in self.orders:
            grams = order.find(contexts * self.vocabulary + tokens)
            grams[unknown] = UNSEEN
            yield order, contexts, grams
            contexts = np.full_like(grams, UNSEEN)
            contexts[..., 1:] = grams[..., :-1]


def estimate_discounts(counts: np.ndarray) -> np.ndarray:
    """(4,) float64: 0, D1, D2 and D3+ from an order's counts (Chen & Goodman, 1999).

    Each lies above 0, so that every context leaves something to the order below and no type has
    probability 0, and no higher than its count.
    """
    met = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].astype(np.float64)
    fewer, more = met[:3], met[1:]
    if fewer.all():
        ratio = met[0] / (met[0] + 2 * met[1])
        times = np.arange(1, 4)
        discounts = times - (times + 1) * ratio * more / fewer
        if (discounts > 0).all():
            return np.array([0.0, *discounts])
    return np.array(FALLBACK)


def check_tokens(tokens: np.ndarray, vocabulary: int) -> None:
    """Refuses ids that are not below the vocabulary.

    Raises:
        NGramError: naming what was found.
    """
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocabulary):
        raise NGramError(
            "a token is not in the dictionary",
            expected=f"ids from 0 to {vocabulary - 1:,}",
            found=f"ids from {tokens.min():,} to {tokens.max():,}",
            do="binarise the text with the dictionary of the datastore",
        )
