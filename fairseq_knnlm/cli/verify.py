"""``fairseq-knnlm verify``: every byte of a datastore, checked; where its documents begin."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fairseq_knnlm.cli.common import add_store, check_store, opened, outlined
from fairseq_knnlm.datastore.boundaries import check_expression
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
    parser.add_argument(
        "--data",
        dest="dictionary",  # where there is data, unknown flags are taken for fairseq's
        type=Path,
        help="folder that fairseq-preprocess wrote, or a dict.txt: what --document-boundary reads "
        "the text by",
    )


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
        _check_dictionary(args.dictionary)


def _check_dictionary(path: Path) -> None:
    if not _dictionary_file(path).is_file():
        raise ConfigError(
            f"no dictionary at {path}",
            expected="--data DATA, a folder that fairseq-preprocess wrote, or its dict.txt",
            found="a folder without dict.txt" if path.is_dir() else "no such file",
            do="check the path",
        )


def _dictionary_file(path: Path) -> Path:
    return path / "dict.txt" if path.is_dir() else path


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Prints a line for each thing that was found; all that is wrong stands in one error.

    Raises:
        KnnlmError: with all that is wrong.
    """
    from fairseq_knnlm.runs.verify import verified

    if args.documents:
        _add_documents(args)
    wrong: list[KnnlmError] = []
    for finding in verified(outlined(args)):
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
    import fairseq_knnlm.tasks  # noqa: F401  before fairseq, of which it keeps noise off the screen

    from fairseq.data import Dictionary  # isort: skip

    found = Dictionary.load(str(_dictionary_file(args.dictionary)))
    add_documents(store, args.document_boundary, found.symbols, found.eos())
