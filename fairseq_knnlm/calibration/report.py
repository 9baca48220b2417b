"""What mixtures gain: on the tokens held out, and on another table, such as one of test."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise

from fairseq_knnlm.calibration.checks import check_columns
from fairseq_knnlm.calibration.lean import Lean
from fairseq_knnlm.calibration.losses import mean_loss
from fairseq_knnlm.calibration.stored import Calibration
from fairseq_knnlm.calibration.table import ScoreTable
from fairseq_knnlm.errors import TableError
from fairseq_knnlm.mixture.mixers import ALONE

#: Above the columns of ``gains``; the last marks the mixture that is used.
GAINS = ("mixture", "perplexity", "change", "")
#: The same where it is known how long mixtures take.
TIMED_GAINS = (*GAINS[:-1], "columns", "speed", "")
#: Above the columns of ``prices``.
PRICES = ("experts", "columns", "perplexity", "speed")
#: Of the mixtures on the way to ever less time those are told that lose this much more.
WORSE = 0.01


def gains_header(calibration: Calibration) -> tuple[str, ...]:
    """What stands above the columns of ``gains``."""
    return GAINS if calibration.mixtures[0].seconds is None else TIMED_GAINS


def gains(calibration: Calibration) -> list[tuple[str, ...]]:
    """What each part adds, as the rows of a table to read: a mixture each.

    Where it is known how long mixtures take, with their columns of experts, and their speed over
    that of the language model alone.
    """
    base = calibration.base_perplexity
    rows: list[tuple[str, ...]] = []
    for number, mixture in enumerate(calibration.mixtures):
        change = f"{mixture.perplexity / base - 1:+.1%}" if mixture.experts else ""
        speed = calibration.speed(mixture)
        columns = str(len(mixture.mixer.components) - 1)
        timed = () if speed is None else (columns, f"{speed:.2f}")
        used = "<- used" if number == calibration.default else ""
        rows.append((mixture.name, f"{mixture.perplexity:.2f}", change, *timed, used))
    return rows


def prices(way: Iterable[Lean], speed: Callable[[Lean], float]) -> list[tuple[str, ...]]:
    """What ever less time costs in perplexity, as the rows of a table to read, under ``PRICES``.

    Args:
        way: from the best mixture to the language model alone.
        speed: of one of them, over that of the language model alone.
    """
    rows: list[tuple[str, ...]] = []
    told = -math.inf
    leans = list(way)
    for lean, after in pairwise([*leans, None]):
        # Of those that are about as good the fastest, which is the last.
        assert lean is not None
        if after is not None and after.loss <= told + math.log1p(WORSE):
            continue
        told = lean.loss
        names = "+".join(lean.experts) or "language model alone"
        columns = str(len(lean.components) - 1)
        rows.append((names, columns, f"{math.exp(lean.loss):.2f}", f"{speed(lean):.2f}"))
    return rows


def measured(calibration: Calibration, table: ScoreTable) -> Calibration:
    """The same mixtures with their figures on another table, such as one of test.

    Raises:
        TableError: where the table is of another model or k, has no tokens, or lacks an expert of
            the mixture that is used. Other mixtures that it lacks an expert of are left out.
    """
    calibration.check_model(table.card["model"])
    check_columns(table)
    _check_experts(calibration, table)
    mixtures, kept = [], []
    for number, mixture in enumerate(calibration.mixtures):
        if not set(mixture.experts) <= set(table.experts):
            continue
        kept.append(number)
        loss = mean_loss(table, mixture.mixer)
        mixtures.append(replace(mixture, perplexity=math.exp(loss), bits=loss / math.log(2)))
    default = kept.index(calibration.default)
    base = math.exp(mean_loss(table, ALONE))
    return replace(calibration, mixtures=tuple(mixtures), base_perplexity=base, default=default)


def _check_experts(calibration: Calibration, table: ScoreTable) -> None:
    used = calibration.best.experts
    if missing := [name for name in used if name not in table.experts]:
        raise TableError(
            f"the score table lacks {', '.join(missing)}, which the calibration mixes",
            expected=", ".join(used),
            found=", ".join(table.experts) or "the language model alone",
            do=f"write it with --experts {','.join(used)}",
        )
    for name in set(table.experts) & set(calibration.experts):
        cards = calibration.experts[name], table.card["described"][name]
        then, now = (card.get("k") for card in cards)
        if then != now:
            raise TableError(
                "the score table is of another number of neighbours",
                expected=f"k {then}, as the calibration was fitted with",
                found=f"k {now}",
                do=f"write it with --k {then}",
            )
