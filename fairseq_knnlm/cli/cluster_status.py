"""``fairseq-knnlm cluster status``: which shards are up."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fairseq_knnlm.cli.on_ray import add_lasting, check_lasting

HELP = "say which shards are up"
EXAMPLE = "--ray HOST:PORT"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A Ray."""
    add_lasting(parser)


def check(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Refuses what is no lasting Ray."""
    check_lasting(args)


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Prints a line for each of them."""
    from fairseq_knnlm.cluster.connect import connect
    from fairseq_knnlm.cluster.kept import described

    connect(args.ray)
    found = list(described())
    for one, words in found:
        place = f"shard {one.number + 1} of {one.shards}, copy {one.replica + 1}"
        print(f"{one.datastore[:12]}  {place}: {words}")
    if not found:
        print("no shards are up")
