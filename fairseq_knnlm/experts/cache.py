"""The continuous cache: the text just read, as a memory (Grave et al., 2017).

p_cache(w) is the sum over the earlier positions i of the window whose token was w of
softmax_i(theta h_i . h_t), with h the features from which the model predicts. Only tokens that
stand strictly before the one to be predicted count, across blocks and batches, so the text must be
read in its order. Where there are several texts, each has a cache of its own, which is empty where
the text begins.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fairseq_knnlm.bounds import check_count
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.experts.contract import Joined
from fairseq_knnlm.experts.entries import Entries, Extents, Pairs
from fairseq_knnlm.experts.kind import Kind, Models, Opened, flag
from fairseq_knnlm.experts.knn import SUFFIXES
from fairseq_knnlm.experts.on_text import OnText, documents_ended, followed
from fairseq_knnlm.experts.recent import (
    QUERIES_AT_A_TIME,
    STEP,
    Piece,
    Read,
    Recent,
    alike,
)
from fairseq_knnlm.experts.sparse import Many, SparsePrediction, SparseSetting, asked_of
from fairseq_knnlm.experts.windows import WindowEntries, Windows
from fairseq_knnlm.files import human_bytes
from fairseq_knnlm.files.sizes import available_memory
from fairseq_knnlm.lm.contexts import CONTEXT, Contexts
from fairseq_knnlm.lm.products import inner_products

#: Windows and thetas in a score table; these thetas are over sqrt(D), as attention's scale is.
WINDOWS = (500, 1000, 2000, 4000, 8000)
THETAS = (0.0, 0.25, 2**-1.5, 0.5, 2**-0.75, 2**-0.5, 2**-0.25, 1.0, 2**0.5)
#: The same for positions that share a suffix.
SUFFIX_THETAS = (0.0, 0.5, 1.0)
#: Windows and thetas at which the shape of the cache is a feature.
FEATURE_WINDOWS = (500, 4000)
FEATURE_THETAS = (0.5, 1.0)
#: What ``--cache-theta`` may be.
MOST_THETA = 1e9
#: A window up to which the scores of a few times as many take no memory to speak of.
MIDDLING = 8192


@dataclass(frozen=True, order=True)
class CacheSetting:
    """How recent text becomes a distribution.

    Attributes:
        suffix: count only positions whose last ``suffix`` tokens are those of the context.
        theta: multiplies the products of features.
        window: positions looked back.
    """

    suffix: int = 0
    theta: float = 1.0
    window: int = 4000


def cache_grid(width: int) -> list[CacheSetting]:
    """The settings of a score table, for features of D = ``width``."""
    return [
        *(CacheSetting(0, over_root(x, width), window) for x in THETAS for window in WINDOWS),
        *(
            CacheSetting(suffix, over_root(x, width), WINDOWS[-1])
            for suffix in SUFFIXES[:2]
            for x in SUFFIX_THETAS
        ),
    ]


def contexts_at_a_time(window: int) -> int:
    """Contexts that a cache is best asked of at a time: their scores are kept until they are."""
    return QUERIES_AT_A_TIME * (4 if window <= MIDDLING else 1)


def cache_bytes(settings: Sequence[CacheSetting], width: int, *, features: bool = False) -> int:
    """Bytes that a cache of these settings will need, for features of D = ``width``.

    The window's keys, tokens and contexts, twice while it moves on; for each context its scores (4
    bytes each) and masks (1 byte each), and for those that are worked on copies of them. A text
    that says little but one token needs more.
    """
    window = max(
        [setting.window for setting in settings] + [*(FEATURE_WINDOWS if features else ())]
    )
    suffixes = max([setting.suffix for setting in settings] + [2 if features else 0])
    text = 4 * width + 8 * (CONTEXT + 2)
    kept = contexts_at_a_time(window) * (4 + 1 + suffixes)
    worked_on = QUERIES_AT_A_TIME * (2 * 4 + 2 + suffixes)
    return (window + QUERIES_AT_A_TIME) * (2 * text + kept + worked_on)


def check_memory(needed: int, available: int) -> None:
    """Refuses a window that memory cannot hold.

    Args:
        needed: bytes, by ``cache_bytes``.
        available: bytes.

    Raises:
        ConfigError: where there are fewer.
    """
    if needed > available:
        raise ConfigError(
            "the cache does not fit into memory",
            expected=f"{human_bytes(needed)}, which a window of so many tokens needs",
            found=f"{human_bytes(available)} available",
            do="pass a smaller --cache-window",
        )


def over_root(theta: float, width: int) -> float:
    """theta / sqrt(D)."""
    return theta / math.sqrt(width)


class CacheExpert(OnText[Recent]):
    """p_cache, from the text before each context.

    Args:
        settings: windows and thetas, a column each.
        eos: the token that ends a line; two in a row are an empty line, which ends a document.
        reset: forget everything where a document ends.
        features: name features too.
    """

    name = "cache"

    def __init__(
        self,
        settings: Sequence[CacheSetting],
        eos: int,
        *,
        reset: bool = False,
        features: bool = False,
    ) -> None:
        super().__init__()
        self.settings = [vars(setting) for setting in settings]
        self.eos = eos
        self.reset = reset
        self.features = features
        windows = {setting.window for setting in settings}
        self.windows = sorted(windows | set(FEATURE_WINDOWS if features else ()))
        self.at_a_time = contexts_at_a_time(self.windows[-1])
        self.length = max(2, self.windows[-1])  # two line ends make an empty line
        # The first line end may stand before the window, and part its first position from the next.
        self.looks_back = self.length + 1
        self._suffix = max([setting.suffix for setting in settings] + [2 if features else 0])
        self._columns = [
            SparseSetting(setting.suffix, self.windows.index(setting.window), setting.theta)
            for setting in settings
        ]

    def predict(self, contexts: Contexts) -> Joined:
        """What follows each context, given all its text before it.

        Raises:
            ConfigError: where a context lies before one that was already read.
        """
        read = [self._read(text, contexts, order) for text, order in self._new(contexts)]
        longest = max([len(one.text) for one in read], default=0)
        length = min(self.length, -(-longest // STEP) * STEP)
        groups = alike([piece for one in read for piece in one.pieces(length)])
        if not groups:
            groups = [[Piece.nothing(contexts)]]
        return Joined(
            [self._predicted(group) for group in groups],
            [sum(len(piece.places) for piece in group) for group in groups],
            torch.cat([piece.places for group in groups for piece in group]),
            len(contexts),
        )

    def _read(self, text: int, contexts: Contexts, order: Tensor) -> Read:
        """Some positions in the order of their text, which is longer now."""
        keys, before = contexts.features[order].float(), contexts.before[order]
        kept = self._earlier(text, contexts, order) or Recent.nothing(0, keys)
        tokens, row = followed(contexts, order), int(contexts.rows[order[-1]])
        whole = kept + Recent(keys, tokens, before, self._documents(kept, tokens), row)
        # More than the window, of which some may be taken back.
        self._keep(text, whole[-self.length - len(order) :], order)
        return Read(order, whole)

    def _documents(self, earlier: Recent, tokens: Tensor) -> Tensor:
        """The document of each of these positions: it ends with an empty line.

        What a position's own token is does not matter: it is yet to be predicted.
        """
        if not self.reset:
            return torch.zeros_like(tokens)
        number = earlier.documents[-1:].sum()
        return number + documents_ended(tokens, self.eos, earlier.tokens)

    def _predicted(self, pieces: Sequence[Piece]) -> SparsePrediction:
        """What follows the positions of pieces that have as many each."""
        queries = Recent.stacked([piece.queries for piece in pieces])
        text = Recent.stacked([piece.text for piece in pieces])
        texts, size = queries.tokens.shape
        length = text.tokens.shape[1]
        windows = Windows(texts, length, size, wide=min(self.windows[-1], length - size))
        counted = _counted(windows, queries, text)
        entries = WindowEntries(
            tokens=windows.around(text.tokens),
            scores=windows.of(inner_products(queries.keys, text.keys)),
            counted=counted,
            sharing=list(self._sharing(windows, queries, text, counted)),
            extents=self._extents(windows.wide),
            windows=windows,
            text=text.tokens,
        )
        if not self.features:
            return SparsePrediction(entries, self._columns)
        every = Many.of(entries)
        features = self._features(entries, every, text.keys.shape[2])
        return SparsePrediction(entries, self._columns, features, every)

    def _sharing(
        self, windows: Windows, queries: Recent, text: Recent, counted: Tensor | None
    ) -> Iterator[Pairs]:
        """For 1, 2, ... tokens: who counts, and comes after the same last tokens as a query."""
        if not self._suffix:
            return
        pairs = windows.alike(text.before[..., 0], queries.before[..., 0])
        if counted is not None:
            pairs = pairs.among(counted[pairs])
        yield pairs
        theirs, ours = text.before.flatten(0, 1), queries.before.flatten(0, 1)
        for steps in range(1, self._suffix):
            before = ours[pairs.rows, steps]
            same = theirs[windows.positions(pairs), steps] == before
            pairs = pairs.among(same & (before >= 0))
            yield pairs

    def _extents(self, wide: int) -> Extents:
        """The windows, as parts of so many columns, the latest last.

        Each is the next smaller one and a ring of positions before it.
        """
        ends = [min(window, wide) for window in self.windows]
        return Extents([slice(wide - far, wide - near) for near, far in pairwise([0, *ends])])

    def _features(self, entries: Entries, every: Many, width: int) -> dict[str, Tensor]:
        at = [self.windows.index(window) for window in FEATURE_WINDOWS]
        best = every.tops.amax(dim=1, keepdim=True)
        thetas = [over_root(theta, width) for theta in FEATURE_THETAS]
        asked = asked_of(self._columns, suffix=0)  # so that all is summed up at once
        asked |= {theta: max(at[-1] + 1, asked.get(theta, 0)) for theta in thetas}
        sums = every.log_sums(asked)
        sizes = [sums[theta][:, at] - theta * best for theta in thetas]
        return {
            "cache_size": torch.cat(sizes, dim=1).clamp_min(math.log(1e-6)),
            "cache_shared": entries.counts().float().log1p(),
        }


def _counted(windows: Windows, queries: Recent, text: Recent) -> Tensor | None:
    """Which entries count: those of the query's document, where there is one; None where all do."""
    same = text.documents == text.documents[:, -1:]
    if bool(same.all()) and bool((text.tokens[:, :-1] >= 0).all()):
        return None
    known = text.tokens[:, None] >= 0
    return windows.of(known & (text.documents[:, None] == queries.documents[:, :, None]))


@dataclass(frozen=True)
class CacheOptions:
    """Flags of the cache."""

    cache_lmbda: float | None = flag(
        None, "weight of the cache (default: the calibration, else 0.1)", weight=True
    )
    cache_window: int | None = flag(
        None,
        "tokens that the cache looks back (default: the calibration, else 4000)",
        setting="window",
        counts="tokens",
    )
    cache_theta: float | None = flag(
        None,
        "sharpness of the cache, times the product of features (default: the calibration, else "
        "1 / sqrt of their width)",
        setting="theta",
    )
    cache_reset: bool = flag(False, "empty the cache where a document ends, at an empty line")


class CacheKind(Kind):
    """``cache``."""

    name = "cache"
    options = CacheOptions
    setting = CacheSetting

    def check(self, options: CacheOptions, asked: bool) -> None:
        theta = options.cache_theta
        check_count("--cache-theta", theta, "is a sharpness", MOST_THETA, least=0)

    def needs_order(self, options: CacheOptions) -> bool:
        return True

    def grid(self, opened: Opened, models: Models) -> list[CacheSetting]:
        return cache_grid(models.width)

    def default(self, opened: Opened, models: Models) -> CacheSetting:
        return CacheSetting(theta=1 / math.sqrt(models.width))

    def make(
        self, opened: Opened, models: Models, settings: Sequence[CacheSetting], features: bool
    ) -> CacheExpert:
        check_memory(cache_bytes(settings, models.width, features=features), available_memory())
        reset = opened.options.cache_reset
        return CacheExpert(settings, models.eos, reset=reset, features=features)

    def described(self, opened: Opened, models: Models) -> dict[str, Any]:
        return {"reset": opened.options.cache_reset}


KIND = CacheKind()
