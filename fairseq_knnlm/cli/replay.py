"""``fairseq-knnlm replay``: a figure's receipt, gone through again."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairseq_knnlm.bounds import check_seed, check_share
from fairseq_knnlm.cli.dictionary import read_dictionary
from fairseq_knnlm.errors import ConfigError, KnnlmError, ReceiptError

if TYPE_CHECKING:
    from fairseq_knnlm.runs.receipt import Receipt, TableReceipt

HELP = "compute the figures of a results JSON again, and say whether they are confirmed"
EXAMPLE = "results.json --sample 0.1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Results, how much of them to compute, and where to look for what made them."""
    parser.add_argument(
        "results", nargs="+", type=Path, metavar="RESULTS.json", help="from --results-json"
    )
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

    Of several results those that are not confirmed do not keep others from being gone through.

    Raises:
        ReceiptError: with all that differs; of several results, with the names of those that are
            not confirmed, once it was told why.
    """
    for handler in logging.root.handlers:
        handler.addFilter(Once())
    wrong = []
    for path in args.results:
        try:
            _replay(path, args, rest)
        except KnnlmError as error:
            if len(args.results) == 1:
                raise
            print(f"{path} is not confirmed: {error}", flush=True)
            wrong.append(path)
    if wrong:
        raise ReceiptError(
            f"{len(wrong)} of {len(args.results)} results are not confirmed",
            expected="what made each of them, and the figures that it comes to",
            found=", ".join(map(str, wrong)),
            do="see what is said of each above; --search FOLDER finds what was moved",
        )


def _replay(path: Path, args: argparse.Namespace, rest: Sequence[str]) -> None:
    from fairseq_knnlm.runs.receipt import TableReceipt, read_results

    found, receipt = read_results(path)
    if isinstance(receipt, TableReceipt):
        _replay_report(path, found, receipt, args.search)
    else:
        _replay_run(path, found, receipt, args, rest)
    print("confirmed", flush=True)


def _replay_report(
    path: Path, found: Mapping[str, Any], receipt: TableReceipt, search: Path | None
) -> None:
    """All of a report, which takes seconds."""
    from fairseq_knnlm.runs.replay_table import ReportAgain, other_figures

    again = ReportAgain(receipt, path, search)
    _tell(path, found, again.moved)
    symbols, eos = read_dictionary(again.dictionary) if again.dictionary is not None else ((), -1)
    if others := other_figures(found, again.figures(symbols, eos)):
        raise _other(path, others)
    print("all measured again")


def _replay_run(
    path: Path,
    found: Mapping[str, Any],
    receipt: Receipt,
    args: argparse.Namespace,
    rest: Sequence[str],
) -> None:
    """A sample of the sections that a run of ``fairseq-eval-lm`` scored."""
    from fairseq_knnlm.runs.receipt_places import find_places, typed_again
    from fairseq_knnlm.runs.replay import check_figures, compare, doubts, other_setup, sampled

    check_figures(found, path)
    places = find_places(receipt, path, args.search)
    flags = typed_again(receipt, places)
    _check_flags(flags, rest)
    _tell(path, found, places.moved)

    import fairseq_knnlm.tasks  # noqa: F401  before fairseq, of which it keeps noise off the screen
    from fairseq_knnlm.tasks.sections import TextAgain

    again = TextAgain(str(places.data), found["split"], [*flags, *rest])
    if others := other_setup(found, receipt, again):
        raise ReceiptError(
            f"{path} was made another way than its receipt says",
            expected="the same mixture of the same experts",
            found="\n            ".join(others),
            do="ask who gave it to you; or evaluate again",
        )
    sections = len(again.rows) - 1
    chosen = sampled(sections, args.sample, args.seed)
    comparison = compare(found, receipt, again, chosen, path)
    why = doubts(found, receipt, again)
    if faults := comparison.faults(why):
        raise _other(path, faults)
    print(comparison.summary(sections, why))


def _tell(path: Path, found: Mapping[str, Any], moved: Sequence[str]) -> None:
    print(f"{path}: {found['split']}, {found['tokens']:,} tokens; its files are as they were")
    for line in moved:
        print(line)


def _other(path: Path, faults: Sequence[str]) -> ReceiptError:
    return ReceiptError(
        f"the figures of {path} are not what its files and flags come to",
        expected="the same figures",
        found="\n            ".join(faults),
        do="ask who gave it to you; or evaluate again",
    )


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
