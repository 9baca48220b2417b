"""From a datastore and a Ray to its index in shards, once they are known to fit."""

from __future__ import annotations

import logging

from msgspec.structs import replace

from fairseq_knnlm.cluster.actors import machines, start
from fairseq_knnlm.cluster.connect import LOCAL, connect
from fairseq_knnlm.cluster.kept import keep_up, standing
from fairseq_knnlm.cluster.search import ShardedIndex
from fairseq_knnlm.cluster.shard import Part, parts_of
from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.index.card import IndexCard, read_card
from fairseq_knnlm.index.library import keep_freed_memory
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
    card = replace(card_in_pieces(store), rows=len(store))
    check_shards(store, shards)
    trained = read_trained(store.index_path)
    if probe is not None:
        card = replace(card, nprobe=checked_nprobe(trained, probe))
    connect(address)
    keep_freed_memory()  # what is merged is as large as what is found
    parts = cut(store, card, shards)
    where = "a Ray of this process" if address == LOCAL else f"the Ray at {address}"
    if address != LOCAL and (up := standing(parts)) is not None:
        found, held = up
        logger.info(
            "%s is searched in the %d shards that are up in %s", store.path, len(found), where
        )
        return ShardedIndex(trained, card, found, held)
    copies = replicas or 1
    found = start(parts, copies, threads=threads)
    logger.info(
        "%s is searched in %d shards of %s, %d of each", store.path, len(parts), where, copies
    )
    return ShardedIndex(trained, card, found, [part.rows for part in parts])


def cut(store: Datastore, card: IndexCard, shards: int | None) -> list[Part]:
    """What each shard of a datastore holds; this process takes part in a Ray.

    Args:
        store: in blocks.
        card: of its index.
        shards: in how many; one for each machine, at most one for each block, where left out.
    """
    count = shards or min(len(machines()) or 1, len(store.blocks))
    return parts_of(store, training_in(store.index_path, card.bytes), count)


def keep_sharded(store: Datastore, address: str, shards: int | None, replicas: int | None) -> int:
    """Has shards kept up for runs to come.

    Args:
        store, address, shards, replicas: as for ``open_sharded``.

    Returns:
        How many shards.

    Raises:
        KnnlmError: as ``open_sharded`` does, or where the index is up already, cut otherwise.
    """
    card = card_in_pieces(store)
    check_shards(store, shards)
    connect(address)
    return len(keep_up(cut(store, card, shards), replicas or 1))


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
