"""``fairseq-knnlm save``: a datastore of a split, by way of ``fairseq-eval-lm``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fairseq_knnlm.cli.common import check_new, evaluate
from fairseq_knnlm.errors import ConfigError

HELP = "run a language model over a split and save its datastore"
EXAMPLE = "data-bin --path checkpoint_best.pt --dstore DSTORE --tokens-per-sample 512"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Other flags go to ``fairseq-eval-lm``."""
    parser.add_argument("data", nargs="?", help="folder that fairseq-preprocess wrote")
    parser.add_argument("--path", help="checkpoint of the language model")
    parser.add_argument("--dstore", help="folder to make, or to go on with where it was stopped")
    parser.add_argument("--gen-subset", default="train", help="split to read (default: train)")
    parser.add_argument(
        "--join",
        type=Path,
        metavar="DSTORE",
        help="only make a datastore of blocks that were saved by several processes (--num-shards "
        "N --shard-id I); the last of them does so by itself",
    )


def check(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Refuses a place that is taken, or two of them, and what does not go together."""
    needed = {"DATA": args.data, "--path": args.path, "--dstore": args.dstore}
    if args.join is not None:
        if given := [name for name, value in needed.items() if value is not None] or list(rest):
            raise ConfigError(
                "--join makes a datastore of what was saved before",
                expected="--join DSTORE alone",
                found=f"{given[0]} too",
                do="leave out one or the other",
            )
        return
    for name, value in needed.items():
        if value is None:
            raise ConfigError(f"save needs {name}", expected=EXAMPLE, found="none")
    check_new("--dstore", Path(args.dstore), goes_on=True)
    if any(word.startswith("--dstore-mmap") for word in rest):
        raise ConfigError(
            "--dstore names the datastore to save", expected="--dstore alone", found="--dstore-mmap"
        )


def run(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Runs ``fairseq-eval-lm`` with the flags that save, and whatever else was typed."""
    if args.join is not None:
        from fairseq_knnlm.runs.save_blocks import join_there

        print(join_there(args.join))
        return
    flags = ["--path", args.path, "--gen-subset", args.gen_subset]
    flags += ["--save-knnlm-dstore", "--dstore-mmap", args.dstore]
    evaluate(args.data, [*flags, *rest])
