"""The continuous cache: the text just read, as a memory (Grave et al., 2017).

p_cache(w) is the sum over the earlier positions i of the window whose token was w of
softmax_i(theta h_i . h_t), with h the features from which the model predicts. Only tokens that
stand strictly before the one to be predicted count, across blocks and batches, so the text must be
read in its order. Where every sentence is a text of its own, each begins with an empty cache.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_knnlm.bounds import check_count
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.experts.kind import Kind, Models, Opened, flag
from fairseq_knnlm.experts.knn import SUFFIXES, Opinion, Passage, joined
from fairseq_knnlm.files import human_bytes
from fairseq_knnlm.lm.transformer import CONTEXT

#: Windows and thetas in a score table; these thetas are over sqrt(D), as attention's scale is.
WINDOWS = (500, 1000, 2000, 4000, 8000)
THETAS = (0.0, 0.25, 2**-1.5, 0.5, 2**-0.75, 2**-0.5, 2**-0.25, 1.0, 2**0.5)
#: The same for positions that share a suffix.
SUFFIX_THETAS = (0.0, 0.5, 1.0)
#: Windows and thetas at which the shape of the cache is a feature.
FEATURE_WINDOWS = (500, 4000)
FEATURE_THETAS = (0.5, 1.0)
#: Queries looked up at a time: each goes with a window of scores.
QUERIES_AT_A_TIME = 256
#: What ``--cache-theta`` may be.
MOST_THETA = 1e9


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


def cache_bytes(settings: Sequence[CacheSetting], width: int, *, features: bool = False) -> int:
    """Bytes that a cache of these settings will need, for features of D = ``width``.

    The window's keys, tokens and contexts, twice while it moves on; and for each query of a batch
    its scores, their copies that are worked on (4 bytes each), and the masks (1 byte each).
    """
    windows = [setting.window for setting in settings] + [*(FEATURE_WINDOWS if features else ())]
    suffixes = max([setting.suffix for setting in settings] + [2 if features else 0])
    text = 4 * width + 8 * (CONTEXT + 2)
    scores = QUERIES_AT_A_TIME * (3 * 4 + 3 + 2 * suffixes)
    return (max(windows) + QUERIES_AT_A_TIME) * (2 * text + scores)


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


@dataclass(frozen=True)
class Recent:
    """Positions of a text, the latest at the end.

    Attributes:
        keys: (M, D) float32, the language model's features.
        tokens: (M,) int64, what followed.
        context: (M, CONTEXT) int64, what came before.
        documents: (M,) int64, the number of the document, ascending; -1 before all text.
    """

    keys: Tensor
    tokens: Tensor
    context: Tensor
    documents: Tensor

    @classmethod
    def nothing(cls, length: int, like: Tensor) -> Recent:
        """``length`` positions before all text, for keys like these."""
        none = torch.full((length,), -1, device=like.device)
        keys = like.new_zeros((length, like.shape[1]))
        return cls(keys, none, none[:, None].expand(-1, CONTEXT), none)

    def __add__(self, other: Recent) -> Recent:
        pairs = zip(self._parts, other._parts, strict=True)
        return Recent(*(torch.cat(pair) for pair in pairs))

    def __getitem__(self, part: slice | Tensor) -> Recent:
        return Recent(*(whole[part] for whole in self._parts))

    @property
    def _parts(self) -> tuple[Tensor, ...]:
        return self.keys, self.tokens, self.context, self.documents


class CacheExpert:
    """p_cache of the target, from the text before it.

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
        self.columns = list(settings)
        self.settings = [vars(setting) for setting in settings]
        self.eos = eos
        self.reset = reset
        self.features = features
        windows = {setting.window for setting in settings}
        self.windows = sorted(windows | set(FEATURE_WINDOWS if features else ()))
        self.length = max(2, self.windows[-1])  # two line ends make an empty line
        #: Each window is the next smaller one and a ring of positions before it.
        far_end = self.windows[-1]
        self.rings = [
            slice(far_end - far, far_end - near) for near, far in pairwise([0, *self.windows])
        ]
        # Where a place of the window lies: counted from the nearest ring.
        self._ring_of = torch.empty(far_end, dtype=torch.int64)
        for number, ring in enumerate(self.rings):
            self._ring_of[ring] = number
        self._forget()

    def _forget(self) -> None:
        """Begins a text."""
        self._recent: Recent | None = None
        self._last_row = -1
        self._document = 0

    def opinion(self, passage: Passage) -> Opinion:
        """log p of each target, given all text before it.

        Raises:
            ConfigError: where a batch lies before one that was already read.
        """
        if passage.texts is None or not len(passage.rows):
            return self._read_on(passage)
        parts = []
        for text in passage.apart():
            self._forget()
            parts.append(self._read_on(text))
        return joined(parts)

    def _read_on(self, passage: Passage) -> Opinion:
        rows = passage.rows
        order = rows.argsort()
        order = order[rows[order] >= 0]  # an added beginning of sentence is no text
        parts = [self._opinion(part) for part in self._read(passage, order)]
        found = joined(parts)

        def place(column: Tensor) -> Tensor:
            whole = column.new_full((len(rows), *column.shape[1:]), torch.nan)
            whole[order] = column
            return whole

        return Opinion(
            place(found.log_probs), {name: place(x) for name, x in found.features.items()}
        )

    def _read(self, passage: Passage, order: Tensor) -> list[tuple[Recent, Recent]]:
        """Pairs of some positions in the order of the text, and these with the window before."""
        scored, length = passage.scored, self.length
        rows = passage.rows[order]
        if len(rows) and int(rows[0]) <= self._last_row:
            raise ConfigError(
                "the cache needs the text in its order",
                expected=f"tokens after row {self._last_row:,}",
                found=f"row {int(rows[0]):,}",
                do="report this: the loader gave blocks out of order",
            )
        keys, tokens = scored.features[order].float(), scored.targets[order]
        context = scored.context[order]
        before = self._recent if self._recent is not None else Recent.nothing(length, keys)
        documents = self._documents(torch.cat([before.tokens[-2:], tokens]))
        new = Recent(keys, tokens, context, documents)
        everything = before + new
        if len(rows):
            self._last_row = int(rows[-1])
            self._document = int(new.documents[-1])
            self._recent = everything[-length:]
        return [
            (new[start : start + QUERIES_AT_A_TIME], everything[start : start + length + size])
            for start in range(0, max(len(rows), 1), QUERIES_AT_A_TIME)
            for size in (min(QUERIES_AT_A_TIME, len(rows) - start),)
        ]

    def _documents(self, tokens: Tensor) -> Tensor:
        """The document of each position after the first two: it ends with an empty line.

        What a position's own token is does not matter: it is yet to be predicted.
        """
        if not self.reset:
            return torch.zeros_like(tokens[2:])
        ends = tokens == self.eos
        return self._document + (ends[:-2] & ends[1:-1]).cumsum(dim=0)

    def _opinion(self, pair: tuple[Recent, Recent]) -> Opinion:
        queries, text = pair
        length = self.length

        def window(whole: Tensor) -> Tensor:
            """(N, N + length) to (N, window): what stands before each query, the latest last."""
            shape, width = (len(whole), length), whole.shape[1]
            return whole.as_strided(shape, (width + 1, 1))[:, length - self.windows[-1] :]

        same = text.documents == queries.documents[:, None]
        scores = window(queries.keys @ text.keys.T)
        seen = [window(same)]
        wanted = max(setting.suffix for setting in self.columns)
        for steps in range(max(wanted, 2 if self.features else 0)):
            theirs, ours = text.context[:, steps], queries.context[:, steps, None]
            seen.append(seen[-1] & window((theirs == ours) & (ours >= 0)))
        matches = window(text.tokens == queries.tokens[:, None])
        log_probs = self._log_probs(scores, matches, seen)
        if not self.features:
            return Opinion(log_probs)
        thetas = [over_root(theta, text.keys.shape[1]) for theta in FEATURE_THETAS]
        return Opinion(log_probs, self._features(scores, seen, thetas))

    def _log_probs(self, scores: Tensor, matches: Tensor, seen: list[Tensor]) -> Tensor:
        """(N, S): settings of a suffix and theta share their sums."""
        ring_of = self._ring_of.to(scores.device)
        whole = Many.of(scores, seen[0], self.rings)
        columns: dict[CacheSetting, Tensor] = {}
        for suffix in {setting.suffix for setting in self.columns}:
            some = Few.of(scores, seen[suffix] & matches, ring_of)
            every = Few.of(scores, seen[suffix], ring_of) if suffix else whole
            for theta in {setting.theta for setting in self.columns if setting.suffix == suffix}:
                total = every.log_sums(theta)
                found = (some.log_sums(theta) - total).where(~total.isneginf(), torch.nan)
                for place, window in enumerate(self.windows):
                    columns[CacheSetting(suffix, theta, window)] = found[:, place]
        return torch.stack([columns[setting] for setting in self.columns], dim=1)

    def _features(
        self, scores: Tensor, seen: list[Tensor], thetas: list[float]
    ) -> dict[str, Tensor]:
        at = [self.windows.index(window) for window in FEATURE_WINDOWS]
        every = Many.of(scores, seen[0], self.rings)
        best = every.tops.amax(dim=1, keepdim=True)
        sizes = [(every.log_sums(theta) - theta * best)[:, at] for theta in thetas]
        counts = torch.stack([there.sum(dim=1) for there in seen], dim=1)
        return {
            "cache_size": torch.cat(sizes, dim=1).clamp_min(math.log(1e-6)),
            "cache_shared": counts.float().log1p(),
        }


@dataclass(frozen=True)
class Many:
    """Scores of all that is seen, each less the best of its ring.

    What is far below the best of a large window may be the best of a small one: sums that all were
    relative to one best would underflow.

    Attributes:
        scores: (N, window) float32, -inf where nothing is seen.
        tops: (N, rings) float32, the best of each; any number where nothing is seen.
        rings: the parts of the window.
    """

    scores: Tensor
    tops: Tensor
    rings: Sequence[slice]

    @classmethod
    def of(cls, scores: Tensor, seen: Tensor, rings: Sequence[slice]) -> Many:
        """Of scores, (N, window), those that are ``seen``."""
        scores = scores.masked_fill(~seen, -torch.inf)
        tops = torch.stack([scores[:, ring].amax(dim=1) for ring in rings], dim=1)
        best = tops.amax(dim=1, keepdim=True).nan_to_num_(neginf=0.0)
        tops = tops.where(~tops.isneginf(), best)
        for ring, top in zip(rings, tops.unbind(1), strict=True):
            scores[:, ring] -= top[:, None]
        return cls(scores, tops, rings)

    def log_sums(self, theta: float) -> Tensor:
        """log of the sum of exp(theta score) over each window, (N, windows)."""
        weights = _weights(self.scores, theta)
        sums = torch.stack([weights[:, ring].sum(dim=1) for ring in self.rings], dim=1)
        return (sums.log() + theta * self.tops).logcumsumexp(dim=1)


@dataclass(frozen=True)
class Few:
    """The same for a few positions: those that share a suffix, or whose token is the target.

    Attributes:
        scores: (P,) float32.
        cells: (P,) int64, query and ring in one number.
        tops: (N, rings) float32; 0 where there are none.
    """

    scores: Tensor
    cells: Tensor
    tops: Tensor

    @classmethod
    def of(cls, scores: Tensor, chosen: Tensor, ring_of: Tensor) -> Few:
        """Of scores, (N, window), those that are ``chosen``; (window,) the ring of each place."""
        rows, places = chosen.nonzero(as_tuple=True)
        rings = int(ring_of.max()) + 1
        cells, values = rows * rings + ring_of[places], scores[rows, places]
        nothing = scores.new_full((len(scores) * rings,), -torch.inf)
        tops = nothing.scatter_reduce(0, cells, values, "amax").nan_to_num_(neginf=0.0)
        return cls(values - tops[cells], cells, tops.view(-1, rings))

    def log_sums(self, theta: float) -> Tensor:
        """log of the sum of exp(theta score) over each window, (N, windows)."""
        sums = torch.zeros_like(self.tops).view(-1)
        sums.index_add_(0, self.cells, (self.scores * theta).exp_())
        return (sums.view_as(self.tops).log() + theta * self.tops).logcumsumexp(dim=1)


def _weights(scores: Tensor, theta: float) -> Tensor:
    """exp(theta score), 0 where there is no position, (N, window)."""
    if theta == 0:
        return (~scores.isneginf()).float()
    return (scores * theta).exp_()


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


def available_memory() -> int:
    """Bytes that this process may still take, as far as the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":") for line in lines)
        return 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


KIND = CacheKind()
