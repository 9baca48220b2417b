"""Counts of n-grams as a file beside the datastore whose text they are of (``docs/format.md``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from fairseq_knnlm.errors import NGramError
from fairseq_knnlm.experts.kneser_ney import NGramModel
from fairseq_knnlm.experts.ngram_counting import text_lengths
from fairseq_knnlm.files import parse_json, publish, typed
from fairseq_knnlm.files.arrays import Archive, opened, write_card

FORMAT = "fairseq-knnlm n-grams"
VERSION = 1
#: Of the n-grams that are read.
MOST_ORDER = 16


class Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds of what a file of counts says of itself (``docs/format.md``)."""

    order: Annotated[int, msgspec.Meta(ge=1, le=MOST_ORDER)]
    vocabulary: Annotated[int, msgspec.Meta(ge=1, le=2**62)]
    tokens: Annotated[int, msgspec.Meta(ge=0, le=2**48)]
    datastore: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


def save_counts(model: NGramModel, path: Path, fingerprint: str) -> None:
    """Writes the counts as an ``.npz``, atomically.

    Args:
        model: the counts.
        path: the file.
        fingerprint: of the datastore that was counted.
    """
    card = {
        "format": FORMAT,
        "version": VERSION,
        "order": model.order,
        "vocabulary": model.vocabulary,
        "tokens": model.tokens,
        "datastore": fingerprint,
    }
    arrays = {"card": write_card(card)}
    for n, order in enumerate(model.orders, start=1):
        arrays |= {f"keys_{n}": order.keys, f"counts_{n}": order.counts}
    with publish(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def load_counts(
    path: Path,
    fingerprint: str,
    *,
    vocabulary: int | None = None,
    tokens: int | None = None,
    breaks: Sequence[int] | np.ndarray = (0,),
) -> NGramModel:
    """Reads what ``save_counts`` wrote.

    Args:
        path: the file.
        fingerprint: of the datastore that is in use.
        vocabulary: types of its dictionary, where known.
        tokens: its entries, where known.
        breaks: where its texts begin (``Datastore.breaks``).

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
        return NGramModel.of(_read_grams(archive, card, breaks), card.vocabulary, card.tokens)


def describe_counts(path: Path, fingerprint: str) -> str:
    """What a file of counts says of itself, the counts unread.

    Raises:
        NGramError: as ``load_counts``.
    """
    with _counts(path, fingerprint) as (_, card):
        return f"up to {card.order} tokens, of {card.tokens:,}"


def counted_from(path: Path) -> str:
    """The fingerprint of the datastore that a file of counts was counted from.

    Raises:
        NGramError: where it is missing or damaged.
    """
    with _counts(path) as (_, card):
        return card.datastore


@contextmanager
def _counts(path: Path, fingerprint: str | None = None) -> Iterator[tuple[Archive, Card]]:
    """The file of counts, open, and its card; of any datastore where none is asked for.

    Raises:
        NGramError: as ``load_counts``, also of what is read from it.
    """
    remedy = f"delete {path}, so that the datastore is counted again"
    try:
        with opened(path) as archive:
            card = _read_card(archive)
            if fingerprint is not None and card.datastore != fingerprint:
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


def _read_grams(
    archive: Archive, card: Card, breaks: Sequence[int] | np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Keys and counts as in ``Order``, of each order, lowest first.

    They must be what counting ``card.tokens`` tokens of texts that begin at ``breaks`` can come to;
    each order's counts sum up to what the next one, or the texts, have of them.

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
    longest = (text_lengths(breaks, card.tokens) - card.order + 1).clip(0).sum()
    sums = [*(len(keys) for keys, _ in grams[1:]), int(longest)]
    for n, ((_, counts), expected) in enumerate(zip(grams, sums, strict=True), start=1):
        if (found := int(counts.sum(dtype=np.int64))) != expected:
            raise ValueError(f"counts_{n}: {found:,} in all in the place of {expected:,}")
    return grams
