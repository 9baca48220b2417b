"""``fairseq-knnlm compress``: a smaller datastore of a larger one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fairseq_knnlm.bounds import check_seed
from fairseq_knnlm.cli.common import add_store, check_new, check_store, opened
from fairseq_knnlm.datastore import open_datastore
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.files import human_bytes

HELP = "write a smaller datastore: fewer dimensions, fewer entries, or both"
EXAMPLE = "--dstore DSTORE --out SMALLER --pca 128 --merge 8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is made smaller, how, and where it goes."""
    add_store(parser)
    parser.add_argument("--out", required=True, type=Path, help="folder to make")
    parser.add_argument("--pca", type=int, help="principal components of the keys to keep")
    parser.add_argument(
        "--merge",
        type=int,
        help="neighbours of an entry to merge into it where their value is the same",
    )
    parser.add_argument(
        "--indexfile", type=Path, help="index that --merge searches (default: in the datastore)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of sample, rotation and order (default: 0)"
    )


def check(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Refuses an index that nobody searches, and a place that is taken."""
    check_store(args)
    check_seed(args.seed)
    if args.indexfile is not None and args.merge is None:
        raise ConfigError(
            "--indexfile does nothing without --merge", expected="--merge K", found="no --merge"
        )
    check_new("--out", args.out)


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Writes it, and says what was saved."""
    from fairseq_knnlm.runs.compress import compress

    store = opened(args)
    choice = {"pca": args.pca, "merge": args.merge, "seed": args.seed}
    smaller = open_datastore(compress(store, args.out, index=args.indexfile, **choice))
    print(
        f"{args.out}: {len(store):,} -> {len(smaller):,} entries, "
        f"{human_bytes(store.nbytes)} -> {human_bytes(smaller.nbytes)}"
    )
    print("build its index with `fairseq-knnlm build-index`, then fit lambda and temperature again")
