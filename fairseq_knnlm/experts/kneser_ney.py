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
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from tqdm import tqdm

from fairseq_knnlm.errors import NGramError
from fairseq_knnlm.files import parse_json, publish, typed
from fairseq_knnlm.files.arrays import Archive, opened, write_card

FORMAT = "fairseq-knnlm n-grams"
VERSION = 1
#: Discounts of counts 1, 2 and 3 or more, after that of 0, where a text is too small or too regular
#: to estimate them.
FALLBACK = (0.0, 0.5, 1.0, 1.5)
#: The number of a gram that was never seen: arrays indexed by gram end in an entry for it.
UNSEEN = -1
#: Of the n-grams that are read.
MOST_ORDER = 16


class Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds of what a file of counts says of itself (``docs/format.md``)."""

    order: Annotated[int, msgspec.Meta(ge=1, le=MOST_ORDER)]
    vocabulary: Annotated[int, msgspec.Meta(ge=1, le=2**62)]
    tokens: Annotated[int, msgspec.Meta(ge=0, le=2**48)]
    datastore: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


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
        starts = np.flatnonzero(_first(context))
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
            probs[texts, tokens] += order.kept(grams) / order.totals[contexts[texts]]
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
        cls, tokens: np.ndarray, vocabulary: int, order: int = 5, progress: bool = True
    ) -> NGramModel:
        """Counts a text.

        While counting, some 30 bytes more a token are in use than the model takes in the end.

        Args:
            tokens: (N,) ids in the order of the text; may be shorter than ``order``, even empty.
            vocabulary: types in the dictionary, V.
            order: tokens of the longest n-grams, 1 or more.
            progress: show a bar.

        Raises:
            NGramError: where a token is not below ``vocabulary``.
        """
        assert order >= 1
        check_tokens(tokens, vocabulary)
        grams = list(_count(tokens, vocabulary, order, progress))
        return cls._of(grams, vocabulary, len(tokens))

    @classmethod
    def _of(
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

    def save(self, path: Path, fingerprint: str) -> None:
        """Writes the counts as an ``.npz``, atomically.

        Args:
            path: the file.
            fingerprint: of the datastore that was counted.
        """
        card = {
            "format": FORMAT,
            "version": VERSION,
            "order": self.order,
            "vocabulary": self.vocabulary,
            "tokens": self.tokens,
            "datastore": fingerprint,
        }
        arrays = {"card": write_card(card)}
        for n, order in enumerate(self.orders, start=1):
            arrays |= {f"keys_{n}": order.keys, f"counts_{n}": order.counts}
        with publish(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    @classmethod
    def load(
        cls,
        path: Path,
        fingerprint: str,
        *,
        vocabulary: int | None = None,
        tokens: int | None = None,
    ) -> NGramModel:
        """Reads what ``save`` wrote.

        Args:
            path: the file.
            fingerprint: of the datastore that is in use.
            vocabulary: types of its dictionary, where known.
            tokens: its entries, where known.

        Raises:
            NGramError: where it is missing, damaged, or was counted from another datastore.
        """
        with _counts(path, fingerprint) as (archive, card):
            for name, ours, theirs in (
                ("vocabulary", vocabulary, card.vocabulary),
                ("tokens", tokens, card.tokens),
            ):
                if ours is not None and ours != theirs:
                    raise ValueError(f"{name} {theirs:,} in the place of {ours:,}")
            return cls._of(_read_grams(archive, card), card.vocabulary, card.tokens)


def describe(path: Path, fingerprint: str) -> str:
    """What a file of counts says of itself, the counts unread.

    Raises:
        NGramError: as ``NGramModel.load``.
    """
    with _counts(path, fingerprint) as (_, card):
        return f"up to {card.order} tokens, of {card.tokens:,}"


@contextmanager
def _counts(path: Path, fingerprint: str) -> Iterator[tuple[Archive, Card]]:
    """The file of counts, open, and its card.

    Raises:
        NGramError: as ``NGramModel.load``, also of what is read from it.
    """
    remedy = f"delete {path}, so that the datastore is counted again"
    try:
        with opened(path) as archive:
            card = _read_card(archive)
            if card.datastore != fingerprint:
                raise NGramError(
                    f"{path} was counted from another datastore",
                    expected=f"datastore {fingerprint[:12]}...",
                    found=f"datastore {card.datastore[:12]}...",
                    do=remedy,
                )
            yield archive, card
    except ValueError as error:
        raise NGramError(
            f"{path} cannot be read",
            expected=f"n-gram counts of version {VERSION}",
            found=error,
            do=remedy,
        ) from None


def _read_card(archive: Archive) -> Card:
    fields = parse_json(archive.text("card"))
    if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
        raise ValueError("a file of another kind")
    if (version := fields.pop("version", None)) != VERSION:
        raise ValueError(f"version {version!r}")
    return typed(fields, Card)


def _read_grams(archive: Archive, card: Card) -> list[tuple[np.ndarray, np.ndarray]]:
    """Keys and counts as in ``Order``, of each order, lowest first.

    They must be what counting ``card.tokens`` tokens can come to; each order's counts sum up to
    what the next one, or the text, has of them.

    Raises:
        ValueError: naming the array that is not.
    """
    names = [f"{kind}_{n}" for n in range(1, card.order + 1) for kind in ("keys", "counts")]
    if unknown := set(archive.names) - {"card", *names}:
        raise ValueError(f"an array that does not belong to order {card.order}, {min(unknown)}")
    dtype = "int32" if card.tokens < 2**31 else "int64"
    grams, contexts = [], 1
    for n in range(1, card.order + 1):
        keys = archive.vector(f"keys_{n}", "int64")
        counts = archive.vector(f"counts_{n}", dtype)
        if len(counts) != len(keys) + 1:
            raise ValueError(f"counts_{n}: {len(counts):,} for {len(keys):,} keys")
        ascends = len(keys) == 0 or (keys[0] >= 0 and bool((keys[1:] > keys[:-1]).all()))
        # Divided, since the product of two large numbers could wrap.
        if not ascends or (len(keys) and int(keys[-1]) // card.vocabulary >= contexts):
            raise ValueError(
                f"keys_{n}: keys that do not ascend, or of contexts that there are not"
            )
        # A gram that only begins the text comes after no token.
        least = 1 if n == card.order else 0
        if (counts[:-1] < least).any() or counts[-1] != 0:
            raise ValueError(f"counts_{n}: a count below {least}, or no 0 at its end")
        grams.append((keys, counts))
        contexts = len(keys)
    sums = [len(keys) for keys, _ in grams[1:]] + [max(card.tokens - card.order + 1, 0)]
    for n, ((_, counts), expected) in enumerate(zip(grams, sums, strict=True), start=1):
        if (found := int(counts.sum(dtype=np.int64))) != expected:
            raise ValueError(f"counts_{n}: {found:,} in all in the place of {expected:,}")
    return grams


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


def _count(
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
    first = _first(keys)
    keys = keys[first]
    numbers = np.empty_like(contexts)
    numbers[places] = np.cumsum(first, dtype=contexts.dtype) - 1
    del places
    ends = [len(first)] * 2
    return numbers, keys, np.diff(np.flatnonzero(first), append=ends).astype(contexts.dtype)


def _first(ascending: np.ndarray) -> np.ndarray:
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
