"""Pieces of an index: the codes of a block's entries, in a file of its folder.

An index of a datastore in blocks is trained once. Then each block's piece is made of that block and
the training alone, and never changes, also where blocks are added or entries are forgotten. Its
name tells the training, so that pieces of one training do not disturb those of another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Annotated, Any

import msgspec
import numpy as np
from msgspec.structs import asdict

from fairseq_knnlm.datastore import Block
from fairseq_knnlm.errors import IndexFileError
from fairseq_knnlm.files import (
    Checksum,
    Fingerprint,
    altered,
    checksums,
    chunks_of,
    publish,
    unseal,
)
from fairseq_knnlm.files.arrays import kind_of, read_header
from fairseq_knnlm.index.card import BUILD, damaged
from fairseq_knnlm.index.codes import Part
from fairseq_knnlm.index.library import faiss
from fairseq_knnlm.index.trailer import text_behind, trailing

FORMAT = "fairseq-knnlm piece of an index"
VERSION = 1
#: Bytes of a file that are read at a time.
STEP = 2**24


class PieceCard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a piece is; it lies behind the codes in their file.

    Attributes:
        block: fingerprint of the block.
        training: fingerprint of the trained part of the index.
        rows: entries, all that the block holds.
        bytes: length of what comes before the card, an ``.npy`` of (rows, S) uint8.
        chunks: its checksums.
    """

    block: Fingerprint
    training: Fingerprint
    rows: Annotated[int, msgspec.Meta(ge=1, le=2**48)]
    bytes: Annotated[int, msgspec.Meta(ge=1, le=2**62)]
    chunks: tuple[Checksum, ...]


def training_of(index: Any) -> str:
    """The fingerprint of a training: SHA-256 of what FAISS writes of the trained, empty index."""
    assert index.ntotal == 0, index.ntotal
    return hashlib.sha256(faiss.serialize_index(index).tobytes()).hexdigest()


def training_in(path: Path, size: int) -> str:
    """The same of a file, whose first ``size`` bytes FAISS wrote."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for start in range(0, size, STEP):
            digest.update(file.read(min(STEP, size - start)))
    return digest.hexdigest()


def piece_path(block: Block, training: str) -> Path:
    """Where a block's piece of a training lies."""
    return block.path / f"piece-{training[:16]}.npy"


def write_piece(block: Block, training: str, width: int, codes: Iterable[np.ndarray]) -> Path:
    """Writes a block's piece, atomically.

    Args:
        block: whose folder it is written in.
        training: fingerprint of the trained part.
        width: bytes of a code, S.
        codes: of all rows of the block in their order, each (n, S) uint8.

    Returns:
        The file.

    Raises:
        BusyError: where another process is writing it.
        OSError: where it cannot be written; nothing is left then.
    """
    path = piece_path(block, training)
    with publish(path) as temporary:
        with temporary.open("wb") as file:
            _write_array(file, (block.rows, width), codes)
        size, chunks = temporary.stat().st_size, checksums(temporary)
        card = PieceCard(block.fingerprint, training, block.rows, size, tuple(chunks))
        with temporary.open("ab") as file:
            file.write(trailing(FORMAT, VERSION, asdict(card)))
    return path


def _write_array(file: IO[bytes], shape: tuple[int, int], codes: Iterable[np.ndarray]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    rows = 0
    for some in codes:
        assert some.dtype == np.uint8, some.dtype
        assert some.shape[1] == shape[1], some.shape
        file.write(np.ascontiguousarray(some).data)
        rows += len(some)
    assert rows == shape[0], (rows, shape)


def open_piece(block: Block, training: str, width: int, *, everything: bool = False) -> np.ndarray:
    """A block's piece, mapped, once it is known to be as it was written.

    Args:
        block: whose piece.
        training: fingerprint of the trained part.
        width: bytes of a code, S.
        everything: compare all bytes, also of a large file.

    Returns:
        (rows of the block, S) uint8.

    Raises:
        IndexFileError: where it is missing, damaged, or of another block or training.
    """
    path = piece_path(block, training)
    if (kind := kind_of(path)) != "a file":
        raise IndexFileError(
            f"the block {block.path} has no piece of the index",
            expected=str(path),
            found=kind,
            do=BUILD,
        )
    card = _read_card(path)
    for what, ours, theirs in (
        ("block", block.fingerprint, card.block),
        ("training of the index", training, card.training),
    ):
        if ours != theirs:
            raise IndexFileError(
                f"{path} is a piece of another {what}",
                expected=f"{what} {ours[:12]}...",
                found=f"{what} {theirs[:12]}...",
                do=f"remove it, and {BUILD}",
            )
    if altered(path, card.chunks, everything=everything, size=card.bytes):
        raise damaged(path, "the bytes that were written", "other ones (checksums differ)")
    shape = block.rows, width
    try:
        with path.open("rb") as file:
            found = read_header(file, card.bytes)
            if found != (np.dtype(np.uint8), shape) or card.rows != block.rows:
                raise ValueError(f"{found[1]} {found[0]}, {card.rows:,} rows")
            return np.memmap(path, np.uint8, mode="r", offset=file.tell(), shape=shape)
    except ValueError as error:
        raise damaged(path, f"{shape} uint8", str(error)) from None


def _read_card(path: Path) -> PieceCard:
    try:
        if (behind := text_behind(path)) is None:
            raise ValueError("a file without it")
        card, _ = unseal(behind[0], FORMAT, VERSION, PieceCard)
        if card.bytes != behind[1]:
            raise ValueError(f"one of {card.bytes:,} bytes behind {behind[1]:,}")
        if len(card.chunks) != chunks_of(card.bytes):
            raise ValueError(f"{len(card.chunks):,} checksums for {card.bytes:,} bytes")
        return card
    except ValueError as error:
        raise damaged(path, "the card of a piece of an index, at its end", str(error)) from None


def pieces_of(
    blocks: Sequence[Block], training: str, width: int, *, everything: bool = False
) -> Iterator[Part]:
    """The codes of a datastore's entries, and their rows, in order.

    What was forgotten is left out.

    Args:
        blocks: of the datastore.
        training, width, everything: as for ``open_piece``.

    Yields:
        (n, S) uint8, mapped, and a range of n rows.

    Raises:
        IndexFileError: as ``open_piece`` does.
    """
    for block in blocks:
        codes = open_piece(block, training, width, everything=everything)
        row = block.first
        for start, stop in block.kept:
            yield codes[start:stop], range(row, row + stop - start)
            row += stop - start


def remove_pieces(blocks: Sequence[Block], *, but: str | None = None) -> None:
    """Removes the pieces of all trainings, but of one."""
    for block in blocks:
        kept = piece_path(block, but) if but is not None else None
        for path in block.path.glob("piece-*.npy"):
            if path != kept:
                path.unlink(missing_ok=True)
