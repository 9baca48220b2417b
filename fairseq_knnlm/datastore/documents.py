"""Where the documents of a datastore begin, as a file beside its manifest (``docs/format.md``).

The file is of its own, so that no fingerprint changes and a datastore of before can be given it. A
datastore in blocks has one in each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from fairseq_knnlm.datastore.blocks import Block
from fairseq_knnlm.datastore.manifest import BLOCKS
from fairseq_knnlm.datastore.reader import Datastore, outline
from fairseq_knnlm.errors import DatastoreError
from fairseq_knnlm.files import check_mapped, parse_json, publish, typed
from fairseq_knnlm.files.arrays import Archive, opened, write_card

FORMAT = "fairseq-knnlm documents"
#: Version 2 is of a block whose first document begins in a block before; others are written as
#: version 1.
VERSION = 2
#: Characters of an expression at most.
MOST_EXPRESSION = 1000
#: The expression where each line is a document: it matches any letter, ends of lines too.
EACH = "(?s)."
#: Tokens that are looked at before ``first_line`` takes a line to be no more than empty.
SEARCHED = 65_536


class Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds of what the file says of itself (``docs/format.md``)."""

    rows: Annotated[int, msgspec.Meta(ge=1, le=2**48)]
    eos: Annotated[int, msgspec.Meta(ge=0, le=2**62)]
    boundary: Annotated[str, msgspec.Meta(min_length=1, max_length=MOST_EXPRESSION)] | None
    datastore: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True, eq=False)
class Documents:
    """Where the documents of a text begin.

    Attributes:
        starts: (D,) int64, the first row of each document, ascending; the first is 0.
        rows: entries of the datastore, N; the last document ends there.
        eos: the token that ends a line.
        boundary: what the first line of a document matches; None where documents begin after empty
            lines.
    """

    starts: np.ndarray
    rows: int
    eos: int
    boundary: str | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def document_of(self, rows: np.ndarray) -> np.ndarray:
        """The number of the document that entries are from.

        Args:
            rows: (n,) integers; those below 0 are no entries.

        Returns:
            (n,) int64, -1 for those.

        Raises:
            IndexError: where a row is beyond the datastore.
        """
        rows = np.asarray(rows)
        if rows.size and int(rows.max()) >= self.rows:
            raise IndexError(f"row {int(rows.max()):,} of {self.rows:,}")
        return np.searchsorted(self.starts, rows, side="right") - 1

    def extent(self, document: int) -> tuple[int, int]:
        """The rows of a document, from the first to the one behind the last."""
        last = document == len(self) - 1
        return int(self.starts[document]), self.rows if last else int(self.starts[document + 1])

    def without(self, ranges: Sequence[tuple[int, int]]) -> Documents:
        """What is left of them without these rows.

        Args:
            ranges: rows, as (first, behind the last), ascending and apart; not all rows.
        """
        edges = np.append(self.starts, self.rows)
        for start, stop in reversed(ranges):
            edges -= np.clip(edges - start, 0, stop - start)
        first = np.flatnonzero(edges[:-1] < edges[1:])
        return replace(self, starts=edges[first], rows=int(edges[-1]))

    def describe(self) -> str:
        """``"1,200, each from a line that matches '= [^=]' on"``."""
        if self.boundary == EACH:
            return f"{len(self):,}, each up to the token that ends it"
        if self.boundary is None:
            return f"{len(self):,}, with empty lines between them"
        return f"{len(self):,}, each from a line that matches {self.boundary!r} on"


def write_documents(store: Datastore, documents: Documents, blocks: Sequence[Block] = ()) -> Path:
    """Writes where the documents of a datastore begin, atomically, in the place of what was there.

    A datastore in blocks is given a file a block. Rows that were forgotten count as of the document
    before them.

    Args:
        store: the datastore, of which neither keys nor values are read.
        documents: of its rows.
        blocks: of those that are to be written; all where none is named.

    Returns:
        The file, or the folder that the blocks are in.

    Raises:
        DatastoreError: where the entries were merged, so that they are no text.
        OutputError: where another process is writing it.
    """
    check_text(store)
    if not store.blocks:
        _write(store, documents.starts, documents)
        return store.documents_path
    for block in blocks or store.blocks:
        first, stop = np.searchsorted(documents.starts, [block.first, block.stop])
        _write(outline(block.path), block.own_rows(documents.starts[first:stop]), documents)
    return store.path / BLOCKS


def _write(store: Datastore, starts: np.ndarray, documents: Documents) -> None:
    """Writes those of one folder, of which the first may begin in a block before."""
    card = {
        "format": FORMAT,
        "version": 1 if 0 in starts[:1] else VERSION,
        "rows": len(store),
        "eos": documents.eos,
        "boundary": documents.boundary,
        "datastore": store.fingerprint,
    }
    arrays = {"card": write_card(card), "starts": starts}
    with publish(store.documents_path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_documents(store: Datastore) -> Documents | None:
    """Where the documents of a datastore begin; None where nobody has said so of all of it yet.

    Of several blocks the expression is that of the first one that has one. Documents of which
    nothing is left are left out.

    Args:
        store: the datastore, of which neither keys nor values are read.

    Raises:
        DatastoreError: where a file is damaged or of another datastore.
    """
    if not store.blocks:
        return _read(store, store.path, alone=True)
    parts = []
    for block in store.blocks:
        found = _read(outline(block.path), store.path, alone=False)
        if found is None:
            return None
        parts.append(found)
    pairs = list(zip(store.blocks, parts, strict=True))
    starts = [block.first + block.rows_before(part.starts) for block, part in pairs]
    edges = np.unique(np.concatenate([[0], *starts, [len(store)]]))
    boundary = next((part.boundary for part in parts if part.boundary is not None), None)
    return Documents(edges[:-1], len(store), parts[0].eos, boundary)


def _read(store: Datastore, asked: Path, *, alone: bool) -> Documents | None:
    """Those of one folder, of the datastore that was asked for.

    Where it is read alone, a document that begins in a block before begins with it.
    """
    path = store.documents_path
    if not path.exists() and not path.is_symlink():
        return None
    remedy = f"make it anew: fairseq-knnlm verify --dstore {asked} --documents"
    try:
        with opened(path) as archive:
            card, version = _read_card(archive)
            if card.datastore != store.fingerprint:
                raise DatastoreError(
                    f"{path} is of another datastore",
                    expected=f"datastore {store.fingerprint[:12]}...",
                    found=f"datastore {card.datastore[:12]}...",
                    do=remedy,
                )
            if card.rows != len(store):
                raise ValueError(f"{card.rows:,} rows in the place of {len(store):,}")
            starts = _read_starts(archive, card, version)
            if alone and 0 not in starts[:1]:
                starts = np.append(0, starts)
            return Documents(starts, card.rows, card.eos, card.boundary)
    except ValueError as error:
        raise DatastoreError(
            f"{path} is damaged",
            expected=f"beginnings of documents, version {VERSION} or before",
            found=error,
            do=remedy,
        ) from None


def _read_card(archive: Archive) -> tuple[Card, int]:
    """The card, and the file's version."""
    if unknown := set(archive.names) - {"card", "starts"}:
        raise ValueError(f"an array that does not belong to documents, {min(unknown)}")
    fields = parse_json(archive.text("card"))
    if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
        raise ValueError("a file of another kind")
    version = fields.pop("version", None)
    if type(version) is not int or version not in (1, VERSION):  # True is 1, too
        raise ValueError(f"version {version!r}")
    return typed(fields, Card), version


def _read_starts(archive: Archive, card: Card, version: int) -> np.ndarray:
    starts = archive.vector("starts", "int64")
    begins = 0 in starts[:1]
    if begins != (version == 1) or (starts[:1] < 0).any() or (starts[-1:] >= card.rows).any():
        raise ValueError(f"starts: rows that are not from 0 to below {card.rows:,}")
    if not (starts[1:] > starts[:-1]).all():
        raise ValueError("starts: rows that do not ascend")
    return starts


def check_text(store: Datastore) -> None:
    """Refuses a datastore whose rows are no text any more.

    Raises:
        DatastoreError: where entries were merged.
    """
    if store.manifest.merged:
        raise DatastoreError(
            f"the datastore {store.path} has no text, and so no documents",
            expected="a datastore in which row i + 1 follows row i",
            found="entries that were merged (compress --merge)",
            do="ask the datastore that it was made of",
        )


def first_line(store: Datastore, documents: Documents, document: int, most: int = 64) -> np.ndarray:
    """The tokens of a document's first line that is not empty, which names it.

    Args:
        store: the datastore, with its values.
        documents: its own.
        document: the number of one of them.
        most: tokens of the line at most.

    Returns:
        (n,) token ids without the one that ends the line; none where the document is empty.
    """
    check_mapped(store.values, "values")
    start, stop = documents.extent(document)
    head = np.asarray(store.values[start : min(stop, start + SEARCHED)])
    words = np.flatnonzero(head != documents.eos)
    if not len(words):
        return head[:0]
    first = start + words[0]
    _, ends_there = store.texts_of(np.array([first]))
    line = store.values[first : min(stop, int(ends_there[0]), first + most)]
    ends = np.flatnonzero(line == documents.eos)
    return np.array(line[: ends[0]] if len(ends) else line)


def around(
    store: Datastore, row: int, before: int, after: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """The text around an entry, as far as it is in the datastore.

    Args:
        store: the datastore, with its values.
        row: of the entry.
        before: tokens wanted before it.
        after: tokens wanted after it.

    Returns:
        (b,) and (a,) token ids, at most so many; None where entries were merged, which has taken
        the text apart.

    Raises:
        IndexError: where there is no such row.
    """
    if store.manifest.merged:
        return None
    if not 0 <= row < len(store):
        raise IndexError(f"row {row:,} of {len(store):,}")
    check_mapped(store.values, "values")
    (start,), (stop,) = store.texts_of(np.array([row]))
    earlier = store.values[max(row - before, start) : row]
    later = store.values[row + 1 : min(row + 1 + after, stop)]
    return np.array(earlier), np.array(later)
