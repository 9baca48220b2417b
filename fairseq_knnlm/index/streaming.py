"""An index of keys that are never stored: trained on a sample, and a piece made of each block."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from fairseq_knnlm.datastore import Block, Stretch, check_finite
from fairseq_knnlm.index.build import CHUNK_BYTES, IndexBuilder
from fairseq_knnlm.index.card import IndexCard
from fairseq_knnlm.index.codes import encode
from fairseq_knnlm.index.library import faiss
from fairseq_knnlm.index.pieces import training_of, write_piece


def train_for_pieces(
    builder: IndexBuilder, sample: np.ndarray, rows: np.ndarray
) -> tuple[Any, IndexCard]:
    """Trains an index whose entries will lie in pieces, and measures it on the sample.

    Of the k nearest of all N keys a sample of n holds about k n / N, drawn evenly from them. So
    the share of these that the lists hold tells that of the k nearest, without another look at the
    keys.

    Args:
        builder: of the index; its options ask for neighbours of ``k`` among all its rows.
        sample: (n, D) float32, keys drawn evenly from all.
        rows: (n,) int64, which ones.

    Returns:
        The trained, empty index, and its card.
    """
    asked, all_rows = builder.options, builder.rows
    k = min(asked.k, all_rows - 1)
    builder.options = dataclasses.replace(asked, k=max(1, round(k * len(sample) / all_rows)))
    builder.rows = len(sample)
    builder.train(sample, rows)
    empty = faiss.deserialize_index(faiss.serialize_index(builder.index))
    builder.see(sample, rows)
    builder.add(sample, rows)
    _, card = builder.finish()
    measured = {"recall_at": k} if card.recall is not None else {}
    return empty, replace(card, rows=all_rows, piece_bytes=empty.sa_code_size(), **measured)


class PieceStream:
    """The piece of one block, of keys that come in the order of its rows.

    Args:
        index: trained and empty.
    """

    def __init__(self, index: Any) -> None:
        self._index = index
        # As where a piece is made of stored keys: the last digits depend on how many are encoded
        # at a time.
        self._at_a_time = max(1, CHUNK_BYTES // (index.d * 4))
        self._waiting: list[np.ndarray] = []
        self._codes: list[np.ndarray] = []

    def add(self, keys: np.ndarray) -> None:
        """Takes the next keys (n, D).

        Raises:
            DatastoreError: where one is no number.
        """
        check_finite(keys)
        self._waiting.append(np.ascontiguousarray(keys, dtype=np.float32))
        while sum(map(len, self._waiting)) >= self._at_a_time:
            keys = np.concatenate(self._waiting)
            self._waiting = [keys[self._at_a_time :]]
            self._codes.append(encode(self._index, keys[: self._at_a_time]))

    def codes(self) -> np.ndarray:
        """(rows, S) uint8, once all keys have come."""
        if any(map(len, self._waiting)):
            self._codes.append(encode(self._index, np.concatenate(self._waiting)))
            self._waiting = []
        return np.concatenate(self._codes)

    def write(self, folder: Path, fingerprint: str) -> Path:
        """Writes the piece into the folder of its block, once all keys have come."""
        codes = self.codes()
        block = Block(folder, 0, Stretch(folder.name, len(codes), fingerprint))
        width = self._index.sa_code_size()
        return write_piece(block, training_of(self._index), width, [codes])
