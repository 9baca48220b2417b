"""``fairseq-knnlm forget``: takes documents, or rows, out of a datastore."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from fairseq_knnlm.cli.common import check_ours
from fairseq_knnlm.cli.dictionary import (
    add_dictionary,
    check_dictionary,
    read_dictionary,
    read_spelling,
)
from fairseq_knnlm.errors import ConfigError

HELP = "forget documents or rows of a datastore"
EXAMPLE = "DSTORE --document 'Robert Boulter' --data data-bin"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A datastore, and what of it goes."""
    parser.add_argument("dstore", type=Path, metavar="DSTORE", help="datastore folder")
    parser.add_argument(
        "--document",
        action="append",
        default=[],
        metavar="NAME",
        help="document that goes, by its first line, as `explain` shows it; may be given again",
    )
    parser.add_argument(
        "--rows",
        action="append",
        default=[],
        metavar="A:B",
        help="rows that go, from A to the one before B; may be given again",
    )
    add_dictionary(parser, "what --document spells names by")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would go, and change nothing"
    )


def check(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Refuses to forget nothing, and rows that are no numbers."""
    if not args.document and not args.rows:
        raise ConfigError(
            "nothing says what is to be forgotten",
            expected="--document NAME, or --rows A:B",
            found="neither",
        )
    args.rows = [_rows(word) for word in args.rows]
    if (args.dictionary is None) == bool(args.document):
        raise ConfigError(
            "a document's name is text, and a datastore has only the ids of tokens"
            if args.document
            else "--data does nothing without --document",
            expected="--document NAME --data DATA, the folder that was binarised, or its dict.txt",
            found="no --data" if args.document else "no --document",
        )
    check_dictionary(args.dictionary)
    check_ours(args.dstore)


def _rows(word: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,15}):([0-9]{1,15})", word)
    if found is None or int(found[1]) >= int(found[2]):
        raise ConfigError(
            "--rows names no rows",
            expected="A:B, the first row and the one behind the last, as in 120:480",
            found=word,
        )
    return int(found[1]), int(found[2])


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Says what went, and what is left to do."""
    from fairseq_knnlm.runs.changing import forget_parts

    symbols: Sequence[str] = ()
    spell = None
    if args.document:
        symbols = read_dictionary(args.dictionary)[0]
        spell = read_spelling(args.dictionary)
    found = forget_parts(
        args.dstore, args.document, args.rows, symbols, spell, try_only=args.dry_run
    )
    for part in found.parts:
        print(part.describe())
    does = "would forget" if args.dry_run else "forgot"
    count = f"{found.rows - found.left:,} of {found.rows:,} entries"
    print(f"{args.dstore}: {does} {count}; {found.left:,} stay")
    if args.dry_run:
        return
    print(f"their bytes are there until `fairseq-knnlm compact {args.dstore}` is run")
    if found.reach:
        print(
            f"keys of up to {found.reach - 1:,} tokens behind them were computed with them in "
            "view; forget these too where no trace may stay"
        )
    if not found.index_serves:
        print(
            "its index holds them, and cannot be cut: build it again with "
            f"`fairseq-knnlm build-index --dstore {args.dstore}`"
        )
