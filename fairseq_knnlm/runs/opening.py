"""What evaluation opens, checked against each other: datastores, their calibration, experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fairseq_knnlm.calibration.stored import Calibration, read_calibration
from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.datastore.legacy import is_legacy
from fairseq_knnlm.datastore.reader import was_replaced
from fairseq_knnlm.errors import ConfigError, DatastoreError, IndexFileError
from fairseq_knnlm.experts.kind import Kind, Opened
from fairseq_knnlm.experts.registry import kind_of
from fairseq_knnlm.lm.fingerprints import dictionary_fingerprint
from fairseq_knnlm.mixture.components import searches
from fairseq_knnlm.mixture.mixers import Mixer, Skip
from fairseq_knnlm.runs.mixing import check_given, chosen_experts, leaves_open
from fairseq_knnlm.runs.options import Options
from fairseq_knnlm.runs.stores import open_store


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
        calibration: what was fitted for these datastores, if anything.
        experts: those to ask, by their names (``knn``, ``knn2``, ...).
        skipping: what was fitted to skip searches; None where none are to be skipped.
    """

    stores: tuple[Datastore, ...]
    calibration: Calibration | None
    experts: Mapping[str, Opened]
    skipping: Skipping | None = None

    @property
    def by_kind(self) -> dict[Kind, list[Opened]]:
        """The experts of each kind."""
        found: dict[Kind, list[Opened]] = {}
        for expert in self.experts.values():
            found.setdefault(expert.kind, []).append(expert)
        return found


def key_type_of(options: Options, memory: Memory | None) -> str | None:
    """The type of the keys that a run needs of its language model; None where it needs none.

    A cache or a second model goes without, and so do models that have no such keys.
    """
    needed = options.saving.save_knnlm_dstore or (memory is not None and memory.stores)
    return options.datastores.knn_keytype if needed else None


def open_memory(options: Options, symbols: Sequence[str]) -> Memory:
    """Opens what the options name and refuses what does not fit together.

    Args:
        options: what the run is asked to do, checked.
        symbols: the dictionary's symbols, in order.

    Where a datastore is changed meanwhile, all of it is opened again.

    Raises:
        KnnlmError: of the kind that fits what is wrong.
    """
    while True:
        stores = _open_stores(options, symbols)
        try:
            return _opened_with(stores, options)
        except (DatastoreError, IndexFileError, FileNotFoundError):
            ours = [store for store in stores if not is_legacy(store.path)]
            if not any(was_replaced(store.path, store.fingerprint) for store in ours):
                raise


def _opened_with(stores: tuple[Datastore, ...], options: Options) -> Memory:
    """What belongs to the datastores."""
    calibration = None
    if stores and _asks_what_was_fitted(options):
        seals = [store.fingerprint for store in stores]
        before = [store.manifest.before for store in stores]
        calibration = read_calibration(stores[0].calibration_path, seals, before)
    names = chosen_experts(options, calibration)
    check_given(options, names)
    skipping = None
    if options.mixing.skip_searches is not None:
        skipping = find_skipping(options.mixing.mixer, calibration, names)
    experts = {name: _opened(options, stores, name) for name in names}
    return Memory(stores, calibration, experts, skipping)


def _open_stores(options: Options, symbols: Sequence[str]) -> tuple[Datastore, ...]:
    asked = options.datastores
    stores = tuple(
        open_store(
            Path(name),
            rows=asked.dstore_size,
            fp16=asked.dstore_fp16,
            vocabulary=len(symbols),
            load_keys=not options.knn.no_load_keys,
            in_memory=asked.move_dstore_to_mem,
        )
        for name in asked.names
    )
    fingerprint = dictionary_fingerprint(symbols)
    for store in stores:
        store.check_origin(dictionary=fingerprint, key_type=asked.knn_keytype)
    return stores


def _asks_what_was_fitted(options: Options) -> bool:
    """Flags that leave nothing open do not, nor mind if it is broken."""
    mixing = options.mixing
    return mixing.skip_searches is not None or (mixing.mixer != "none" and leaves_open(options))


def _opened(options: Options, stores: Sequence[Datastore], name: str) -> Opened:
    kind = kind_of(name)
    number = kind.names(len(stores)).index(name)
    return Opened(name, kind, options.of(kind), kind.open(options.of(kind), stores, number))


def find_skipping(mixer: str, calibration: Calibration | None, experts: Sequence[str]) -> Skipping:
    """What was fitted to skip searches.

    Args:
        mixer: as in ``--mixer``, for where no search is made.
        calibration: what was fitted, if anything.
        experts: names of those to ask.

    Raises:
        ConfigError: where none of them searches, or nothing was fitted for them.
    """
    rest = [name for name in experts if not searches(name)]
    if len(rest) == len(experts):
        raise ConfigError(
            "there are no searches to skip",
            expected="--skip-searches with knn among the experts",
            found=", ".join(experts) or "the language model alone",
            do="leave --skip-searches out, or name knn in --experts",
        )
    skip = calibration.skip(experts) if calibration else None
    fitted = None
    if calibration is not None:
        fitted = calibration.find(rest, mixer) or calibration.find(rest)
    if skip is None or fitted is None:
        raise ConfigError(
            f"nothing tells which searches to skip with {'+'.join(experts)}",
            expected="a calibration with a gate that skips searches",
            found="one without it" if calibration else "no calibration",
            do="write a score table of valid with these --experts and fit it with "
            "`fairseq-knnlm tune`, or leave --skip-searches out",
        )
    return Skipping(skip, fitted.mixer)
