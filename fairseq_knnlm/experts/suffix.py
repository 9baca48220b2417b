"""What followed the longest suffix of a text where that was read before, and shorter ones.

The words that were just read are looked up in the text before them: an n-gram model of the text
read so far, as PPM and infini-gram have it (Cleary and Witten, 1984; Liu et al., 2024), which fades
as a cache does. It takes tokens and no hidden states. Only what stands strictly before the token
to be predicted counts, across blocks and batches, so the text must be read in its order; each of
several texts is on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fairseq_knnlm.bounds import check_count, check_range
from fairseq_knnlm.experts.contract import Distribution, Joined
from fairseq_knnlm.experts.kind import Kind, Models, Opened, flag
from fairseq_knnlm.experts.on_text import OnText, documents_ended, ending, followed
from fairseq_knnlm.experts.repeats import LONGEST, Repeats
from fairseq_knnlm.lm.contexts import Contexts

#: Half-lives in a score table, in tokens, and those at which there are features. The longest one
#: fades next to nothing within the window.
HALF_LIVES = (500.0, 2000.0, 1e6)
#: Up to so many shared tokens it is a feature how many distinct ones followed.
TYPES = 4
#: Bounds of ``--suffix-half-life``.
LEAST_HALF_LIFE, MOST_HALF_LIFE = 1.0, 1e9
#: Tokens looked back where nothing else is said, and at most.
WINDOW, MOST_WINDOW = 8192, 10**8


@dataclass(frozen=True, order=True)
class SuffixSetting:
    """How places that were read become a distribution.

    Attributes:
        half_life: distance, in tokens, at which a place counts half.
    """

    half_life: float = 500.0


class SuffixPrediction:
    """Distributions over what followed at earlier places.

    Args:
        repeats: P pairs of one of N contexts and an earlier place.
        half_lives: S of them, a column each.
        features: name features too.
    """

    def __init__(self, repeats: Repeats, half_lives: Sequence[float], *, features: bool) -> None:
        self.repeats = repeats
        every = sorted({*half_lives, *(HALF_LIVES if features else ())})
        shares = repeats.shares(every)
        self._shares = shares[:, [every.index(one) for one in half_lives]]  # (P, S)
        self._nobody = repeats.counts[:, :1] == 0  # (N, 1)
        self.features = {}
        if features:
            self.features = self._features(shares[:, [every.index(one) for one in HALF_LIVES]])

    def log_prob(self, tokens: Tensor) -> Tensor:
        """log p of one token (N,) each: (N, S) float32, natural log.

        -inf of a token that never followed, NaN where nothing did.
        """
        return self._sums(tokens, self._shares).log().masked_fill(self._nobody, torch.nan)

    def log_probs(self, setting: int) -> Distribution:
        """log p of the tokens that followed, a place each, which add up where they are the same."""
        repeats = self.repeats
        order = repeats.contexts.argsort(stable=True)
        contexts = repeats.contexts[order]
        counts = torch.bincount(contexts, minlength=repeats.size)
        firsts = (counts.cumsum(dim=0) - counts)[contexts]
        columns = torch.arange(len(order), device=order.device) - firsts
        size = repeats.size, max(1, int(counts.max()) if len(counts) else 1)
        tokens = repeats.tokens.new_zeros(size)
        shares = self._shares.new_full(size, -torch.inf)
        tokens[contexts, columns] = repeats.tokens[order]
        shares[contexts, columns] = self._shares[order, setting].log()
        return Distribution(tokens, shares.masked_fill(self._nobody, torch.nan))

    def _sums(self, tokens: Tensor, shares: Tensor) -> Tensor:
        """(N, S): shares (P, S) of the places where that token (N,) followed."""
        same = self.repeats.tokens == tokens[self.repeats.contexts]
        return self.repeats.summed(shares * same[:, None])

    def _features(self, shares: Tensor) -> dict[str, Tensor]:
        tokens, distances = self.repeats.best
        likely = self._sums(tokens, shares)
        return {
            "suffix_counts": self.repeats.counts.log1p(),
            "suffix_types": self.repeats.types[:, :TYPES].log1p(),
            "suffix_best": likely.masked_fill(self._nobody, torch.nan),
            "suffix_gap": distances.float().log().masked_fill(self._nobody[:, 0], torch.nan),
        }


@dataclass(frozen=True)
class Words:
    """Tokens of a text, the latest at the end.

    Attributes:
        tokens: (M,) int64; -1 where one is not known, as the last until it is told.
        row: of the last; -1 before all text.
    """

    tokens: Tensor
    row: int

    def ending(self, tokens: Tensor) -> Words:
        """The same, now that it is known what the last ones are."""
        return replace(self, tokens=ending(self.tokens, tokens))

    def without(self, count: int) -> Words:
        """The same without the last ``count``; what followed the rest is not known."""
        kept = self.tokens[: len(self.tokens) - count]
        return Words(ending(kept, kept.new_full((1,), -1)), self.row - count)


class SuffixExpert(OnText[Words]):
    """p_suffix, from the text before each context.

    Args:
        settings: half-lives, a column each.
        eos: the token that ends a line; two in a row are an empty line, which ends a document.
        window: tokens looked back.
        reset: forget everything where a document ends.
        features: name features too.
    """

    name = "suffix"
    at_a_time = 1024

    def __init__(
        self,
        settings: Sequence[SuffixSetting],
        eos: int,
        *,
        window: int,
        reset: bool = False,
        features: bool = False,
    ) -> None:
        super().__init__()
        self.settings = [vars(setting) for setting in settings]
        self.eos = eos
        self.window = window
        self.reset = reset
        self.features = features
        # What stood before the first place of the window is compared, too.
        self.looks_back = window + LONGEST
        self._half_lives = [setting.half_life for setting in settings]

    def predict(self, contexts: Contexts) -> Joined:
        """What follows each context, given all its text before it.

        Raises:
            ConfigError: where a context lies before one that was already read.
        """
        # Of nothing there are repeats, too: none.
        nothing = contexts.rows.new_empty(0)
        parts, places = [Repeats.of(nothing, 0, self.window)], [nothing]
        for text, order in self._new(contexts):
            parts.append(self._read(text, contexts, order))
            places.append(order)
        repeats = Repeats.joined(parts)
        prediction = SuffixPrediction(repeats, self._half_lives, features=self.features)
        return Joined([prediction], [repeats.size], torch.cat(places), len(contexts))

    def _read(self, text: int, contexts: Contexts, order: Tensor) -> Repeats:
        """Of some positions in the order of their text, which is longer now."""
        earlier = self._earlier(text, contexts, order)
        whole = followed(contexts, order)
        if earlier is not None:
            whole = torch.cat([earlier.tokens, whole])
        # More than is looked back to, of which some may be taken back.
        latest = whole[-self.looks_back - len(order) :]
        self._keep(text, Words(latest, int(contexts.rows[order[-1]])), order)
        documents = documents_ended(whole, self.eos) if self.reset else None
        return Repeats.of(whole, len(whole) - len(order), self.window, documents)


def read_through(
    tokens: Tensor, settings: Sequence[SuffixSetting], *, window: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the text before each token says of it, where all of the text is there already.

    Args:
        tokens: (N,) int64.
        settings: half-lives, S of them.
        window: tokens looked back.

    Returns:
        (N, S) float32, natural log, as ``SuffixPrediction.log_prob`` has them; and the features,
        (N,) or (N, M) each.
    """
    expert = SuffixExpert(settings, eos=-1, window=window, features=True)
    before = torch.nn.functional.pad(tokens, (1, 0), value=-1)[: len(tokens), None]
    parts = []
    for rows in torch.arange(len(tokens)).split(expert.at_a_time):
        states = torch.empty((len(rows), 0))  # which it has no use for
        prediction = expert.predict(Contexts(states, None, before[rows], rows))
        parts.append({"": prediction.log_prob(tokens[rows]), **prediction.features})
        expert.observe(tokens[rows])
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return whole.pop(""), whole


@dataclass(frozen=True)
class SuffixOptions:
    """Flags of the suffixes."""

    suffix_lmbda: float | None = flag(
        None, "weight of the suffixes (default: the calibration, else 0.1)", weight=True
    )
    suffix_half_life: float | None = flag(
        None,
        "tokens after which what was read counts half (default: the calibration, else 500)",
        setting="half_life",
    )
    suffix_window: int = flag(WINDOW, "tokens in which suffixes are looked for", counts="tokens")
    suffix_reset: bool = flag(False, "look no further back than the document begins")


class SuffixKind(Kind):
    """``suffix``."""

    name = "suffix"
    options = SuffixOptions
    setting = SuffixSetting

    def check(self, options: SuffixOptions, asked: bool) -> None:
        bounds = LEAST_HALF_LIFE, MOST_HALF_LIFE
        check_range("--suffix-half-life", options.suffix_half_life, *bounds, "counts tokens")
        check_count("--suffix-window", options.suffix_window, "counts tokens", MOST_WINDOW)

    def needs_order(self, options: SuffixOptions) -> bool:
        return True

    def grid(self, opened: Opened, models: Models) -> list[SuffixSetting]:
        return [SuffixSetting(half_life) for half_life in HALF_LIVES]

    def make(
        self, opened: Opened, models: Models, settings: Sequence[SuffixSetting], features: bool
    ) -> SuffixExpert:
        window, reset = opened.options.suffix_window, opened.options.suffix_reset
        return SuffixExpert(settings, models.eos, window=window, reset=reset, features=features)

    def described(self, opened: Opened, models: Models) -> dict[str, Any]:
        return {"window": opened.options.suffix_window, "reset": opened.options.suffix_reset}


KIND = SuffixKind()
