"""The index that the blocks of a datastore without keys are streamed into."""

from __future__ import annotations

import logging
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fairseq_knnlm.datastore import INDEX, Block, Stretch, read_manifest
from fairseq_knnlm.errors import BusyError, IndexFileError
from fairseq_knnlm.files import Claim
from fairseq_knnlm.index.build import IndexBuilder
from fairseq_knnlm.index.pieces import open_piece, training_of
from fairseq_knnlm.index.storage import save
from fairseq_knnlm.index.streaming import PieceStream, train_for_pieces
from fairseq_knnlm.index.trained import read_trained

logger = logging.getLogger(__name__)


class Streaming:
    """Trained by whichever process comes first; the others wait for that.

    Args:
        folder: of the datastore in the making.
        making: fingerprint of what is being made.
        builder: of the index; None where that is there, as where a text is added.
    """

    def __init__(self, folder: Path, making: str, builder: IndexBuilder | None) -> None:
        self._path = folder / INDEX
        self._making = making
        self._claim = self._wait()
        #: Of the index that this process is to train; None where it is trained.
        self.builder = builder if self._claim is not None else None

    def _wait(self) -> Claim | None:
        """Returns once the index is there, or with the claim to make it."""
        told = False
        while not self._path.exists():
            try:
                claim = Claim(self._path)
                if not self._path.exists():
                    return claim
                claim.release()
            except BusyError:
                if not told:
                    logger.info("another process trains the index: waiting for it")
                told = True
                time.sleep(0.2)
        return None

    def learn(self, rows: np.ndarray, keys: np.ndarray) -> None:
        """Trains the index on keys (n, D) float32, drawn evenly, of these rows (n,)."""
        assert self.builder is not None and self._claim is not None, self._path
        index, card = train_for_pieces(self.builder, keys, rows)
        save(index, card, self._path, self._making)
        self._claim.release()
        self.builder = None

    @cached_property
    def _index(self) -> Any:
        """Trained and empty."""
        return read_trained(self._path)

    def piece(self) -> PieceStream:
        """Takes the keys of a block."""
        return PieceStream(self._index)

    def is_sound(self, folder: Path) -> bool:
        """Whether a block has its piece, which is as it was written."""
        found, fingerprint = read_manifest(folder)
        block = Block(folder, 0, Stretch(folder.name, found.rows, fingerprint))
        index = self._index
        try:
            open_piece(block, training_of(index), index.sa_code_size(), everything=True)
        except IndexFileError as error:
            logger.warning("making %s again: %s", folder, " ".join(str(error).split()))
            return False
        return True
