"""``fairseq-knnlm cluster save``: the blocks of a datastore, made by the workers of a Ray."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fairseq_knnlm.cli import save
from fairseq_knnlm.cli.on_ray import add_workers, bar, check_workers, follows, share_out
from fairseq_knnlm.datastore import outline
from fairseq_knnlm.datastore.making import is_in_the_making, read_plan, there
from fairseq_knnlm.errors import ConfigError, KnnlmError

HELP = "save a datastore, its blocks shared out over workers"
EXAMPLE = "--ray local --workers 2 data-bin --path checkpoint_best.pt --dstore DSTORE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``save``, and the workers."""
    add_workers(parser)
    save.add_arguments(parser)


def check(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Refuses what ``save`` refuses."""
    check_workers(args, rest)
    if args.join is not None:
        raise ConfigError(
            "--join is no work for several",
            expected="fairseq-knnlm save --join DSTORE",
            found="cluster save --join",
        )
    save.check(args, rest)


def run(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Has each worker make its share of the blocks; the last one makes a datastore of them."""
    path = Path(args.dstore).resolve()
    flags = ["--path", args.path, "--gen-subset", args.gen_subset, "--save-knnlm-dstore"]
    flags += ["--dstore-mmap", str(path), *rest]
    path.parent.mkdir(parents=True, exist_ok=True)
    proof = path.with_name(f".{path.name}.shared")
    with bar(f"saving {path.name}", None, "blocks") as shown:
        tick = follows(shown, partial(progress, path))
        share_out(args, args.data, lambda _: flags, proof, tick)
    print(f"{path}: {len(outline(path)):,} entries in {len(outline(path).blocks)} blocks")


def progress(path: Path) -> tuple[int | None, int]:
    """How many blocks there will be, where that is known, and how many there are."""
    try:
        if is_in_the_making(path):
            plan = read_plan(path)
            return len(plan.blocks), len(there(path, plan))
        blocks = len(outline(path).blocks)
        return blocks, blocks
    except KnnlmError:  # it is about to begin, or has just been made
        return None, 0
