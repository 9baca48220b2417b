"""Makes a datastore smaller: principal components of its keys, greedy merging of its entries.

Both after He et al., 2021, "Efficient nearest neighbor language models" (dimension reduction,
datastore pruning). The result is a datastore of its own; the one it is made of stays as it was.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fairseq_knnlm.bounds import check_seed
from fairseq_knnlm.datastore import (
    Compression,
    Datastore,
    DatastoreWriter,
    Rows,
    check_finite,
    check_new,
    check_room,
    outline,
    read_documents,
    write_documents,
)
from fairseq_knnlm.errors import ConfigError, IndexFileError
from fairseq_knnlm.files import Claim, check_mapped, partial_prefix, reserve
from fairseq_knnlm.index.pca import principal_components
from fairseq_knnlm.index.search import SearchIndex
from fairseq_knnlm.index.storage import load as load_index

logger = logging.getLogger(__name__)

#: Keys that are read, searched or projected at a time: 64 MiB of float32 at a width of 1,024.
ROWS_AT_A_TIME = 16_384
#: Keys that decide the principal components; 256 for each of 1,024 dimensions.
PCA_ROWS = 262_144


def compress(
    store: Datastore,
    out: Path,
    *,
    pca: int | None = None,
    merge: int | None = None,
    index: Path | None = None,
    seed: int = 0,
) -> Path:
    """Writes a smaller datastore.

    A datastore that was compressed already can be compressed again: projections are multiplied,
    and an entry that others were merged into is not merged itself.

    Args:
        store: with keys.
        out: the folder to make; must not exist.
        pca: principal components to keep, P; None for the keys as they are.
        merge: nearest neighbours that each entry is offered to merge with, K; None for none.
        index: the datastore's index, where ``merge`` looks for them, if not its own.
        seed: of samples, rotation and order.

    Raises:
        ConfigError: where there is nothing to do, ``pca``, ``merge`` or ``seed`` do not fit, or
            ``out`` lies in the datastore.
        IndexFileError: where ``merge`` finds no index, or one of another datastore or metric.
        DatastoreError: where the datastore has no keys, or one that is no number, where what it
            says of its documents is damaged, ``out`` exists, or the disk is too small.
    """
    _check(store, pca, merge)
    check_seed(seed)
    _check_apart(store, out)
    check_new(out)
    with Claim(out):  # from the first minute on
        return _compress(store, out, pca, merge, index, seed)


def _compress(
    store: Datastore, out: Path, pca: int | None, merge: int | None, index: Path | None, seed: int
) -> Path:
    keys = store.full_keys()
    weights = store.weights
    if merge is None and len(store.breaks) > 1:
        logger.warning(
            "%s holds %d texts, which the compressed datastore takes for one: pointers and n-grams "
            "go from one to the next there",
            *(store.path, len(store.breaks)),
        )
    documents = None if merge is not None or weights is not None else read_documents(store)
    if merge is not None:
        weights = merged_weights(store, _open_index(store, index, merge), merge, out, seed)
    rows = np.arange(len(store)) if weights is None else np.flatnonzero(weights)
    projection = None if pca is None else fit_pca(keys, pca, seed)
    manifest = store.manifest
    step = Compression(store.fingerprint, len(store), manifest.width, pca, merge, seed)
    writer = DatastoreWriter(
        out,
        len(rows),
        pca or manifest.width,
        manifest.origin,
        manifest.key_dtype,
        compressions=[*manifest.compressions, step],
        projection=_chained(store.projection, projection),
        weights=None if weights is None else weights[rows],
    )
    for at in _chunks(len(rows), "writing"):
        check_mapped(keys, "keys")
        chunk = keys[rows[at]]
        if projection is not None:
            chunk = chunk.astype(np.float32, copy=False) @ projection
        writer.write(np.arange(at.start, at.stop), chunk, store.values[rows[at]])
    if documents is None:
        return writer.publish()
    return writer.publish(lambda folder, _: write_documents(outline(folder), documents))


def fit_pca(keys: Rows, components: int, seed: int) -> np.ndarray:
    """The directions in which keys vary most, turned at random.

    The rotation spreads the variance over all columns, which product codes like better. The mean
    is not taken off, since distances do not see it.

    Args:
        keys: (N, D), of which a sample of ``PCA_ROWS`` decides, held in memory as float32.
        components: P, at most D.
        seed: of sample and rotation.

    Returns:
        (D, P) float32 with orthonormal columns; ``keys @ projection`` are the new keys.

    Raises:
        DatastoreError: where a key of the sample is no number.
    """
    rng = np.random.default_rng(seed)
    drawn = np.sort(rng.choice(len(keys), min(PCA_ROWS, len(keys)), replace=False))
    sample = np.empty((len(drawn), keys.shape[1]), np.float32)
    for at in _chunks(len(drawn), "reading keys"):
        check_mapped(keys, "keys")
        sample[at] = keys[drawn[at]]
    check_finite(sample)
    directions = principal_components(sample, components)
    rotation, _ = np.linalg.qr(rng.normal(size=(components, components)))
    return (directions @ rotation).astype(np.float32)


def merged_weights(
    store: Datastore, index: SearchIndex, k: int, out: Path, seed: int
) -> np.ndarray:
    """The weights of a datastore's entries after greedy merging.

    Args:
        store: with keys.
        index: of that datastore.
        k: nearest neighbours of an entry that it may absorb.
        out: what will be written; beside it the neighbours' rows are kept meanwhile.
        seed: of the order in which entries are visited.

    Returns:
        (N,) int32, 0 for those that were merged into another.
    """
    rows = len(store)
    weights = np.ones(rows, np.int32) if store.weights is None else np.array(store.weights)
    row_type = np.dtype(np.int32 if rows <= np.iinfo(np.int32).max else np.int64)
    with (
        Claim(out),
        tempfile.NamedTemporaryFile(dir=out.parent, prefix=partial_prefix(out)) as file,
    ):
        check_room(out.parent, rows * (k + 1) * row_type.itemsize)
        reserve(Path(file.name), rows * (k + 1) * row_type.itemsize)
        alike = np.memmap(file, row_type, "r+", shape=(rows, k + 1))
        visited = np.zeros(rows, bool)  # entries that have nobody to absorb need no visit
        for at in _chunks(rows, "searching"):
            alike[at] = alike_neighbours(store, index, k, at)
            visited[at] = (alike[at] >= 0).any(axis=1)
        order = np.random.default_rng(seed).permutation(np.flatnonzero(visited))
        greedy_merge(alike, order, weights)
    return weights


def alike_neighbours(store: Datastore, index: SearchIndex, k: int, at: slice) -> np.ndarray:
    """Rows of those of the k nearest neighbours that have the entry's own value.

    Args:
        store: with keys.
        index: of that datastore.
        k: neighbours of an entry, itself not counted.
        at: the entries, n of them.

    Returns:
        (n, k + 1) int64, -1 in the other places.
    """
    check_mapped(store.full_keys(), "keys")
    keys = np.ascontiguousarray(store.full_keys()[at], dtype=np.float32)
    ids = index.search(torch.from_numpy(keys), k + 1)[1].numpy()
    own = ids == np.arange(at.start, at.stop)[:, None]
    own[:, -1] |= ~own.any(axis=1)  # not found itself, so the last is one too many
    same = store.values[ids] == store.values[at][:, None]
    return np.where((ids >= 0) & ~own & same, ids, -1)


def greedy_merge(alike: np.ndarray, order: np.ndarray, weights: np.ndarray) -> None:
    """Lets each entry in turn absorb its neighbours that nobody has absorbed yet.

    He et al., 2021: an entry that is still there takes over the neighbours of its value that are
    still there and stand for one entry only.

    Args:
        alike: (N, K) rows of neighbours with the entry's own value; -1 for none.
        order: (n,) entries, in the order in which they are visited.
        weights: (N,) int32, entries that each stands for; changed in place, 0 where absorbed.
    """
    weight = weights.data  # whose numbers are at hand sooner than the array's
    with tqdm(total=len(order), desc="merging", unit=" entries", unit_scale=True) as bar:
        for some in np.split(order, range(ROWS_AT_A_TIME, len(order), ROWS_AT_A_TIME)):
            for entry, neighbours in zip(some.tolist(), alike[some].tolist(), strict=True):
                if not weight[entry]:
                    continue
                for other in neighbours:
                    if other >= 0 and weight[other] == 1:
                        weight[entry] += 1
                        weight[other] = 0
            bar.update(len(some))


def _check(store: Datastore, pca: int | None, merge: int | None) -> None:
    if pca is None and merge is None:
        raise ConfigError(
            "nothing says how to compress",
            expected="--pca P, --merge K or both",
            found="neither",
        )
    width = store.manifest.width
    most = min(width, len(store))  # so many keys span no more dimensions
    if pca is not None and not 1 <= pca <= most:
        raise ConfigError(
            "--pca counts dimensions that are kept",
            expected=f"1 to {most:,}, the {'width' if most == width else 'number'} of the keys",
            found=pca,
        )
    if merge is not None and not 1 <= merge < len(store):
        raise ConfigError(
            "--merge counts neighbours",
            expected=f"1 to {len(store) - 1:,}, the other entries",
            found=merge,
        )


def _check_apart(store: Datastore, out: Path) -> None:
    if out.resolve().is_relative_to(store.path.resolve()):
        raise ConfigError(
            "--out lies in the datastore that is compressed",
            expected="a new folder beside it, or elsewhere",
            found=out,
        )


def _open_index(store: Datastore, index: Path | None, k: int) -> SearchIndex:
    path = index or store.index_path
    if not path.is_file():
        raise IndexFileError(
            "--merge looks for neighbours in the datastore's index",
            expected=f"an index at {path}",
            found="nothing",
            do=f"build it: fairseq-knnlm build-index --dstore {store.path}",
        )
    found = load_index(
        path,
        datastore=store.fingerprint,
        rows=len(store),
        width=store.manifest.width,
        blocks=store.blocks,
        device="auto",
        k=k + 1,
        foreign=index is not None,
    )
    if found.card.metric != "l2":
        raise IndexFileError(
            "--merge takes an index that compares distances",
            expected="--metric l2",
            found=f"--metric {found.card.metric}",
            do="build one beside it: fairseq-knnlm build-index --indexfile FILE",
        )
    return found


def _chained(first: np.ndarray | None, then: np.ndarray | None) -> np.ndarray | None:
    """The projection that does one after the other."""
    if first is None or then is None:
        return then if first is None else first
    return first @ then


def _chunks(rows: int, what: str) -> Iterator[slice]:
    """Slices that cover the rows in order, with a bar."""
    with tqdm(total=rows, desc=what, unit=" keys", unit_scale=True) as bar:
        for start in range(0, rows, ROWS_AT_A_TIME):
            stop = min(start + ROWS_AT_A_TIME, rows)
            yield slice(start, stop)
            bar.update(stop - start)
