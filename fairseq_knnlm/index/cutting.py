"""An index goes along where the blocks of its datastore change, without being built again."""

from __future__ import annotations

from msgspec.structs import replace

from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.files import Claim
from fairseq_knnlm.index.card import damaged, read_card
from fairseq_knnlm.index.codes import can_be_cut, codes_of
from fairseq_knnlm.index.pieces import open_piece, training_in, training_of, write_piece
from fairseq_knnlm.index.storage import read_whole, save


def cut_index(store: Datastore) -> bool:
    """Makes a block's piece of the whole index that a datastore had while it was flat.

    The same entries are found as before, at the same distances, and no key is read. Where the index
    lies in pieces already, or there is none, nothing is done.

    Args:
        store: in blocks, of which one was the datastore itself, or its outline.

    Returns:
        False where the index is of no use any more: it holds more than codes, as a graph does, or
        is of another datastore. It is left as it is then.

    Raises:
        BusyError: where another process is building it.
        IndexFileError: where it is damaged.
        OSError: where the piece cannot be written; the index is as it was then.
    """
    path = store.index_path
    if not path.exists():
        return True
    with Claim(path.resolve()):
        card = read_card(path)
        if card is None or card.in_pieces:
            return True
        was = [block for block in store.blocks if block.fingerprint == card.datastore]
        if not was:
            return False
        (block,) = was
        index = read_whole(path, card, block.fingerprint)
        if not can_be_cut(index):
            return False
        try:
            codes = codes_of(index, block.rows)
        except ValueError as error:
            raise damaged(path, f"the entries of {block.path}", str(error)) from None
        index.reset()
        write_piece(block, training_of(index), codes.shape[1], [codes])
        save(index, replace(card, piece_bytes=codes.shape[1]), path, store.fingerprint)
        return True


def copy_pieces(store: Datastore, other: Datastore) -> None:
    """Gives blocks that were written anew the pieces of those whose place they take.

    Args:
        store: in blocks, or its outline.
        other: the same entries; each of its blocks is the one at that place, or of those of its
            rows that count.

    Raises:
        IndexFileError: where the index or a piece is missing or damaged.
        OSError: where a piece cannot be written.
    """
    path = store.index_path
    card = read_card(path) if path.exists() else None
    if card is None or not card.in_pieces:
        return
    training, width = training_in(path, card.bytes), card.piece_bytes
    for block, new in zip(store.blocks, other.blocks, strict=True):
        if new.path != block.path:
            codes = open_piece(block, training, width)
            write_piece(new, training, width, (codes[start:stop] for start, stop in block.kept))
