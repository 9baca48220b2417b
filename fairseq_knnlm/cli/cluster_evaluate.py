"""``fairseq-knnlm cluster evaluate``: an evaluation, shared out over the workers of a Ray."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fairseq_knnlm.cli import report
from fairseq_knnlm.cli.on_ray import add_workers, bar, check_workers, follows, share_out
from fairseq_knnlm.files import check_outputs, partial_folder
from fairseq_knnlm.runs.progress import progress_of

HELP = "evaluate a split with a memory, in shares that workers have"
EXAMPLE = "--ray local --workers 2 data-bin --path checkpoint_best.pt --dstore DSTORE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Other flags go to ``fairseq-eval-lm``."""
    add_workers(parser)
    parser.add_argument("data", help="folder that fairseq-preprocess wrote")
    parser.add_argument("--path", required=True, help="checkpoint of the language model")
    parser.add_argument("--dstore", required=True, help="datastore to ask")
    parser.add_argument("--gen-subset", default="test", help="split to read (default: test)")
    parser.add_argument("--results-json", type=Path, help="write what was measured to this file")
    parser.add_argument("--score-table", type=Path, help="write one row a scored token to it")


def check(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Refuses outputs that cannot be written."""
    check_workers(args, rest)
    check_outputs({"--results-json": args.results_json, "--score-table": args.score_table})


def run(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Has each worker score its share, and prints what one process would have found."""
    flags = ["--path", args.path, "--gen-subset", args.gen_subset, "--knnlm"]
    flags += ["--dstore-filename", args.dstore, *rest]
    with partial_folder((args.results_json or Path("results.json")).resolve()) as name:
        folder = Path(name)
        told = [folder / f"{number}.progress" for number in range(args.workers)]

        def share(number: int) -> list[str]:
            found = [*flags, "--results-json", str(folder / f"{number}.json")]
            found += ["--progress-file", str(told[number])]
            if args.score_table is not None:
                found += ["--score-table", str(folder / f"{number}.npz")]
            return found

        with bar("evaluating", None, "tokens", scale=True) as shown:
            tick = follows(shown, partial(progress_of, told))
            share_out(args, args.data, share, folder / "shared", tick)
        args.join = sorted(folder.glob("*.json")) + sorted(folder.glob("*.npz"))
        report.run(args, rest)
