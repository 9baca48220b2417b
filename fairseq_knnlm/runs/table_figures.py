"""What a calibration comes to on a score table, as figures that compare with others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fairseq_knnlm.calibration.losses import mixture_losses
from fairseq_knnlm.calibration.sections import Sections
from fairseq_knnlm.calibration.stored import Calibration
from fairseq_knnlm.calibration.table import ScoreTable
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.runs.conditions import reach, stride
from fairseq_knnlm.runs.raw_text import (
    RawText,
    joined_text,
    raw_text,
    spelled_lines,
    text_figures,
)
from fairseq_knnlm.runs.results import losses
from fairseq_knnlm.runs.spelling import line_spelling, pieces_of

UNKNOWN = "<unk>"


def text_of_table(
    table: ScoreTable, symbols: Sequence[str], eos: int, raw: Path | None
) -> RawText | None:
    """What figures a word and a byte are taken over; None where nobody knows.

    Args:
        table: of a whole split.
        symbols: of its dictionary.
        eos: the id that ends a line.
        raw: the text before it was cut into tokens; left out, the table's pieces of words are
            joined, where its dictionary is of these.

    Raises:
        ConfigError: where tokens of the text are left out, or it is another text, or the
            dictionary another.
    """
    tokens = table["token"]
    if len(tokens) and int(tokens.max()) >= len(symbols):
        raise ConfigError(
            "the score table is of another dictionary",
            expected=f"ids below {len(symbols):,}, the types of --data",
            found=f"{int(tokens.max()):,}",
            do="name the data that was evaluated",
        )
    whole = not table.card.get("tokens_left_out") and len(table) == table["row"][-1] + 1
    if raw is not None and not whole:
        raise ConfigError(
            "--raw-text needs all tokens of the text scored",
            expected="a score table of a whole split",
            found="one that leaves tokens out",
            do="write it with --sample-break-mode none and without --stride, or leave --raw-text "
            "out",
        )
    if not whole or (raw is None and not pieces_of(symbols)):
        return None
    lines = spelled_lines(tokens, eos, line_spelling(symbols))
    unknown = int((tokens == symbols.index(UNKNOWN)).sum()) if UNKNOWN in symbols else 0
    if raw is None:
        return joined_text(lines, unknown)
    return raw_text(raw, table.card["split"], lines, unknown)


def table_figures(
    calibration: Calibration, found: Calibration, table: ScoreTable, text: RawText | None
) -> dict[str, Any]:
    """Figures of the mixture that is used, and of the others their perplexities.

    Args:
        calibration: as it was fitted.
        found: the same, measured on the table.
        table: of the text.
        text: what figures a word and a byte are taken over, where it is known.
    """
    base = table["lm"].astype(np.float64)
    mixed = -mixture_losses(table, found.best.mixer)
    totals = math.fsum(base), math.fsum(mixed)
    context = table.card.get("context") or {}
    return {
        **losses(
            tokens=len(table),
            base_log_prob=totals[0],
            log_prob=totals[1],
            seconds=0,
            left_out=table.card.get("tokens_left_out", 0),
            sections=Sections.of_tokens(base, mixed),
        ),
        **text_figures(text, *totals),
        "split": table.card["split"],
        "mixed": list(found.best.experts),
        "mixture": found.best.name,
        "mixtures": [
            {"mixture": one.name, "perplexity": one.perplexity, "loss": one.bits}
            for one in found.mixtures
        ],
        "context": context or None,
        "conditions": {
            "stride": stride(context),
            "context_of_queries": reach(context),
            "context_of_keys": [],
            "datastores_of": [],
            "fitted_on": {name: calibration.fitted_on[name] for name in ("split", "tokens")},
        },
    }
