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
    parser.add_argument("data", help="folder that fairseq-preprocess wrote")
    parser.add_argument("--path", required=True, help="checkpoint of the language model")
    parser.add_argument("--dstore", required=True, help="folder to make")
    parser.add_argument("--gen-subset", default="train", help="split to read (default: train)")


def check(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Refuses a place that is taken, or two of them."""
    check_new("--dstore", Path(args.dstore))
    if any(word.startswith("--dstore-mmap") for word in rest):
        raise ConfigError(
            "--dstore names the datastore to save", expected="--dstore alone", found="--dstore-mmap"
        )


def run(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Runs ``fairseq-eval-lm`` with the flags that save, and whatever else was typed."""
    flags = ["--path", args.path, "--gen-subset", args.gen_subset]
    flags += ["--save-knnlm-dstore", "--dstore-mmap", args.dstore]
    evaluate(args.data, [*flags, *rest])
