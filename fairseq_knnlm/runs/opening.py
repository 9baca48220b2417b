"""What evaluation opens, checked against each other: datastores, indexes, n-grams, calibration."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq_knnlm.calibration.stored import Calibration, read_calibration
from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.errors import ConfigError, OutputError
from fairseq_knnlm.experts.kneser_ney import NGramModel
from fairseq_knnlm.experts.ngram_file import load_counts, save_counts
from fairseq_knnlm.index.card import read_card
from fairseq_knnlm.index.device import gpu_of_torch_alone
from fairseq_knnlm.index.exact import ExactSearch
from fairseq_knnlm.index.search import SearchIndex
from fairseq_knnlm.index.storage import load as load_index
from fairseq_knnlm.lm.contexts import CONTEXT
from fairseq_knnlm.lm.fingerprints import dictionary_fingerprint
from fairseq_knnlm.mixture.components import searches
from fairseq_knnlm.mixture.mixers import Mixer, Skip
from fairseq_knnlm.retrieval.local import LocalRetriever
from fairseq_knnlm.runs.mixing import all_given, check_given, chosen_experts
from fairseq_knnlm.runs.stores import open_store
from fairseq_knnlm.tasks import checks
from fairseq_knnlm.tasks import flags as config

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Skipping:
    """How searches are skipped.

    Attributes:
        skip: tells which.
        rest: mixes the other experts where no search is made.
    """

    skip: Skip
    rest: Mixer


@dataclass(frozen=True)
class Memory:
    """What evaluation opened.

    Attributes:
        stores: the datastores; empty where only the cache or a second model is asked.
        retrievers: by expert (``knn``, ``knn2``, ...), index and store, ready to search.
        ngram: counts of the first datastore's text, where asked for.
        calibration: what was fitted for these datastores, if anything.
        experts: names of those to ask.
        skipping: what was fitted to skip searches; None where none are to be skipped.
    """

    stores: tuple[Datastore, ...]
    retrievers: dict[str, LocalRetriever]
    ngram: NGramModel | None
    calibration: Calibration | None
    experts: tuple[str, ...]
    skipping: Skipping | None = None


def open_memory(args: Any, symbols: Sequence[str]) -> Memory:
    """Opens what the flags name and refuses what does not fit together.

    Args:
        args: the task's flags, checked.
        symbols: the dictionary's symbols, in order.

    Raises:
        KnnlmError: of the kind that fits what is wrong.
    """
    fingerprint = dictionary_fingerprint(symbols)
    stores = tuple(_open_store(args, path, len(symbols)) for path in config.datastore_paths(args))
    for store in stores:
        store.check_origin(dictionary=fingerprint, key_type=str(args.knn_keytype))
    calibration = None
    if stores:
        seals = [store.fingerprint for store in stores]
        # Flags that leave nothing open do not ask what was fitted, nor mind if it is broken.
        if args.skip_searches is not None or (str(args.mixer) != "none" and not all_given(args)):
            calibration = read_calibration(stores[0].calibration_path, seals)
    experts = chosen_experts(args, calibration)
    check_given(args, experts)
    skipping = None
    if args.skip_searches is not None:
        skipping = _skipping(args, calibration, experts)
    names = ["knn", *(f"knn{number}" for number in range(2, len(stores) + 1))]
    retrievers = {
        name: _retriever(args, store)
        for name, store in zip(names, stores, strict=False)
        if name in experts
    }
    ngram = _ngram(stores[0]) if "ngram" in experts else None
    return Memory(stores, retrievers, ngram, calibration, tuple(experts), skipping)


def _skipping(args: Any, calibration: Calibration | None, experts: Sequence[str]) -> Skipping:
    rest = [name for name in experts if not searches(name)]
    if len(rest) == len(experts):
        raise ConfigError(
            "there are no searches to skip",
            expected="--skip-searches with knn among the experts",
            found=", ".join(experts) or "the language model alone",
            do="leave --skip-searches out, or name knn in --experts",
        )
    skip = calibration.skip(experts) if calibration else None
    stack = None
    if calibration is not None:
        stack = calibration.find(rest, str(args.mixer)) or calibration.find(rest)
    if skip is None or stack is None:
        raise ConfigError(
            f"nothing tells which searches to skip with {'+'.join(experts)}",
            expected="a calibration with a gate that skips searches",
            found="one without it" if calibration else "no calibration",
            do="write a score table of valid with these --experts and fit it with "
            "`fairseq-knnlm tune`, or leave --skip-searches out",
        )
    return Skipping(skip, stack.mixer)


def _open_store(args: Any, name: str, vocabulary: int) -> Datastore:
    return open_store(
        Path(name),
        rows=args.dstore_size,
        fp16=args.dstore_fp16,
        vocabulary=vocabulary,
        load_keys=not args.no_load_keys,
        in_memory=args.move_dstore_to_mem,
    )


def _retriever(args: Any, store: Datastore) -> LocalRetriever:
    checks.check_k(args.k, len(store))
    index = _open_index(args, store)
    checks.check_metric(str(args.faiss_metric_type), index.card.metric)
    similarity = str(args.knn_sim_func)
    if str(args.pointers) != "none":
        _check_unmerged(store, "pointers", "leave --pointers out, or use the original datastore")
        similarity = "l2"
    elif similarity == "auto":
        settled = index.card.faithful or store.keys is None or index.card.metric == "ip"
        similarity = "do_not_recomp_l2" if settled else "l2"
    return LocalRetriever(index, store, similarity)


def _open_index(args: Any, store: Datastore) -> SearchIndex | ExactSearch:
    if args.indexfile and len(config.datastore_paths(args)) > 1:
        raise ConfigError(
            "--indexfile names one index, and there are several datastores",
            expected="knn.index in each datastore",
            found=args.indexfile,
            do="leave --indexfile out",
        )
    path = Path(args.indexfile) if args.indexfile else store.index_path
    options: dict[str, Any] = {
        "datastore": store.fingerprint,
        "rows": len(store),
        "width": store.manifest.width,
        "nprobe": args.probe,
        "k": args.k,
        "foreign": bool(args.indexfile),
    }
    gpu = gpu_of_torch_alone(args.knn_device)
    card = read_card(path, foreign=bool(args.indexfile))
    if gpu and card is not None and card.exact and store.keys is not None:
        checked = load_index(path, mapped=True, **options)
        return ExactSearch(store.keys, checked.card, gpu)
    return load_index(path, device=args.knn_device, mapped=args.mmap_index, **options)


def _ngram(store: Datastore) -> NGramModel:
    """Counts of the datastore's text, kept beside it once made."""
    remedy = "leave ngram out of --experts, or put the original datastore first"
    _check_unmerged(store, "n-grams", remedy)
    path = store.ngram_path
    vocabulary = store.manifest.origin.vocabulary
    if path.is_file():
        tokens = len(store)
        return load_counts(path, store.fingerprint, vocabulary=vocabulary, tokens=tokens)
    model = NGramModel.count(store.values, vocabulary, CONTEXT + 1)
    try:
        save_counts(model, path, store.fingerprint)
    except (OSError, OutputError) as error:  # the datastore may be somebody else's
        reason = str(error).splitlines()[0]
        logger.warning("the n-gram counts are not kept: %s", reason)
    return model


def _check_unmerged(store: Datastore, what: str, remedy: str) -> None:
    if store.manifest.merged:
        raise ConfigError(
            f"{store.path} no longer holds its text: entries were merged",
            expected=f"for {what}, a datastore of every token",
            found="a compressed one",
            do=remedy,
        )
