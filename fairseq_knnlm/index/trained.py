"""FAISS's bytes in a file, read once they are known to be as they were written; without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fairseq_knnlm.files import altered
from fairseq_knnlm.index.card import IndexCard, damaged, read_card
from fairseq_knnlm.index.codes import can_be_cut
from fairseq_knnlm.index.library import faiss, innermost
from fairseq_knnlm.index.trial import reason


def check_bytes(path: Path, card: IndexCard, *, everything: bool) -> None:
    """Refuses the file of an index that is not as it was written.

    Raises:
        IndexFileError: where its checksums are others than its card's.
    """
    if altered(path, card.chunks, everything=everything, size=card.bytes):
        raise damaged(path, "the bytes that were written", "other ones (checksums differ)")


def read_trained(path: Path, *, everything: bool = False) -> Any:
    """The trained, empty part of an index in pieces; None where the index is in one file.

    Raises:
        IndexFileError: where it is missing or damaged.
    """
    card = read_card(path)
    if card is None or not card.in_pieces:
        return None
    check_bytes(path, card, everything=everything)
    index = read_file(path)
    if not can_be_cut(index) or (index.ntotal, index.sa_code_size()) != (0, card.piece_bytes):
        found = f"{type(innermost(index)).__name__} of {index.ntotal:,} entries"
        raise damaged(path, "an index that was trained, and is empty", found)
    return index


def read_file(path: Path, flags: int = 0) -> Any:
    """Reads a FAISS index, with FAISS's flags for reading.

    Raises:
        IndexFileError: where FAISS cannot.
    """
    try:
        return faiss.read_index(str(path), flags)
    except (RuntimeError, MemoryError) as error:
        raise damaged(path, "an index that FAISS reads", reason(error)) from None
