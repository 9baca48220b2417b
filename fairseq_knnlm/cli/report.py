"""``fairseq-knnlm report``: what every calibrated mixture does on another text.

With ``--join``: what a run does of which several processes had a share each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fairseq_knnlm.calibration.table import ScoreTable, read_table
from fairseq_knnlm.cli.common import (
    add_calibration,
    add_store,
    calibration_place,
    check_store,
    has_place,
)
from fairseq_knnlm.cli.dictionary import (
    add_dictionary,
    check_dictionary,
    check_named,
    dictionary_file,
    read_dictionary,
    read_encoded_data,
)
from fairseq_knnlm.cli.tables import show
from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.files import check_outputs, write_json
from fairseq_knnlm.runs.places import check_apart

HELP = "say what every calibrated mixture does on a score table of test, or join shares of a run"
EXAMPLE = "--dstore DSTORE --score-table test.npz"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A datastore, beside which the calibration lies, and a score table; or files of shares."""
    add_store(parser, required=False)
    add_calibration(parser)
    parser.add_argument(
        "--score-table", type=Path, help="from --score-table; with --join, the table to write"
    )
    parser.add_argument(
        "--join",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="results (.json) or score tables (.npz) of all shares of one run, of --num-shards",
    )
    parser.add_argument("--results-json", type=Path, help="write what was measured, or joined")
    parser.add_argument(
        "--raw-text",
        type=Path,
        help="the text of the split before it was cut into tokens, of the same lines: perplexity "
        "is then told a word and a byte of it, too; needs --data",
    )
    add_dictionary(parser, "what the tokens of the score table are spelled by")


def check(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Refuses sizes that no datastore has, and arguments that do not belong together."""
    check_store(args)
    if args.join is not None:
        _check_join(args)
        return
    if not has_place(args) or args.score_table is None:
        raise ConfigError(
            "a report is of a calibration on a score table, or of the shares of a run",
            expected="--dstore DSTORE --score-table FILE.npz, or --join FILES; "
            "of columns --calibration FILE in the place of --dstore",
            found="not both of --dstore and --score-table",
        )
    if args.raw_text is not None:
        check_named(args.dictionary, "--raw-text needs --data")
    check_dictionary(args.dictionary)
    outputs = {"--results-json": args.results_json}
    read = {"--score-table": [args.score_table], "--raw-text": [args.raw_text]}
    check_apart(outputs, {name: [file for file in files if file] for name, files in read.items()})
    check_outputs(outputs)


def _check_join(args: argparse.Namespace) -> None:
    results, tables = _by_kind(args.join)
    for flag, given, files in (
        ("--dstore", args.dstore, []),
        ("--calibration", args.calibration, []),
        ("--raw-text", args.raw_text, []),
        ("--data", args.dictionary, []),
        ("--results-json", args.results_json, results),
        ("--score-table", args.score_table, tables),
    ):
        if given is not None and not files:
            raise ConfigError(
                f"{flag} does nothing with these files",
                expected="results to join to --results-json, score tables to --score-table",
                found=", ".join(map(str, args.join)),
                do=f"leave {flag} out, or name what each share wrote by it",
            )
    outputs = {"--results-json": args.results_json, "--score-table": args.score_table}
    check_apart(outputs, {"--join": args.join})
    check_outputs(outputs)


def _by_kind(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Results, and score tables."""
    tables = [file for file in files if file.suffix == ".npz"]
    return [file for file in files if file not in tables], tables


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Applies the mixtures to the table, a line each; or joins shares."""
    if args.join is not None:
        _join(args)
    else:
        _measure(args)


def _join(args: argparse.Namespace) -> None:
    """Tells of the whole run what its processes told of their shares, and writes it."""
    from fairseq_knnlm.experts.registry import find_kind
    from fairseq_knnlm.runs.joining import join_cards, join_results, join_tables
    from fairseq_knnlm.runs.receipt import sealed
    from fairseq_knnlm.runs.report import closing_lines, doubts

    results, tables = _by_kind(args.join)
    found = join_results(results) if results else {}
    if tables:
        to = args.score_table
        card = join_cards(tables) if to is None else join_tables(tables, to)
        found = found or card
    if args.results_json is not None:
        write_json(args.results_json, sealed(found))
    print(f"{found['split']}, joined of {len(results or tables)} shares")
    kinds = dict.fromkeys(map(find_kind, found.get("experts", ())))
    for line in closing_lines(found, filter(None, kinds)):
        print(line)
    for line in doubts(found):
        print(f"warning: {line}", file=sys.stderr)


def _measure(args: argparse.Namespace) -> None:
    from fairseq_knnlm.calibration.report import gains, gains_header, measured
    from fairseq_knnlm.calibration.skipping import skipping_costs
    from fairseq_knnlm.runs.receipt import sealed
    from fairseq_knnlm.runs.replay_table import table_receipt
    from fairseq_knnlm.runs.report import comparable_lines
    from fairseq_knnlm.runs.table_figures import table_figures, text_of_table
    from fairseq_knnlm.runs.tune import calibration_of, check_table

    (store, place), table = calibration_place(args), read_table(args.score_table)
    check_table(table, store)
    calibration = calibration_of(place, table.card["datastores"])
    text = encoded = None
    if args.dictionary is not None:
        symbols, eos = read_dictionary(args.dictionary)
        if args.raw_text is None:
            encoded = read_encoded_data(args.dictionary, symbols)
        text = text_of_table(table, symbols, eos, args.raw_text, encoded)
    found = measured(calibration, table)
    warn_of_own_text(table, store)
    fitted = calibration.fitted_on
    print(
        f"{table.card['split']}, {len(table):,} tokens; fitted on {fitted['split']}, "
        f"{fitted['tokens']:,} tokens"
    )
    show(gains_header(found), gains(found))
    figures = table_figures(calibration, found, table, text)
    for line in comparable_lines(figures):
        print(line)
    if args.results_json is not None:
        dictionary = None if args.dictionary is None else dictionary_file(args.dictionary)
        encoding = None if encoded is None else encoded.path
        receipt = table_receipt(args.score_table, place, dictionary, args.raw_text, encoding)
        write_json(args.results_json, sealed({**figures, "receipt": receipt}))
    print_skipping(skipping_costs(calibration, table))


def warn_of_own_text(table: ScoreTable, store: Datastore | None) -> None:
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
