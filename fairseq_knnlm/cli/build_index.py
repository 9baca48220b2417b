"""``fairseq-knnlm build-index``: the FAISS index of a datastore."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fairseq_knnlm.bounds import MOST, check_device, check_range, check_seed
from fairseq_knnlm.cli.common import add_store, check_store, opened
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.index.recipes import RECALL

HELP = "build the FAISS index of a datastore"
EXAMPLE = "--dstore DSTORE --recipe auto"

#: Keys that recall is measured with at most: their true neighbours take 12 KiB each.
MOST_QUERIES = 100_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which index, and how much is spent on it."""
    add_store(parser)
    parser.add_argument(
        "--recipe",
        default="auto",
        help="auto (by size and device), paper (IVF4096,PQ64, nprobe 32) or a FAISS factory "
        "string (default: auto)",
    )
    parser.add_argument("--indexfile", type=Path, help="index to write (default: in the datastore)")
    parser.add_argument("--metric", choices=("l2", "ip"), default="l2", help="default: l2")
    parser.add_argument(
        "--max-bytes-per-key",
        type=int,
        help="memory that --recipe auto may spend on a key (default: 72 where compressed)",
    )
    parser.add_argument(
        "--recall",
        type=float,
        default=RECALL,
        help="share of the true neighbours that the lists visited should hold; decides the number "
        f"of lists, which is stored with the index (default: {RECALL})",
    )
    parser.add_argument("--probe", type=int, help="that number itself")
    parser.add_argument("--train-rows", type=int, help="keys in the training sample")
    parser.add_argument(
        "--recall-queries",
        type=int,
        default=100,
        help="sampled keys on which both are measured; 0 skips that (default: 100)",
    )
    parser.add_argument(
        "--knn-device", default="auto", help="where it will be searched (default: auto)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")


def check(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Refuses numbers that nothing can be built with."""
    check_store(args)
    check_seed(args.seed)
    check_device(args.knn_device)
    check_range("--probe", args.probe, 1, MOST, "counts lists")
    if not 0 < args.recall <= 1:
        raise ConfigError("--recall is a share", expected="above 0, to 1", found=args.recall)
    check_range("--train-rows", args.train_rows, 1, MOST, "counts keys to train on")
    check_range("--recall-queries", args.recall_queries, 0, MOST_QUERIES, "counts sampled keys")
    check_range("--max-bytes-per-key", args.max_bytes_per_key, 1, MOST, "counts bytes")


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Builds it, and says what it is."""
    build(args)


def build(args: argparse.Namespace, spread: Callable[[Any], object] | None = None) -> None:
    """The same, with others that write pieces, where there are such."""
    from fairseq_knnlm.index.build import BuildOptions
    from fairseq_knnlm.runs.build_index import build_index

    store = opened(args)
    path = args.indexfile or store.index_path
    options = BuildOptions(
        metric=args.metric,
        nprobe=args.probe,
        recall=args.recall,
        train_rows=args.train_rows,
        queries=args.recall_queries,
        seed=args.seed,
    )
    started = time.perf_counter()
    card = build_index(
        store,
        path,
        options,
        recipe=args.recipe,
        max_bytes=args.max_bytes_per_key,
        device=args.knn_device,
        spread=spread,
    )
    seconds = time.perf_counter() - started
    print(f"{path}: {card.describe()}")
    size = card.bytes / card.rows + card.piece_bytes
    print(f"{card.rows:,} keys, {size:.0f} bytes a key, built in {seconds:.0f} s")
