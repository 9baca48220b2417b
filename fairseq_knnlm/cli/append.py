"""``fairseq-knnlm append``: more text for a datastore, by way of ``fairseq-eval-lm``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fairseq_knnlm.cli.common import check_ours, evaluate
from fairseq_knnlm.datastore import outline
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.runs.origins import reading_flags, words

HELP = "run a language model over a split and add it to a datastore and its index"
EXAMPLE = "DSTORE data-bin --path checkpoint_best.pt --gen-subset valid"
#: Flags that say together what stands before a token: one is taken off another, or excludes it.
BLOCKS = {"--tokens-per-sample", "--context-window", "--stride"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Other flags go to ``fairseq-eval-lm``."""
    parser.add_argument("dstore", type=Path, metavar="DSTORE", help="datastore to add to")
    parser.add_argument("data", help="folder that fairseq-preprocess wrote")
    parser.add_argument("--path", required=True, help="checkpoint of the datastore")
    parser.add_argument("--gen-subset", default="train", help="split to add (default: train)")


def check(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Refuses what is no datastore, or names another one."""
    check_ours(args.dstore)
    for flag in ("--dstore-mmap", "--dstore-filename"):
        if any(word.split("=")[0] == flag for word in rest):
            raise ConfigError(
                f"{flag} names another datastore", expected="DSTORE alone", found=flag
            )


def run(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Runs ``fairseq-eval-lm`` with the flags that add, and whatever else was typed."""
    flags = ["--path", args.path, "--gen-subset", args.gen_subset, "--save-knnlm-dstore"]
    flags += ["--append-dstore", "--dstore-mmap", str(args.dstore)]
    evaluate(args.data, [*flags, *_as_before(args.dstore, rest), *rest])


def _as_before(path: Path, rest: Sequence[str]) -> list[str]:
    """The flags by which the datastore was read, those that were typed left out."""
    known = reading_flags(outline(path).manifest.origin)
    typed = {"--gen-subset", *(word.split("=")[0] for word in rest)}
    if typed & BLOCKS:
        typed |= BLOCKS
    return words({flag: value for flag, value in known.items() if flag not in typed})
