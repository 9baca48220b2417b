"""What the kinds of work on Ray share: who does it, and a command cut into shares."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fairseq_knnlm.bounds import MOST, check_range
from fairseq_knnlm.cli.common import evaluate
from fairseq_knnlm.errors import ConfigError


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Which Ray, and how much of it."""
    parser.add_argument(
        "--ray",
        required=True,
        metavar="ADDRESS",
        help="local for a Ray of this machine alone that ends with the command, auto for the one "
        "that runs here, or HOST:PORT",
    )
    parser.add_argument(
        "--workers", type=int, help="processes at a time (default: a CPU each of this machine)"
    )
    parser.add_argument(
        "--gpus-per-worker", type=float, default=0.0, help="GPUs of each, or a part (default: 0)"
    )


def add_lasting(parser: argparse.ArgumentParser) -> None:
    """A Ray that does not end with the command."""
    parser.add_argument(
        "--ray",
        required=True,
        metavar="ADDRESS",
        help="where Ray is: auto for the one that runs here, or HOST:PORT of its head",
    )


def check_lasting(args: argparse.Namespace) -> None:
    """Refuses what is no address, and a Ray that would end with the command."""
    from fairseq_knnlm.cluster.connect import LOCAL, check_address

    if args.ray == LOCAL:
        raise ConfigError(
            "--ray local ends with the command, and shards with it",
            expected="a Ray that stays: auto, or HOST:PORT",
            found=LOCAL,
            do="start one with `ray start --head`; runs take --knn-ray local without this",
        )
    check_address("--ray", args.ray)


def check_workers(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Refuses numbers of which nothing comes, and to share out by hand what Ray shares out."""
    from fairseq_knnlm.cluster.connect import check_address

    check_address("--ray", args.ray)
    check_range("--workers", args.workers, 1, MOST, "counts processes")
    if not 0 <= args.gpus_per_worker <= MOST:
        raise ConfigError(
            "--gpus-per-worker counts GPUs", expected="0 or more", found=args.gpus_per_worker
        )
    for flag in ("--num-shards", "--shard-id"):
        if any(word.split("=")[0] == flag for word in rest):
            raise ConfigError(
                f"{flag} is for processes that you start yourself",
                expected="--workers N",
                found=flag,
                do=f"leave {flag} out",
            )
    if args.workers is None:
        args.workers = os.cpu_count() or 1


def share_out(
    args: argparse.Namespace,
    data: str,
    flags: Callable[[int], Sequence[str]],
    proof: Path,
    tick: Callable[[int], object],
) -> None:
    """Runs ``fairseq-eval-lm`` in as many shares as there are workers.

    Args:
        args: with what ``add_workers`` added.
        data: folder that fairseq-preprocess wrote.
        flags: those of a share, given its number, but for the number itself.
        proof: a file that is made for the time, in a folder that all machines are to see.
        tick: called twice a second with the number of shares that are done.
    """
    from fairseq_knnlm.cluster.connect import connect
    from fairseq_knnlm.cluster.work import do_all

    shares = args.workers
    connect(args.ray, cpus=shares)
    own = [["--num-shards", str(shares), "--shard-id", str(number)] for number in range(shares)]
    typed = [[*flags(number), *own[number]] for number in range(shares)]
    with made(proof):
        work = partial(run_share, data, typed)
        gpus = args.gpus_per_worker
        # fairseq keeps state in its process.
        do_all(work, shares, workers=shares, gpus=gpus, fresh=True, proof=proof, tick=tick)


@contextmanager
def made(proof: Path) -> Iterator[None]:
    """A file that is there for a while."""
    proof.touch()
    try:
        yield
    finally:
        proof.unlink(missing_ok=True)


def run_share(data: str, typed: Sequence[Sequence[str]], number: int) -> None:
    """Runs one share in this process, a worker of Ray's."""
    import fairseq_knnlm.tasks  # noqa: F401  before fairseq, of which it keeps noise off the log

    from fairseq_knnlm.tasks.stock import in_our_words  # isort: skip

    try:
        evaluate(data, typed[number])
    except Exception as error:
        raise in_our_words(error) from error


def bar(what: str, total: int | None, unit: str, *, scale: bool = False) -> Any:
    """A bar of work that is done elsewhere, with the time that is left; to be closed.

    Args:
        what: is done.
        total: units of it; None where that is not known yet.
        unit: what is counted.
        scale: of so many that 1,200,000 are better told as 1.20M.
    """
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit=f" {unit}", unit_scale=scale)


def moves(shown: Any) -> Callable[[int], object]:
    """Has a bar show how much is done, each time it is told."""
    return lambda done: shown.update(done - shown.n)


def follows(shown: Any, look: Callable[[], tuple[int | None, int]]) -> Callable[[int], object]:
    """Has a bar show how much is done of how much, as ``look`` finds it, each time it is called."""

    def tick(_: int) -> None:
        total, done = look()
        if total is None or (total, done) == (shown.total, shown.n):
            return
        if shown.total is None:  # the time until there was anything to count is no measure
            shown.reset()
        shown.total = total
        shown.update(done - shown.n)
        shown.refresh()

    return tick
