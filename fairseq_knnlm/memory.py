"""What ``--knnlm`` opens: datastore, index and calibration, checked against each other."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq_knnlm import config
from fairseq_knnlm.calibration import read_calibration
from fairseq_knnlm.datastore import Datastore, open_datastore
from fairseq_knnlm.exact import ExactSearch
from fairseq_knnlm.index import SearchIndex, gpu_of_torch_alone, read_card
from fairseq_knnlm.index import load as load_index
from fairseq_knnlm.legacy import is_legacy, open_legacy
from fairseq_knnlm.lm import dictionary_fingerprint
from fairseq_knnlm.neighbours import Retriever

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Memory:
    """What ``--knnlm`` opened.

    Attributes:
        store: the datastore.
        retriever: index and store, ready to search.
        lmbda: weight of the neighbours.
        temperature: T.
        mixture_from: where the two come from, in words.
    """

    store: Datastore
    retriever: Retriever
    lmbda: float
    temperature: float
    mixture_from: str


def open_memory(args: Any, symbols: Sequence[str]) -> Memory:
    """Opens what the flags name and refuses what does not fit together.

    Args:
        args: the task's flags, checked.
        symbols: the dictionary's symbols, in order.

    Raises:
        KnnlmError: of the kind that fits what is wrong.
    """
    store = _open_store(args, len(symbols))
    store.check_origin(dictionary=dictionary_fingerprint(symbols), key_type=str(args.knn_keytype))
    config.check_k(args.k, len(store))
    index = _open_index(args, store)
    config.check_metric(str(args.faiss_metric_type), index.card.metric)
    similarity = str(args.knn_sim_func)
    if similarity == "auto":
        settled = index.card.faithful or store.keys is None or index.card.metric == "ip"
        similarity = "do_not_recomp_l2" if settled else "l2"
    retriever = Retriever(index, store, similarity)
    return Memory(store, retriever, *_mixture(args, store, retriever))


def _open_store(args: Any, vocabulary: int) -> Datastore:
    path = Path(args.dstore_filename)
    options = {
        "load_keys": not args.no_load_keys,
        "in_memory": args.move_dstore_to_mem,
    }
    if is_legacy(path):
        return open_legacy(
            path, args.dstore_size, fp16=args.dstore_fp16, vocabulary=vocabulary, **options
        )
    store = open_datastore(path, **options)
    config.check_size(args.dstore_size, len(store))
    return store


def _open_index(args: Any, store: Datastore) -> SearchIndex | ExactSearch:
    path = Path(args.indexfile) if args.indexfile else store.index_path
    options: dict[str, Any] = {
        "datastore": store.fingerprint,
        "rows": len(store),
        "width": store.manifest.width,
        "nprobe": args.probe,
        "k": args.k,
    }
    gpu, card = gpu_of_torch_alone(args.knn_device), read_card(path)
    if gpu and card is not None and card.exact and store.keys is not None:
        checked = load_index(path, mapped=True, **options)
        return ExactSearch(store.keys, checked.card, gpu)
    return load_index(path, device=args.knn_device, mapped=args.mmap_index, **options)


def _mixture(args: Any, store: Datastore, retriever: Retriever) -> tuple[float, float, str]:
    """lambda, temperature, and where they come from: flags, else calibration, else defaults."""
    flags = {"lambda": args.lmbda, "temperature": args.knn_temp}
    given = {name: flag for name, flag in flags.items() if flag is not None}
    if len(given) == len(flags):
        return args.lmbda, args.knn_temp, "given"
    calibration = read_calibration(store.calibration_path, store.fingerprint)
    if calibration is not None:
        source = f"calibrated on {calibration.split}"
        fitted = {"lambda": calibration.lmbda, "temperature": calibration.temperature}
        found = (args.k, retriever.index.card.describe(), retriever.distances)
        if found != (calibration.k, calibration.index, calibration.distances):
            logger.warning(
                "the calibration was fitted with k %s, index %s, %s; this run has k %s, index %s, "
                "%s. Fit it again with `fairseq-knnlm tune` where figures matter.",
                *(calibration.k, calibration.index, calibration.distances),
                *found,
            )
    else:
        source = "uncalibrated defaults"
        fitted = {"lambda": config.DEFAULT_LAMBDA, "temperature": config.DEFAULT_TEMPERATURE}
        logger.warning(
            "%s has no calibration: the defaults lambda %g and temperature %g can be worse than "
            "no datastore at all. Fit them on valid with `fairseq-knnlm tune`.",
            store.path,
            *fitted.values(),
        )
    if given:
        source = f"{', '.join(given)} given, else {source}"
    used = fitted | given
    return used["lambda"], used["temperature"], source
