"""``fairseq-knnlm verify``: every byte of a datastore, checked."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fairseq_knnlm.cli.common import add_store, check_store, outlined
from fairseq_knnlm.errors import KnnlmError

HELP = "check every byte of a datastore and its index"
EXAMPLE = "--dstore DSTORE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A datastore."""
    add_store(parser)


def check(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Refuses sizes that no datastore has."""
    check_store(args)


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Prints a line for each thing that was found; all that is wrong stands in one error.

    Raises:
        KnnlmError: with all that is wrong.
    """
    from fairseq_knnlm.runs.verify import verified

    wrong: list[KnnlmError] = []
    for finding in verified(outlined(args)):
        print(f"{finding.path}: {finding.summary}")
        wrong += finding.errors
    if wrong:
        raise KnnlmError("\n".join(map(str, wrong)))
