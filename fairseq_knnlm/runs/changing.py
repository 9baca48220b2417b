"""Changing a datastore that is there: forgetting parts of its text, and their bytes."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from fairseq_knnlm.datastore import (
    Datastore,
    first_line,
    open_datastore,
    outline,
    read_documents,
)
from fairseq_knnlm.datastore.compacting import compact
from fairseq_knnlm.datastore.forgetting import Range, check_rows, forget, joined
from fairseq_knnlm.datastore.into_blocks import check_uncompressed, claimed, into_blocks
from fairseq_knnlm.errors import DatastoreError, IndexFileError, NGramError
from fairseq_knnlm.experts.ngram_file import counted_from
from fairseq_knnlm.files import Claim
from fairseq_knnlm.index.card import read_card
from fairseq_knnlm.index.cutting import copy_pieces, cut_index
from fairseq_knnlm.runs.documents import check_dictionary, shown_name
from fairseq_knnlm.runs.spelling import line_spelling

logger = logging.getLogger(__name__)

#: Names, or places, that a message lists at most.
LISTED = 8


@dataclass(frozen=True)
class Part:
    """Rows that are forgotten.

    Attributes:
        start: the first, and ``stop`` that behind the last.
        name: of the document that they are, where it was named.
    """

    start: int
    stop: int
    name: str | None = None

    def describe(self) -> str:
        """``"rows 3:9, 6 entries: 'Robert Boulter'"``."""
        named = "" if self.name is None else f": {self.name!r}"
        return f"rows {self.start}:{self.stop}, {self.stop - self.start:,} entries{named}"


@dataclass(frozen=True)
class Forgotten:
    """What was forgotten, or would be.

    Attributes:
        parts: in the order in which they were asked for.
        rows: entries that the datastore had.
        left: entries that it has now.
        reach: tokens behind a forgotten one whose keys may still depend on it; None where unknown.
        index_serves: False where the index has to be built again.
    """

    parts: Sequence[Part]
    rows: int
    left: int
    reach: int | None
    index_serves: bool


def forget_parts(
    path: Path,
    names: Sequence[str],
    ranges: Sequence[Range],
    symbols: Sequence[str] = (),
    spell: Callable[[Sequence[int]], str] | None = None,
    *,
    try_only: bool = False,
) -> Forgotten:
    """Forgets documents and rows of a datastore; all of them, or nothing.

    Args:
        path: the datastore's folder.
        names: of documents, as ``explain`` shows them.
        ranges: rows, as (first, behind the last).
        symbols: the dictionary, which only names need.
        spell: as ``named_documents`` has it.
        try_only: say what would be forgotten, and change nothing.

    Raises:
        BusyError: where another process is changing the datastore, or building its index.
        DatastoreError: where there is no such document, or several; no such rows; where nothing
            would be left, or the datastore was compressed.
        IndexFileError: where its index is damaged.
    """
    with ExitStack() as claims:
        if not try_only:
            claims.enter_context(claimed(path))
            claims.enter_context(Claim(outline(path).index_path.resolve()))
        store = open_datastore(path, load_keys=False)
        check_uncompressed(path, store.manifest)
        parts = [*named_documents(store, names, symbols, spell), *(Part(*each) for each in ranges)]
        gone = [(part.start, part.stop) for part in parts]
        check_rows(store, gone)
        left = len(store) - sum(stop - start for start, stop in joined(gone))
        serves = True
        if not try_only:
            serves = cut_index(into_blocks(path))
            forget(path, gone)
        return Forgotten(parts, len(store), left, _reach(store), serves)


def _reach(store: Datastore) -> int | None:
    """Tokens that a key was computed from at most."""
    context = store.manifest.origin.context
    size, window = context.get("tokens_per_sample"), context.get("context_window")
    return size + window if isinstance(size, int) and isinstance(window, int) else None


def named_documents(
    store: Datastore,
    names: Sequence[str],
    symbols: Sequence[str],
    spell: Callable[[Sequence[int]], str] | None = None,
) -> list[Part]:
    """The documents of these names.

    Args:
        store: the datastore, with its values.
        names: as ``explain`` shows them, or the whole first lines.
        symbols: its dictionary.
        spell: writes tokens as text; by the dictionary alone where left out.

    Raises:
        DatastoreError: where the dictionary is another, it is not known where documents begin, no
            document has such a name, or several have.
    """
    if not names:
        return []
    check_dictionary(store, symbols)
    documents = read_documents(store)
    if documents is None:
        raise DatastoreError(
            f"nothing says where the documents of {store.path} begin",
            expected="documents.npz",
            found="none",
            do=f"find them: fairseq-knnlm verify --dstore {store.path} --documents",
        )
    spell, numbers = spell or line_spelling(symbols), range(len(documents))
    lines = [spell(first_line(store, documents, number).tolist()).strip() for number in numbers]
    known = [shown_name(line) for line in lines]
    parts = []
    for name in names:
        found = [number for number in numbers if name.strip() in (lines[number], known[number])]
        places = [documents.extent(number) for number in found]
        if len(places) != 1:
            raise _not_one(store.path, name, places, known)
        parts.append(Part(*places[0], known[found[0]]))
    return parts


def _not_one(
    path: Path, name: str, places: Sequence[Range], known: Iterable[str]
) -> DatastoreError:
    """What a user is told whose name no document has, or several have."""
    if places:
        some = ", ".join(f"{start}:{stop}" for start, stop in places[:LISTED])
        more = f" and {len(places) - LISTED:,} more" if len(places) > LISTED else ""
        return DatastoreError(
            f"{len(places):,} documents of {path} are named {name!r}",
            expected="a name that one document has",
            found=f"rows {some}{more}",
            do="name the rows that are meant: --rows A:B",
        )
    names = sorted({one for one in known if one})
    near = [one for one in names if name.casefold() in one.casefold()][:LISTED]
    near = near or get_close_matches(name, names, LISTED, 0.5)
    return DatastoreError(
        f"no document of {path} is named {name!r}",
        expected="the first line of a document, as `fairseq-knnlm explain` shows it",
        found=f"{len(names):,} others; the nearest are {', '.join(map(repr, near))}"
        if near
        else f"{len(names):,} others, none like it",
        do="name one of them, or its rows: --rows A:B",
    )


@dataclass(frozen=True)
class Compacted:
    """What was written anew, and what was removed.

    Attributes:
        blocks: that were written anew.
        removed: files and folders that were of no use any more.
    """

    blocks: int
    removed: Sequence[Path]


def compact_store(path: Path) -> Compacted:
    """Writes blocks anew without what was forgotten, and removes what else may hold it.

    Entries, their values and their neighbours stay what they are. Of what lies beside the blocks,
    n-gram counts and an index go that are of the datastore as it was before.

    Args:
        path: the datastore's folder.

    Raises:
        BusyError: where another process is changing it, or building its index.
        DatastoreError: where there is none, a block is damaged, or the disk cannot hold it.
    """
    with claimed(path), Claim(outline(path).index_path.resolve()):
        before = {block.path for block in outline(path).blocks}
        compact(path, _take_index)
        store = outline(path)
        removed = list(_remove_outdated(store)) if store.blocks else []
        return Compacted(len({block.path for block in store.blocks} - before), removed)


def _take_index(store: Datastore, other: Datastore) -> None:
    try:
        copy_pieces(store, other)
    except IndexFileError as error:
        logger.warning("%s; the index has to be built again", str(error).splitlines()[0])


def _remove_outdated(store: Datastore) -> Iterator[Path]:
    """What holds entries, or n-grams, of a datastore before it was changed."""
    seals = {block.fingerprint for block in store.blocks}
    for path, look in ((store.index_path, _indexed), (store.ngram_path, counted_from)):
        try:
            if path.is_file() and look(path) in set(store.manifest.before) - seals:
                with Claim(path.resolve()):
                    path.unlink()
                yield path
        except (IndexFileError, NGramError):
            continue  # `verify` tells more
    snapshots = store.index_path.with_name(f".{store.index_path.name}.building")
    if snapshots.exists():
        shutil.rmtree(snapshots)
        yield snapshots


def _indexed(path: Path) -> str:
    """The fingerprint of the datastore whose entries the file of an index holds."""
    card = read_card(path)
    return "" if card is None or card.in_pieces else card.datastore
