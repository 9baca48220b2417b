"""``fairseq-knnlm cluster``: what runs on Ray; a file's worth of subcommands of its own."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from fairseq_knnlm.bounds import check_count
from fairseq_knnlm.cluster.connect import LOCAL, check_address, connect
from fairseq_knnlm.datastore import open_datastore, outline
from fairseq_knnlm.errors import ConfigError, KnnlmError

HELP = "keep shards of an index up in Ray, for several runs"
EXAMPLE = "up --ray HOST:PORT --dstore DSTORE --knn-shards 4"

#: Subcommands: what they do, and what to type behind their names.
ACTIONS = {
    "up": (
        "start shards that runs with --knn-ray then use",
        "--ray HOST:PORT --dstore DSTORE --knn-shards 4 --knn-replicas 2",
    ),
    "status": ("say which shards are up", "--ray HOST:PORT"),
    "down": ("end shards that are up", "--ray HOST:PORT"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A subcommand for each thing to do."""
    actions = parser.add_subparsers(required=True, dest="action", metavar="ACTION")
    made = {}
    for name, (what, example) in ACTIONS.items():
        made[name] = actions.add_parser(
            name,
            help=what,
            description=f"{what[0].upper()}{what[1:]}.",
            epilog=f"example: fairseq-knnlm cluster {name} {example}",
        )
        made[name].add_argument(
            "--ray", required=True, help="where Ray is: auto, or HOST:PORT of its head"
        )
    made["up"].add_argument(
        "--dstore",
        required=True,
        type=Path,
        help="datastore in blocks, with an index in pieces, in a folder that all machines see",
    )
    made["up"].add_argument(
        "--knn-shards",
        type=int,
        help="parts that the index is cut into (default: one for each machine)",
    )
    made["up"].add_argument("--knn-replicas", type=int, help="copies of each part (default: 1)")
    made["down"].add_argument(
        "--dstore", type=Path, help="only shards of this datastore (default: of all)"
    )


def check(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Refuses what is no address, and a Ray that would end with the command."""
    if args.ray == LOCAL:
        raise ConfigError(
            "--ray local ends with the command, and shards with it",
            expected="a Ray that stays: auto, or HOST:PORT",
            found=LOCAL,
            do="start one with `ray start --head`; runs take --knn-ray local without this",
        )
    check_address("--ray", args.ray)
    for flag, name in (("--knn-shards", "shards"), ("--knn-replicas", "copies")):
        check_count(flag, vars(args).get(flag[2:].replace("-", "_")), f"counts {name}")


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Does it, and prints what came of it."""
    RUNS[args.action](args)


def _up(args: argparse.Namespace) -> None:
    from fairseq_knnlm.cluster.opening import keep_sharded

    store = open_datastore(args.dstore.resolve(), load_keys=False)
    count = keep_sharded(store, args.ray, args.knn_shards, args.knn_replicas)
    print(f"{store.path} is up in {count} shards, {args.knn_replicas or 1} of each")
    print(f"runs with --knn-ray {args.ray} use them, until `fairseq-knnlm cluster down`")


def _status(args: argparse.Namespace) -> None:
    from fairseq_knnlm.cluster.kept import described

    connect(args.ray)
    found = list(described())
    for one, words in found:
        print(f"{one.datastore[:12]}  shard {one.number + 1} of {one.shards}, copy ", end="")
        print(f"{one.replica + 1}: {words}")
    if not found:
        print("no shards are up")


def _down(args: argparse.Namespace) -> None:
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


RUNS: dict[str, Callable[[argparse.Namespace], None]] = {
    "up": _up,
    "status": _status,
    "down": _down,
}
