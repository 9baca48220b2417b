"""``fairseq-knnlm cluster down``: ends shards that are up."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fairseq_knnlm.cli.on_ray import add_lasting, check_lasting
from fairseq_knnlm.datastore import outline
from fairseq_knnlm.errors import KnnlmError

HELP = "end shards that are up"
EXAMPLE = "--ray HOST:PORT"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A Ray, and of which datastore."""
    add_lasting(parser)
    parser.add_argument(
        "--dstore", type=Path, help="only shards of this datastore (default: of all)"
    )


def check(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Refuses what is no lasting Ray."""
    check_lasting(args)


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Ends them, and says how many there were."""
    from fairseq_knnlm.cluster.connect import connect
    from fairseq_knnlm.cluster.kept import all_kept, end

    seal = outline(args.dstore).fingerprint if args.dstore is not None else None
    connect(args.ray)
    found = [one for one in all_kept() if seal in (None, one.datastore)]
    if not found and args.dstore is not None:
        raise KnnlmError(
            f"no shards of {args.dstore} are up",
            expected=f"shards of datastore {str(seal)[:12]}...",
            found=", ".join(sorted({f"{one.datastore[:12]}..." for one in all_kept()})) or "none",
            do="see `fairseq-knnlm cluster status`; of a datastore that was changed meanwhile, "
            "leave --dstore out",
        )
    end(found)
    print(f"ended {len(found)} processes")
