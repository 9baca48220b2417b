"""``fairseq-knnlm report``: what every calibrated mixture does on another text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fairseq_knnlm.calibration.table import ScoreTable, read_table
from fairseq_knnlm.cli.common import add_store, check_store, opened
from fairseq_knnlm.cli.tables import show
from fairseq_knnlm.datastore import Datastore

HELP = "say what every calibrated mixture does on a score table of test"
EXAMPLE = "--dstore DSTORE --score-table test.npz"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A datastore, beside which the calibration lies, and a score table."""
    add_store(parser)
    parser.add_argument("--score-table", required=True, type=Path, help="from --score-table")


def check(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Refuses sizes that no datastore has."""
    check_store(args)


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Applies the mixtures to the table, a line each."""
    from fairseq_knnlm.calibration.report import GAINS, gains, measured
    from fairseq_knnlm.calibration.skipping import skipping_costs
    from fairseq_knnlm.runs.tune import calibration_of, check_table

    store, table = opened(args), read_table(args.score_table)
    check_table(table, store)
    calibration = calibration_of(store, table.card["datastores"])
    found = measured(calibration, table)
    warn_of_own_text(table, store)
    fitted = calibration.fitted_on
    print(
        f"{table.card['split']}, {len(table):,} tokens; fitted on {fitted['split']}, "
        f"{fitted['tokens']:,} tokens"
    )
    show(GAINS, gains(found))
    print_skipping(skipping_costs(calibration, table))


def warn_of_own_text(table: ScoreTable, store: Datastore) -> None:
    """Says so where the datastore seems to hold what is measured on."""
    from fairseq_knnlm.runs.tune import own_text

    if why := own_text(table, store):
        print(
            f"warning: the datastore seems to hold the text of the score table ({why}): what is "
            "fitted or measured on it says nothing of other text",
            file=sys.stderr,
        )


def print_skipping(rows: Sequence[Sequence[str]]) -> None:
    """The table of what skipping searches does, where there is one."""
    from fairseq_knnlm.calibration.skipping import COSTS

    if rows:
        print("perplexity where --skip-searches leaves out a share (in brackets, what it came to)")
        show(COSTS, rows)
