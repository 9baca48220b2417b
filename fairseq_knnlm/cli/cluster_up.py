"""``fairseq-knnlm cluster up``: shards of an index that stay for several runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fairseq_knnlm.bounds import check_count
from fairseq_knnlm.cli.on_ray import add_lasting, check_lasting
from fairseq_knnlm.datastore import open_datastore

HELP = "start shards that runs with --knn-ray then use"
EXAMPLE = "--ray HOST:PORT --dstore DSTORE --knn-shards 4 --knn-replicas 2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A Ray, a datastore, and how it is cut."""
    add_lasting(parser)
    parser.add_argument(
        "--dstore",
        required=True,
        type=Path,
        help="datastore in blocks, with an index in pieces, in a folder that all machines see",
    )
    parser.add_argument(
        "--knn-shards",
        type=int,
        help="parts that the index is cut into (default: one for each machine)",
    )
    parser.add_argument("--knn-replicas", type=int, help="copies of each part (default: 1)")


def check(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Refuses what is no lasting Ray, and to start nothing."""
    check_lasting(args)
    check_count("--knn-shards", args.knn_shards, "counts shards")
    check_count("--knn-replicas", args.knn_replicas, "counts copies")


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Starts them, and says what is up."""
    from fairseq_knnlm.cluster.opening import keep_sharded

    store = open_datastore(args.dstore.resolve(), load_keys=False)
    count = keep_sharded(store, args.ray, args.knn_shards, args.knn_replicas)
    print(f"{store.path} is up in {count} shards, {args.knn_replicas or 1} of each")
    print(f"runs with --knn-ray {args.ray} use them, until `fairseq-knnlm cluster down`")
