"""``fairseq-knnlm replay``: a figure's receipt, gone through again."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from fairseq_knnlm.bounds import check_seed, check_share
from fairseq_knnlm.errors import ConfigError, ReceiptError

HELP = "compute the figures of a results JSON again, and say whether they are confirmed"
EXAMPLE = "results.json --sample 0.1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Results, how much of them to compute, and where to look for what made them."""
    parser.add_argument("results", type=Path, metavar="RESULTS.json", help="from --results-json")
    parser.add_argument(
        "--sample",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="share of the text's 64 sections to compute, one at least (default: 1, all)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="with --sample: of the sections drawn (default: 0)"
    )
    parser.add_argument(
        "--search",
        type=Path,
        metavar="FOLDER",
        help="look here, by fingerprints, for what does not lie where it was; further flags, such "
        "as --cpu, go to fairseq",
    )


def check(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Refuses a share that is none, and a folder that is not there."""
    check_share("--sample", args.sample)
    check_seed(args.seed)
    if args.search is not None and not args.search.is_dir():
        raise ConfigError(
            f"no folder {args.search}",
            expected="--search FOLDER",
            found="a file" if args.search.exists() else "nothing",
            do="check the path",
        )


def run(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Prints what was looked at, and ``confirmed``; all that differs stands in one error.

    Raises:
        ReceiptError: with all that differs.
    """
    from fairseq_knnlm.runs.receipt import read_results
    from fairseq_knnlm.runs.receipt_places import find_places, typed_again
    from fairseq_knnlm.runs.replay import check_figures, compare, doubts, other_setup, sampled

    for handler in logging.root.handlers:
        handler.addFilter(Once())
    found, receipt = read_results(args.results)
    check_figures(found, args.results)
    places = find_places(receipt, args.results, args.search)
    flags = typed_again(receipt, places)
    _check_flags(flags, rest)
    print(
        f"{args.results}: {found['split']}, {found['tokens']:,} tokens; its files are as they were"
    )
    for line in places.moved:
        print(line)

    import fairseq_knnlm.tasks  # noqa: F401  before fairseq, of which it keeps noise off the screen
    from fairseq_knnlm.tasks.sections import TextAgain

    again = TextAgain(str(places.data), found["split"], [*flags, *rest])
    if others := other_setup(found, receipt, again):
        raise ReceiptError(
            f"{args.results} was made another way than its receipt says",
            expected="the same mixture of the same experts",
            found="\n            ".join(others),
            do="ask who gave it to you; or evaluate again",
        )
    sections = len(again.rows) - 1
    chosen = sampled(sections, args.sample, args.seed)
    comparison = compare(found, receipt, again, chosen, args.results)
    why = doubts(found, receipt, again)
    if faults := comparison.faults(why):
        raise ReceiptError(
            f"the figures of {args.results} are not what its files and flags come to",
            expected="the same losses",
            found="\n            ".join(faults),
            do="ask who gave it to you; or evaluate again",
        )
    print(comparison.summary(sections, why))
    print("confirmed")


class Once(logging.Filter):
    """Says each thing once, though what would say it again is made for each part of the text."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        is_new = text not in self._said
        self._said.add(text)
        return is_new


def _check_flags(flags: Sequence[str], rest: Sequence[str]) -> None:
    """Refuses flags that the receipt knows better.

    Raises:
        ConfigError: naming one.
    """
    known = {word for word in flags if word.startswith("--")}
    for word in rest:
        if word.split("=")[0] in known:
            raise ConfigError(
                f"{word.split('=')[0]} is not to be chosen: the receipt says it",
                expected="flags that leave the figures what they are, such as --cpu",
                found=word,
                do="leave it out",
            )
