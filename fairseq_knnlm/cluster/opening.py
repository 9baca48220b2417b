"""From a datastore and a Ray to its index in shards, once they are known to fit."""

from __future__ import annotations

import logging

from msgspec.structs import replace

from fairseq_knnlm.cluster.actors import machines, start
from fairseq_knnlm.cluster.connect import LOCAL, connect
from fairseq_knnlm.cluster.search import ShardedIndex
from fairseq_knnlm.cluster.shard import parts_of
from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.index.card import IndexCard, read_card
from fairseq_knnlm.index.pieces import training_in
from fairseq_knnlm.index.storage import checked_nprobe
from fairseq_knnlm.index.trained import read_trained

logger = logging.getLogger(__name__)


def open_sharded(
    store: Datastore,
    address: str,
    *,
    shards: int | None = None,
    replicas: int | None = None,
    probe: int | None = None,
    threads: int = 0,
) -> ShardedIndex:
    """Opens the index of a datastore in shards.

    Args:
        store: in blocks, with an index in pieces, in a folder that all machines see.
        address: as for ``connect``.
        shards: in how many; one for each machine, at most one for each block, where left out.
        replicas: copies of each; one where left out.
        probe: inverted lists visited a query; as the index was built where left out.
        threads: of FAISS in each shard; 0 for an equal share of its machine's cores.

    Raises:
        ConfigError: where the datastore or its index cannot be cut so often, or nprobe exceeds the
            lists.
        KnnlmError: where there is no such Ray, or a shard cannot be loaded.
        IndexFileError: where the index is missing or damaged.
    """
    card = card_in_pieces(store)
    check_shards(store, shards)
    trained = read_trained(store.index_path)
    training = training_in(store.index_path, card.bytes)
    card = replace(card, rows=len(store))
    if probe is not None:
        card = replace(card, nprobe=checked_nprobe(trained, probe))
    connect(address)
    count = shards or min(len(machines()) or 1, len(store.blocks))
    parts = parts_of(store, training, count)
    copies = replicas or 1
    found = start(parts, copies, threads=threads)
    logger.info(
        "%s is searched in %d shards of %s, %d of each",
        store.path,
        count,
        "a Ray of this process" if address == LOCAL else f"the Ray at {address}",
        copies,
    )
    return ShardedIndex(trained, card, found, [part.rows for part in parts])


def card_in_pieces(store: Datastore) -> IndexCard:
    """The card of a datastore's index.

    Raises:
        ConfigError: where datastore or index cannot be cut into shards.
        IndexFileError: where the index is missing or damaged.
    """
    if not store.blocks:
        raise ConfigError(
            f"{store.path} is one block, which shards cannot share",
            expected="a datastore of several blocks",
            found=f"{len(store):,} entries in one",
            do="leave --knn-ray out, or save it with a smaller --block-rows",
        )
    card = read_card(store.index_path)
    if card is None or not card.in_pieces:
        raise ConfigError(
            f"the index of {store.path} cannot be cut into shards",
            expected="an index in pieces, one in each block",
            found=card.factory if card else "another program's",
            do="build one of inverted lists or codes in a row, such as --recipe auto",
        )
    return card


def check_shards(store: Datastore, shards: int | None) -> None:
    """Refuses more shards than there are blocks.

    Raises:
        ConfigError: where ``shards`` exceeds them.
    """
    if shards is not None and shards > len(store.blocks):
        raise ConfigError(
            "--knn-shards exceeds the blocks of the datastore",
            expected=f"at most {len(store.blocks)}, its blocks",
            found=shards,
            do=f"pass --knn-shards {len(store.blocks)} or less, or save it with a smaller "
            "--block-rows",
        )
