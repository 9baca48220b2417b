"""Finding the documents of a datastore: when it is saved, or at any time later."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from fairseq_knnlm.datastore import Block, Datastore, Documents, write_documents
from fairseq_knnlm.datastore.boundaries import (
    after_empty_lines,
    at_matching_lines,
    check_expression,
)
from fairseq_knnlm.datastore.documents import check_text
from fairseq_knnlm.errors import DatastoreError
from fairseq_knnlm.lm.fingerprints import dictionary_fingerprint
from fairseq_knnlm.runs.spelling import line_spelling

logger = logging.getLogger(__name__)

FLAG = "--document-boundary"
#: The token that ends a line in every dictionary that fairseq makes.
EOS = 2
#: Characters of a document's name.
LONGEST_NAME = 80


def find_documents(
    values: np.ndarray,
    eos: int,
    boundary: str | None,
    symbols: Sequence[str],
    breaks: Sequence[int] | np.ndarray = (0,),
) -> Documents:
    """Where the documents of a text begin, or of several.

    Args:
        values: (N,) token ids, mapped or not.
        eos: the token that ends a line.
        boundary: the expression that the first line of a document matches; None where documents
            begin after empty lines.
        symbols: the dictionary, which only an expression asks for.
        breaks: where a text begins, ascending from 0, and so a document.

    Raises:
        ConfigError: where ``boundary`` is no expression.
    """
    find = partial(after_empty_lines, eos=eos)
    if boundary is not None:
        expression, spell = check_expression(FLAG, boundary), line_spelling(symbols)
        find = partial(at_matching_lines, eos=eos, expression=expression, spell=spell)
    texts = pairwise([*breaks, len(values)])
    starts = np.concatenate([first + find(values[first:stop]).starts for first, stop in texts])
    found = Documents(starts, len(values), eos, boundary)
    if boundary is not None and len(found) == 1:
        logger.warning(
            "%s %r matches no line, or only the first: all of the text is one document",
            *(FLAG, boundary),
        )
    return found


def add_documents(
    store: Datastore, boundary: str | None, symbols: Sequence[str] | None, eos: int = EOS
) -> Path:
    """Finds the documents of a datastore and keeps where they begin beside its manifest.

    Args:
        store: the datastore, with its values.
        boundary: as ``find_documents`` has it.
        symbols: its dictionary; None where that is not at hand, which empty lines can do without.
        eos: the token that ends a line.

    Raises:
        ConfigError: where ``boundary`` is no expression.
        DatastoreError: where entries were merged, or the dictionary is another.
        OutputError: where another process is writing the same.
    """
    check_text(store)
    if symbols is not None:
        check_dictionary(store, symbols)
    found = find_documents(store.values, eos, boundary, symbols or (), store.breaks)
    return write_documents(store, found)


def keep_documents(
    store: Datastore, find: Callable[[np.ndarray], Documents], blocks: Sequence[Block] = ()
) -> None:
    """Finds the documents of a text that was just saved, and keeps where they begin.

    Where they cannot be written, that is no reason to lose the datastore.

    Args:
        store: the datastore.
        find: the documents of the text's values (n,).
        blocks: the last of the datastore, which hold the text; none where all of it is the text.
    """
    first = blocks[0].first if blocks else 0
    found = find(store.values[first:])
    documents = replace(found, starts=first + found.starts, rows=len(store))
    try:
        write_documents(store, documents, blocks)
    except OSError as error:
        logger.warning(
            "where documents begin cannot be kept (%s); add it later with `fairseq-knnlm verify "
            "--documents`",
            error.strerror,
        )


def check_dictionary(store: Datastore, symbols: Sequence[str]) -> None:
    """Refuses a dictionary that is not the datastore's.

    Raises:
        DatastoreError: where it is another.
    """
    origin = store.manifest.origin
    store.check_origin(dictionary=dictionary_fingerprint(symbols))
    if len(symbols) < origin.vocabulary:  # of files of urvashik/knnlm no more is known
        raise DatastoreError(
            f"the datastore {store.path} is of another dictionary than that of --data",
            expected=f"{origin.vocabulary:,} types or more",
            found=f"{len(symbols):,}",
            do="name the data that the language model was trained on",
        )


def shown_name(line: str) -> str:
    """The name of a document as it is shown, from the text of its first line."""
    name = next(iter(line.strip().splitlines()), "")
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1].rstrip()}…"
