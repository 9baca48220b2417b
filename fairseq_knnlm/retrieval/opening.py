"""From a datastore and the file of its index to a retriever, once they are known to fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.index.card import read_card
from fairseq_knnlm.index.device import gpu_of_torch_alone
from fairseq_knnlm.index.exact import ExactSearch
from fairseq_knnlm.index.search import SearchIndex
from fairseq_knnlm.index.storage import load
from fairseq_knnlm.retrieval.local import LocalRetriever


def open_retriever(
    store: Datastore,
    k: int,
    *,
    index: Path | None = None,
    probe: int | None = None,
    device: str = "auto",
    mapped: bool = False,
    similarity: str = "auto",
    metric: str = "auto",
) -> LocalRetriever:
    """Opens the index of a datastore.

    Args:
        store: the datastore.
        k: neighbours that a query will ask for.
        index: its file; in the datastore where left out.
        probe: inverted lists visited a query; as the index was built where left out.
        device: where to search: auto, cpu, cuda or cuda:i,j.
        mapped: map the index's codes instead of reading them into memory.
        similarity: as ``LocalRetriever`` has it; ``"auto"`` recomputes L2 unless the index loses
            less than a tenth of the neighbours in its lists, or the keys are not loaded.
        metric: that the index must have, ``"l2"`` or ``"ip"``; ``"auto"`` for any.

    Raises:
        ConfigError: where k exceeds the datastore, or the index has another metric or fewer lists.
        IndexFileError: where the index is missing, damaged, or of another datastore.
    """
    check_k(k, len(store))
    found = _open_index(store, k, index, probe, device, mapped)
    return retriever_over(found, store, similarity=similarity, metric=metric)


def retriever_over(
    index: Any,
    store: Datastore,
    *,
    similarity: str = "auto",
    metric: str = "auto",
    kind: type[LocalRetriever] = LocalRetriever,
) -> LocalRetriever:
    """A retriever over an index that is open, wherever its entries lie.

    Args:
        index: of the datastore, as ``kind`` takes it.
        store, similarity, metric: as for ``open_retriever``.
        kind: of retriever.

    Raises:
        ConfigError: where the index has another metric.
    """
    check_metric(metric, index.card.metric)
    if similarity == "auto":
        settled = index.card.faithful or store.keys is None or index.card.metric == "ip"
        similarity = "do_not_recomp_l2" if settled else "l2"
    return kind(index, store, similarity)


def _open_index(
    store: Datastore, k: int, index: Path | None, probe: int | None, device: str, mapped: bool
) -> SearchIndex | ExactSearch:
    path, foreign = index or store.index_path, index is not None
    options: dict[str, Any] = {
        "datastore": store.fingerprint,
        "rows": len(store),
        "width": store.manifest.width,
        "blocks": store.blocks,
        "nprobe": probe,
        "k": k,
        "foreign": foreign,
    }
    gpu = gpu_of_torch_alone(device)
    card = read_card(path, foreign=foreign)
    if gpu and card is not None and card.exact and store.keys is not None:
        checked = load(path, mapped=not card.in_pieces, **options)
        return ExactSearch(store.keys, checked.card, gpu)
    return load(path, device=device, mapped=mapped, **options)


def check_k(k: int, rows: int) -> None:
    """Refuses to ask for more neighbours than there are.

    Raises:
        ConfigError: where ``k`` exceeds ``rows``.
    """
    if k > rows:
        raise ConfigError(
            "--k exceeds the datastore",
            expected=f"at most {rows:,}, its entries",
            found=f"{k:,}",
            do=f"pass --k {rows} or less",
        )


def check_metric(asked: str, metric: str) -> None:
    """Refuses a ``--faiss-metric-type`` that the index was not built with.

    Raises:
        ConfigError: where it is given and differs.
    """
    if asked not in ("auto", metric):
        raise ConfigError(
            "--faiss-metric-type is not the index's",
            expected=metric,
            found=asked,
            do="leave it out, or build the index with --metric " + asked,
        )
