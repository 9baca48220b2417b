"""An index on the disk: written with its card, read once it is known to be as it was written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from msgspec.structs import replace

from fairseq_knnlm.datastore import Block
from fairseq_knnlm.errors import ConfigError, IndexFileError
from fairseq_knnlm.files import checksums, publish
from fairseq_knnlm.index.card import (
    BUILD,
    IndexCard,
    card_path,
    damaged,
    of_another,
    read_card,
    trailer,
)
from fairseq_knnlm.index.codes import assemble
from fairseq_knnlm.index.device import place
from fairseq_knnlm.index.foreign import foreign_card
from fairseq_knnlm.index.library import (
    METRICS,
    faiss,
    has_lists,
    innermost,
    is_exact,
    keep_freed_memory,
)
from fairseq_knnlm.index.pieces import pieces_of, training_in
from fairseq_knnlm.index.search import SearchIndex
from fairseq_knnlm.index.trained import check_bytes, read_file, read_trained

T = TypeVar("T")


def save(index: Any, card: IndexCard, path: Path, datastore: str) -> IndexCard:
    """Writes an index and its card as one file, atomically.

    Args:
        index: a FAISS index in the CPU's memory.
        card: from ``build``.
        path: the index file.
        datastore: fingerprint of the datastore it was built of.

    Raises:
        OSError: where the disk is full, or cannot be written to; what was there stays.
    """
    with publish(path) as temporary:
        write_file(index, temporary)
        card = replace(
            card,
            datastore=datastore,
            bytes=temporary.stat().st_size,
            chunks=tuple(checksums(temporary)),
        )
        with temporary.open("ab") as file:
            file.write(trailer(card))
    beside = card_path(path)
    if beside.is_file() or beside.is_symlink():
        beside.unlink()  # of the index that was there before
    return card


def write_file(index: Any, path: Path) -> None:
    """Writes a FAISS index that is in the CPU's memory.

    By way of Python, since FAISS itself passes over what fails at the end of a file.

    Raises:
        OSError: where that fails.
    """
    with path.open("wb", buffering=0) as file:

        def write(some: Any) -> None:
            left = memoryview(some)
            while left:
                left = left[file.write(left) :]

        # Its type stubs leave this class out.
        writer: Any = faiss.PyCallbackIOWriter(write, 2**20)  # type: ignore[attr-defined]
        faiss.write_index(index, writer)


def load(
    path: Path,
    *,
    datastore: str,
    rows: int,
    width: int,
    blocks: Sequence[Block] = (),
    device: str = "cpu",
    nprobe: int | None = None,
    k: int = 1,
    mapped: bool = False,
    foreign: bool = False,
    everything: bool = False,
) -> SearchIndex:
    """Reads an index, checks that it belongs to the datastore, and places it.

    Args:
        path: the index file.
        datastore: fingerprint of the datastore.
        rows: its entries.
        width: its keys' dimensions.
        blocks: its blocks, in which the pieces of an index in pieces lie.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:0,1``.
        nprobe: lists visited a query, where not the card's.
        k: neighbours that will be asked for.
        mapped: leave the keys' codes in the file, mapped, so that they take no memory of their own.
        foreign: take an index without a card too, checked for what can be.
        everything: compare all bytes, also of a large file.

    Raises:
        IndexFileError: where it or a piece is missing, damaged, without its card, of another
            datastore, or cannot be mapped or searched on the device.
        ConfigError: where the device does not exist, or nprobe exceeds the lists.
    """

    def read() -> tuple[Any, IndexCard]:
        card = read_card(path, foreign=foreign)
        if card is None:
            card = foreign_card(path, rows, width)
        elif card.in_pieces:
            index = _assembled(path, card, blocks, everything=everything, mapped=mapped)
            card = replace(card, rows=index.ntotal)
        else:
            seals = {datastore, *(block.fingerprint for block in blocks if _is_all(block, rows))}
            _check_file(path, card, seals, everything=everything)
        if not card.in_pieces:
            index = _map_file(path, card.exact) if mapped else read_file(path)
        if index.ntotal != rows or index.d != width:
            raise of_another(path, rows, width, index.ntotal, index.d)
        if card.datastore:  # one of ours
            _check_card(path, card, index)
        return index, card

    index, card = _settled(path, read)
    if nprobe is not None:
        card = replace(card, nprobe=checked_nprobe(index, nprobe))
    keep_freed_memory()
    return place(index, card, device, k)


def _settled(path: Path, read: Callable[[], T]) -> T:
    """What ``read`` makes of a file that nobody replaced meanwhile."""
    while True:
        before = _identity(path)
        try:
            found = read()
        except (IndexFileError, FileNotFoundError):  # a piece of the index of before may be gone
            if _identity(path) == before:
                raise
            continue
        if _identity(path) == before:
            return found


def _identity(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _is_all(block: Block, rows: int) -> bool:
    """Whether a block is all of a datastore, as where that was flat a moment ago."""
    return block.rows == rows == block.stop


def _check_file(
    path: Path, card: IndexCard, datastores: Collection[str], *, everything: bool
) -> None:
    if card.datastore not in datastores:
        raise IndexFileError(
            f"{path} is an index of another datastore",
            expected=" or ".join(f"datastore {one[:12]}..." for one in sorted(datastores)),
            found=f"datastore {card.datastore[:12]}...",
            do=BUILD,
        )
    check_bytes(path, card, everything=everything)


def read_whole(path: Path, card: IndexCard, datastore: str) -> Any:
    """An index with all its entries, which lie in its file.

    Raises:
        IndexFileError: where it is damaged, or of another datastore than that of this fingerprint.
    """
    _check_file(path, card, [datastore], everything=False)
    return read_file(path)


def _assembled(
    path: Path, card: IndexCard, blocks: Sequence[Block], *, everything: bool, mapped: bool
) -> Any:
    """The index whose entries lie in pieces, in memory."""
    if not blocks:
        raise IndexFileError(
            f"{path} holds no entries: they lie in pieces, in the blocks of its own datastore",
            expected="an index in one file, or the datastore that this one was built in",
            found="a datastore without blocks",
            do="build an index of this datastore",
        )
    if mapped:
        raise IndexFileError(
            f"{path} cannot be mapped: its entries lie in pieces, which memory puts together",
            expected="an index in one file",
            found="--mmap-index",
            do="leave --mmap-index out, or build a whole index outside the datastore, with "
            "--indexfile FILE, and name it so here too",
        )
    index, training = read_trained(path, everything=everything), training_in(path, card.bytes)
    pieces = pieces_of(blocks, training, card.piece_bytes, everything=everything)
    try:
        return assemble(index, pieces)
    except ValueError as error:
        raise damaged(path, "pieces that fit the index", str(error)) from None


def _check_card(path: Path, card: IndexCard, index: Any) -> None:
    """Refuses a card that says of its index what is not so."""
    lists = faiss.extract_index_ivf(index).nlist if has_lists(index) else 0
    metric = METRICS[card.metric]
    for name, said, ok in (
        ("rows", card.rows, card.rows == index.ntotal),
        ("width", card.width, card.width == index.d),
        ("metric", card.metric, index.metric_type == metric),
        ("exact", card.exact, card.exact == is_exact(index)),
        ("nprobe", card.nprobe, min(1, lists) <= card.nprobe <= lists),
    ):
        if not ok:
            raise damaged(path, "a card that fits the index", f"{name} {said}")


def checked_nprobe(index: Any, nprobe: int) -> int:
    """So many lists visited a query; 0 where the index has none.

    Raises:
        ConfigError: where there are fewer.
    """
    if not has_lists(index):
        return 0
    lists = faiss.extract_index_ivf(index).nlist
    if not 1 <= nprobe <= lists:
        raise ConfigError(
            "--probe does not fit the index",
            expected=f"1 to {lists:,}, its inverted lists",
            found=nprobe,
            do="leave --probe out to use the value chosen when the index was built",
        )
    return nprobe


def _map_file(path: Path, exact: bool) -> Any:
    """An index whose codes stay in the file; ``exact`` where its card says that it is."""
    if exact:
        return read_file(path, faiss.IO_FLAG_MMAP_IFC)
    index = read_file(path, faiss.IO_FLAG_MMAP)
    lists: Any = faiss.extract_index_ivf(index).invlists if has_lists(index) else None
    if not isinstance(lists and faiss.downcast_InvertedLists(lists), faiss.OnDiskInvertedLists):
        raise IndexFileError(
            f"{path} cannot be mapped",
            expected="an index whose codes lie in the file as they are searched: Flat, or IVF..,PQ "
            "of 8 bits, such as --recipe paper",
            found=type(innermost(index)).__name__,
            do="leave --mmap-index out, or build another index",
        )
    return index
