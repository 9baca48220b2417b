"""``fairseq-knnlm verify``: every byte of a datastore, checked; where its documents begin."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fairseq_knnlm.cli.common import add_store, check_store, opened, outlined
from fairseq_knnlm.cli.dictionary import add_dictionary, check_dictionary, read_dictionary
from fairseq_knnlm.datastore.boundaries import check_expression
from fairseq_knnlm.datastore.making import is_only_in_the_making
from fairseq_knnlm.errors import ConfigError, KnnlmError
from fairseq_knnlm.files import check_outputs

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
    add_dictionary(parser, "what --document-boundary reads the text by")


def check(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Refuses sizes that no datastore has, and what finds no documents."""
    check_store(args)
    for flag, given in (
        ("--document-boundary", args.document_boundary is not None),
        ("--data", args.dictionary is not None),
    ):
        if given and not args.documents:
            raise ConfigError(
                f"{flag} does nothing without --documents",
                expected=f"--documents {flag} ...",
                found="no --documents",
            )
    if args.document_boundary is not None:
        check_expression("--document-boundary", args.document_boundary)
        if args.dictionary is None:
            raise ConfigError(
                "--document-boundary matches text, and a datastore has only the ids of tokens",
                expected="--data DATA, the folder that was binarised, or its dict.txt",
                found="no --data",
            )
    if args.dictionary is not None:
        check_dictionary(args.dictionary)


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Prints a line for each thing that was found; all that is wrong stands in one error.

    Raises:
        KnnlmError: with all that is wrong.
    """
    from fairseq_knnlm.runs.verify import verified, verified_making

    if args.documents:
        _add_documents(args)
    making = is_only_in_the_making(args.dstore)
    wrong: list[KnnlmError] = []
    for finding in verified_making(args.dstore) if making else verified(outlined(args)):
        print(f"{finding.path}: {finding.summary}")
        wrong += finding.errors
    if wrong:
        raise KnnlmError("\n".join(map(str, wrong)))


def _add_documents(args: argparse.Namespace) -> None:
    from fairseq_knnlm.runs.documents import EOS, add_documents

    store = opened(args, load_keys=False)
    check_outputs({"--documents": store.documents_path})
    if args.dictionary is None:
        add_documents(store, None, None, EOS)
        return
    symbols, eos = read_dictionary(args.dictionary)
    add_documents(store, args.document_boundary, symbols, eos)
