"""``fairseq-knnlm columns``: a score table of probabilities that others published."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fairseq_knnlm.cli.tables import show
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.runs.column_files import BASES, ColumnFile
from fairseq_knnlm.runs.columns import ColumnsOptions, check_options, make_table

HELP = "make a score table of a tokenised text and the probabilities that others gave its words"
EXAMPLE = "valid.txt --column lstm=lstm.npy --column gpt=gpt.txt --out valid.npz"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A text, the columns, and the table to make."""
    parser.add_argument("words", type=Path, metavar="WORDS", help="tokenised text, in UTF-8")
    parser.add_argument(
        "--column",
        required=True,
        action="append",
        metavar="NAME=FILE",
        help="a number for each word, probabilities or logarithms: a text with one a line, alone "
        "or behind its word; an .npy; or FILE.npz:ARRAY. May be given again; the first stands "
        "where the language model stands",
    )
    parser.add_argument(
        "--training-text", type=Path, help="tokenised text whose n-grams are an expert"
    )
    parser.add_argument(
        "--suffixes",
        action="store_true",
        help="ask the expert of suffixes as well, which goes by longer matches than history does",
    )
    parser.add_argument(
        "--line-end", default="", help="word that ends each line of the texts, if not in them"
    )
    parser.add_argument(
        "--log-base", choices=BASES, default="e", help="of columns of logarithms (default: e)"
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FILE.npz", help="score table to write"
    )


def check(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Refuses names that no column can have, and a table that cannot be written."""
    check_options(_options(args))


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Makes the table, and says what each column is worth alone."""
    perplexities = make_table(_options(args))
    show(("column", "perplexity"), [(name, f"{one:.2f}") for name, one in perplexities.items()])
    print(f"written to {args.out}; fairseq-knnlm tune --score-table fits on it")


def _options(args: argparse.Namespace) -> ColumnsOptions:
    return ColumnsOptions(
        words=args.words,
        columns=[_column_file(one) for one in args.column],
        out=args.out,
        training_text=args.training_text,
        suffixes=args.suffixes,
        line_end=args.line_end,
        base=BASES[args.log_base],
    )


def _column_file(typed: str) -> ColumnFile:
    name, equals, file = typed.partition("=")
    if not (name and equals and file):
        raise ConfigError(
            "--column names no column", expected="NAME=FILE or NAME=FILE.npz:ARRAY", found=typed
        )
    path, _, array = file.rpartition(":")
    if not path.endswith(".npz"):
        path, array = file, ""
    return ColumnFile(name, Path(path), array)
