"""``fairseq-knnlm cluster``: work on the machines of a Ray, a file a kind of work."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fairseq_knnlm.cli import (
    cluster_build_index,
    cluster_down,
    cluster_evaluate,
    cluster_save,
    cluster_status,
    cluster_up,
)
from fairseq_knnlm.cli.common import add_commands

HELP = "save, build and evaluate on the machines of a Ray, and keep an index up there"
EXAMPLE = "save --ray local --workers 2 data-bin --path checkpoint_best.pt --dstore DSTORE"

#: Kinds of work, each with the four names of a subcommand.
KINDS = {
    "save": cluster_save,
    "build-index": cluster_build_index,
    "evaluate": cluster_evaluate,
    "up": cluster_up,
    "status": cluster_status,
    "down": cluster_down,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A parser for each kind of work."""
    kinds = parser.add_subparsers(required=True, dest="kind", metavar="WORK")
    add_commands(kinds, KINDS, "cluster ")


def check(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Refuses what that kind of work refuses."""
    KINDS[args.kind].check(args, rest)


def run(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Does it."""
    KINDS[args.kind].run(args, rest)
