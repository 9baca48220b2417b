"""``fairseq-knnlm cluster build-index``: the pieces of an index, written by workers of a Ray."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from fairseq_knnlm.cli import build_index
from fairseq_knnlm.cli.on_ray import add_workers, bar, check_workers, made, moves
from fairseq_knnlm.errors import ConfigError

HELP = "build the index of a datastore in blocks, its pieces shared out over workers"
EXAMPLE = "--ray local --workers 2 --dstore DSTORE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``build-index``, and the workers."""
    add_workers(parser)
    build_index.add_arguments(parser)


def check(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Refuses what ``build-index`` refuses, and an index in one file."""
    check_workers(args, rest)
    build_index.check(args, rest)
    if args.indexfile is not None:
        raise ConfigError(
            "--indexfile names an index in one file",
            expected="the datastore's own index, whose pieces workers write",
            found=args.indexfile,
            do="leave it out, or build it with `fairseq-knnlm build-index`",
        )


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Trains the index here, has workers write its pieces, and measures it here."""
    build_index.build(args, lambda pieces: _write(args, pieces))


def _write(args: argparse.Namespace, pieces: Any) -> None:
    from fairseq_knnlm.cluster.connect import connect
    from fairseq_knnlm.cluster.work import do_all

    connect(args.ray, cpus=args.workers)
    proof = pieces.folder / "shared"
    with made(proof), bar("writing pieces", pieces.count, "blocks") as shown:
        do_all(
            pieces.write,
            pieces.count,
            workers=args.workers,
            gpus=args.gpus_per_worker,
            proof=proof,
            tick=moves(shown),
        )
