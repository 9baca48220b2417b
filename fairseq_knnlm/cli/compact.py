"""``fairseq-knnlm compact``: removes the bytes of what was forgotten."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fairseq_knnlm.cli.common import check_ours

HELP = "write a datastore anew without what was forgotten"
EXAMPLE = "DSTORE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A datastore."""
    parser.add_argument("dstore", type=Path, metavar="DSTORE", help="datastore folder")


def check(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Refuses what is not ours."""
    check_ours(args.dstore)


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Says what was written and removed."""
    from fairseq_knnlm.runs.changing import compact_store

    found = compact_store(args.dstore)
    if found.blocks:
        what = "1 block" if found.blocks == 1 else f"{found.blocks:,} blocks"
        print(f"{args.dstore}: wrote {what} anew, without what was forgotten")
    for path in found.removed:
        print(f"{path}: removed, since it was of the datastore before it was changed")
    if not found.blocks and not found.removed:
        print(f"{args.dstore}: nothing to do; nothing in it was forgotten")
