"""``fairseq-knnlm convert-checkpoint``: an older checkpoint, made safe to open."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

HELP = "make of a checkpoint of an older fairseq one that opens without trust"
EXAMPLE = "model.pt checkpoint.pt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Two files."""
    parser.add_argument("old", type=Path, metavar="OLD", help="checkpoint of fairseq 0.9 or newer")
    parser.add_argument("new", type=Path, metavar="NEW", help="checkpoint to write")


def check(_: argparse.Namespace, __: Sequence[str]) -> None:
    """All that can be refused is looked at before the work starts."""


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Says what was written, and what was left out."""
    from fairseq_knnlm.runs.conversion import convert

    found = convert(args.old, args.new)
    print(f"{args.new}: {found['architecture']}, {found['parameters']:,} numbers in its weights")
    if found["left_out"]:
        print(f"left out, since no model needs it: {', '.join(found['left_out'])}")
