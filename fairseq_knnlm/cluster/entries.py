"""Values and keys of some blocks, as a shard looks them up for the rows that it finds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fairseq_knnlm.datastore import Block, Datastore, Stacked, key_files, open_datastore
from fairseq_knnlm.datastore.manifest import MANIFEST, damaged
from fairseq_knnlm.files import Checks


class Entries:
    """The entries of blocks that stand one behind another.

    Values are in memory. Keys stay on the disk, and are opened when distances are first asked for.

    Args:
        blocks: of a datastore.

    Raises:
        DatastoreError: where a block is missing, damaged or another.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = blocks
        self._keys: Stacked | None = None
        self._checks = Checks({})
        values = [_opened(block, load_keys=False).values for block in blocks]
        self._values = np.concatenate(_kept(blocks, values))

    def values(self, rows: np.ndarray) -> np.ndarray:
        """The tokens at rows, counted from that of the first block; of the same shape."""
        return self._values[rows]

    def distances(self, queries: np.ndarray, rows: np.ndarray, similarity: str) -> np.ndarray:
        """Distances of queries to keys, to the digit those that ``LocalRetriever`` recomputes.

        Args:
            queries: (N, D) float32, as the keys are.
            rows: (N, k), as for ``values``.
            similarity: ``"l2"`` for squared L2, ``"dot"`` for the negative inner product.

        Returns:
            (N, k) float32; NaN or infinite where a key is.

        Raises:
            DatastoreError: where keys are missing or damaged.
        """
        import torch  # by who asks for this alone: it takes memory, in each shard

        from fairseq_knnlm.index.distances import as_keys, distances_to_rows

        if self._keys is None:
            self._keys = self._open_keys()
        self._checks.check()
        asking, wanted = torch.from_numpy(queries.copy()), torch.from_numpy(rows.astype(np.int64))
        return distances_to_rows(as_keys(self._keys), asking, wanted, similarity).numpy()

    def check_files(self) -> int:
        """Waits until every key was compared with its checksum, where keys were opened.

        Returns:
            How many chunks of their files were left for this when they were opened.

        Raises:
            DatastoreError: where keys are damaged.
        """
        return self._checks.wait()

    def _open_keys(self) -> Stacked:
        stores = [_opened(block) for block in self._blocks]
        files = {file: sums for store in stores for file, sums in key_files(store).items()}
        self._checks = Checks(files)
        keys = [np.asarray(store.full_keys()) for store in stores]
        return Stacked(_kept(self._blocks, keys))


def _opened(block: Block, *, load_keys: bool = True) -> Datastore:
    """A block as a datastore of its own."""
    store = open_datastore(block.path, load_keys=load_keys)
    if store.fingerprint != block.fingerprint:
        raise damaged(
            block.path / MANIFEST,
            f"block {block.fingerprint[:12]}..., as the datastore's manifest says",
            f"block {store.fingerprint[:12]}...",
        )
    return store


def _kept(blocks: Sequence[Block], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What counts of arrays over the rows of blocks, one behind another."""
    pairs = zip(blocks, arrays, strict=True)
    return [array[start:stop] for block, array in pairs for start, stop in block.kept]
