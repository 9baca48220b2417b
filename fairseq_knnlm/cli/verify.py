"""``fairseq-knnlm verify``: every byte of a datastore, checked; where its documents begin."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from fairseq_knnlm.bounds import check_seed, check_share
from fairseq_knnlm.cli.common import add_store, check_store, opened, outlined
from fairseq_knnlm.cli.dictionary import (
    add_dictionary,
    check_dictionary,
    check_named,
    read_dictionary,
    read_encoded_data,
)
from fairseq_knnlm.datastore.boundaries import check_expression
from fairseq_knnlm.datastore.legacy import is_legacy
from fairseq_knnlm.datastore.making import is_only_in_the_making
from fairseq_knnlm.errors import ConfigError, KnnlmError
from fairseq_knnlm.files import check_outputs

if TYPE_CHECKING:
    from fairseq_knnlm.runs.findings import Finding

HELP = "check every byte of a datastore and its index"
EXAMPLE = "--dstore DSTORE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A datastore, and what its documents are found by."""
    add_store(parser)
    parser.add_argument(
        "--documents",
        action="store_true",
        help="first find where the documents of its text begin, and keep that with it; saving does "
        "so by itself",
    )
    parser.add_argument(
        "--document-boundary",
        help="regular expression that the first line of each document matches at its beginning, "
        "such as '= [^=]' of WikiText (default: documents begin after empty lines)",
    )
    add_dictionary(parser, "what --document-boundary reads the text by, and what --recompute reads")
    parser.add_argument(
        "--recompute",
        type=float,
        metavar="SHARE",
        help="compute this share of the blocks again, one at least, from the text in --data and "
        "the checkpoint in --path, read as the datastore says, and compare; further flags, such as "
        "--cpu, go to fairseq",
    )
    parser.add_argument("--path", help="with --recompute: checkpoint that saved the datastore")
    parser.add_argument(
        "--seed", type=int, default=0, help="with --recompute: of the blocks drawn (default: 0)"
    )


def check(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Refuses sizes that no datastore has, and what finds no documents."""
    check_store(args)
    _check_needed(args)
    if args.recompute is not None:
        _check_recompute(args)
    if args.document_boundary is not None:
        check_expression("--document-boundary", args.document_boundary)
        check_named(
            args.dictionary,
            "--document-boundary matches text, and a datastore has only the ids of tokens",
        )
    check_dictionary(args.dictionary)


def _check_needed(args: argparse.Namespace) -> None:
    """Refuses flags without those that they belong to."""
    recompute, documents = args.recompute is not None, args.documents
    for flag, given, needed, there in (
        ("--document-boundary", args.document_boundary is not None, "--documents", documents),
        ("--data", args.dictionary is not None, "--documents", documents or recompute),
        ("--path", args.path is not None, "--recompute", recompute),
        ("--seed", args.seed != 0, "--recompute", recompute),
    ):
        if given and not there:
            raise ConfigError(
                f"{flag} does nothing without {needed}",
                expected=f"{needed} {flag} ...",
                found=f"no {needed}",
            )


def _check_recompute(args: argparse.Namespace) -> None:
    """Refuses what nothing can be computed again of, or with."""
    check_share("--recompute", args.recompute)
    check_seed(args.seed)
    for flag, value in (("--data", args.dictionary), ("--path", args.path)):
        if value is None:
            raise ConfigError(
                f"--recompute needs {flag}",
                expected="--recompute SHARE --data DATA --path CKPT",
                found=f"no {flag}",
            )
    if is_legacy(args.dstore) or is_only_in_the_making(args.dstore):
        found = "files of urvashik/knnlm" if is_legacy(args.dstore) else "one in the making"
        raise ConfigError(
            "--recompute needs a datastore that says how it was saved",
            expected="a datastore of fairseq-knnlm, complete",
            found=found,
            do="leave --recompute out",
        )


def run(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Prints a line for each thing that was found; all that is wrong stands in one error.

    Raises:
        KnnlmError: with all that is wrong.
    """
    from fairseq_knnlm.runs.verify import verified, verified_making

    if args.documents:
        _add_documents(args)
    making = is_only_in_the_making(args.dstore)
    again = _computing(args, rest) if args.recompute is not None else iter(())
    wrong: list[KnnlmError] = []
    looked_at = verified_making(args.dstore) if making else verified(outlined(args))
    for finding in chain(looked_at, again):
        print(f"{finding.path}: {finding.summary}", flush=True)
        wrong += finding.errors
    if wrong:
        raise KnnlmError("\n".join(map(str, wrong)))


def _computing(args: argparse.Namespace, rest: Sequence[str]) -> Iterator[Finding]:
    """Opens model and text at once, and computes later."""
    import fairseq_knnlm.tasks  # noqa: F401  before fairseq, of which it keeps noise off the screen
    from fairseq_knnlm.runs.recompute import check_can_be_computed, check_fits, recomputed
    from fairseq_knnlm.tasks.recompute import Texts

    store = outlined(args)
    check_can_be_computed(store)
    texts = Texts(str(args.dictionary), args.path, rest)
    check_fits(store, texts(store.manifest.origin))
    return recomputed(store, texts, args.recompute, args.seed)


def _add_documents(args: argparse.Namespace) -> None:
    from fairseq_knnlm.runs.documents import EOS, add_documents
    from fairseq_knnlm.runs.encoded import boundary_of

    store = opened(args, load_keys=False)
    check_outputs({"--documents": store.documents_path})
    if args.dictionary is None:
        add_documents(store, None, None, EOS)
        return
    symbols, eos = read_dictionary(args.dictionary)
    boundary = boundary_of(args.document_boundary, read_encoded_data(args.dictionary, symbols))
    add_documents(store, boundary, symbols, eos)
