"""``fairseq-knnlm import``: a datastore of urvashik/knnlm as one that describes itself."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fairseq_knnlm.bounds import MOST, check_range
from fairseq_knnlm.cli.common import add_store, check_new, check_store, opened
from fairseq_knnlm.datastore.legacy import convert, is_legacy
from fairseq_knnlm.errors import ConfigError

HELP = "convert PREFIX_keys.npy and PREFIX_vals.npy of urvashik/knnlm"
EXAMPLE = "--dstore PREFIX --dstore-size 103225485 --dstore-fp16 --out DSTORE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The old files, and where the new ones go."""
    add_store(parser)
    parser.add_argument("--out", required=True, type=Path, help="folder to make")
    parser.add_argument(
        "--vocabulary", type=int, help="types of the dictionary, to check the values against"
    )


def check(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Refuses sizes that nothing has, and a place that is taken."""
    check_store(args)
    check_range("--vocabulary", args.vocabulary, 1, MOST, "counts types of the dictionary")
    check_new("--out", args.out)


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Converts them."""
    if not is_legacy(args.dstore):
        raise ConfigError(
            f"no datastore of urvashik/knnlm at {args.dstore}",
            expected="PREFIX, with PREFIX_keys.npy and PREFIX_vals.npy",
            found="no such files",
        )
    store = opened(args, args.vocabulary)
    convert(store, args.out)
    print(f"{args.out}: {len(store):,} entries of width {store.manifest.width}")
