"""What mixtures gain: on the tokens held out, and on another table, such as one of test."""

from __future__ import annotations

import math
from dataclasses import replace

from fairseq_knnlm.calibration.checks import check_columns
from fairseq_knnlm.calibration.losses import mean_loss
from fairseq_knnlm.calibration.stored import Calibration
from fairseq_knnlm.calibration.table import ScoreTable
from fairseq_knnlm.errors import TableError
from fairseq_knnlm.mixture.mixers import ALONE

#: Above the columns of ``gains``; the last marks the mixture that is used.
GAINS = ("mixture", "perplexity", "change", "")


def gains(calibration: Calibration) -> list[tuple[str, ...]]:
    """What each part adds, as the rows of a table to read: a mixture each, under ``GAINS``."""
    base = calibration.base_perplexity
    rows: list[tuple[str, ...]] = []
    for number, mixture in enumerate(calibration.mixtures):
        change = f"{mixture.perplexity / base - 1:+.1%}" if mixture.experts else ""
        used = "<- used" if number == calibration.default else ""
        rows.append((mixture.name, f"{mixture.perplexity:.2f}", change, used))
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
    mixtures = []
    for mixture in calibration.mixtures:
        if not set(mixture.experts) <= set(table.experts):
            continue
        loss = mean_loss(table, mixture.mixer)
        mixtures.append(replace(mixture, perplexity=math.exp(loss), bits=loss / math.log(2)))
    default = [mixture.name for mixture in mixtures].index(calibration.best.name)
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
