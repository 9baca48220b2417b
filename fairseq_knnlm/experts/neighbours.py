"""The nearest entries of a datastore as an expert: its flags, and how it is made.

How neighbours become a distribution stands in ``knn``, how they lead to others in ``pointers``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fairseq_knnlm.bounds import check_device
from fairseq_knnlm.cluster.connect import check_address
from fairseq_knnlm.cluster.opening import open_sharded
from fairseq_knnlm.cluster.retriever import ShardedRetriever
from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.experts.kind import Kind, Models, Opened, check_unmerged, flag, spelled
from fairseq_knnlm.experts.knn import DISTANCE_RANKS, KnnExpert, KnnSetting, knn_grid
from fairseq_knnlm.experts.pointers import PART_OF_K, PointerExpert
from fairseq_knnlm.retrieval.local import LocalRetriever
from fairseq_knnlm.retrieval.opening import check_k, open_retriever, retriever_over

logger = logging.getLogger(__name__)

#: Pointers that save a search.
DEFAULT_POINTER_MIN = 64
#: Temperatures that leave float32 distances what they are: numbers.
TEMPERATURES = 1e-6, 1e9


@dataclass(frozen=True)
class KnnOptions:
    """Flags of the neighbours, and of the index in which they are found."""

    k: int = flag(1024, "neighbours a token", counts="neighbours")
    lmbda: float | None = flag(
        None,
        "weight of the neighbours, 0 to 1 (default: the calibration, else 0.25)",
        weight=True,
    )
    knn_temp: float | None = flag(
        None,
        "temperature of the distances (default: the calibration, else 1.0)",
        setting="temperature",
    )
    indexfile: str | None = flag(None, "FAISS index (default: knn.index in the datastore)")
    probe: int | None = flag(
        None, "inverted lists visited a query (default: as the index was built)", counts="lists"
    )
    knn_device: str = flag("auto", "where to search: auto, cpu, cuda or cuda:i,j")
    mmap_index: bool = flag(False, "map the index's codes instead of reading them into memory")
    faiss_metric_type: Literal["auto", "l2", "ip"] = flag(
        "auto", "the index's metric; checked against the index where given"
    )
    knn_sim_func: Literal["auto", "do_not_recomp_l2", "l2", "dot"] = flag(
        "auto",
        "distances: the index's own (do_not_recomp_l2), or recomputed on the stored keys as "
        "squared L2 (l2) or inner product (dot); auto recomputes L2 unless the index loses less "
        "than a tenth of the neighbours in its lists, or the keys are not loaded",
    )
    no_load_keys: bool = flag(False, "do not open the keys; use the index's distances")
    pointers: Literal["none", "join", "replace"] = flag(
        "none",
        "follow the neighbours through their text: their successors join the neighbours of the "
        "next token, or replace the search for them; distances are recomputed as squared L2",
    )
    pointer_min: int | None = flag(
        None,
        "with --pointers replace: pointers that save a search (default: 64); at most k / 4 are "
        "kept",
        counts="pointers",
    )
    knn_ray: str | None = flag(
        None,
        "search in processes of Ray, each of which holds a part of the index: local for a Ray of "
        "this process alone, auto for the one that runs on this machine, or HOST:PORT",
    )
    knn_shards: int | None = flag(
        None,
        "with --knn-ray: parts that the index is cut into, at most one for each block of the "
        "datastore (default: one for each machine)",
        counts="shards",
    )
    knn_replicas: int | None = flag(
        None,
        "with --knn-ray: copies of each part, which share the load and answer for one that died "
        "(default: 1)",
        counts="copies",
    )

    @property
    def follows(self) -> bool:
        """Whether there are pointers."""
        return self.pointers != "none"

    @property
    def least_pointers(self) -> int | None:
        """The pointers that save a search; None where every token is searched."""
        if self.pointers != "replace":
            return None
        return DEFAULT_POINTER_MIN if self.pointer_min is None else self.pointer_min

    @property
    def pointers_in_words(self) -> dict[str, str]:
        """What pointers do, where there are any."""
        if not self.follows:
            return {}
        least = self.least_pointers
        return {"pointers": self.pointers if least is None else f"{self.pointers} from {least}"}


class KnnKind(Kind):
    """``knn``, ``knn2``, ...: one for each datastore."""

    name = "knn"
    options = KnnOptions
    setting = KnnSetting
    default_weight = 0.25
    numbered = True
    needs_datastore = True
    optional = True

    def check(self, options: KnnOptions, asked: bool) -> None:
        check_device(options.knn_device)
        low, high = TEMPERATURES
        if options.knn_temp is not None and not low <= options.knn_temp <= high:
            raise ConfigError(
                "--knn-temp divides distances",
                expected=f"above 0: {low:g} to {high:g}",
                found=options.knn_temp,
            )
        _check_pointers(options, asked)
        _check_ray(options)
        if options.no_load_keys and options.knn_sim_func in ("l2", "dot"):
            raise ConfigError(
                f"--knn-sim-func {options.knn_sim_func} needs the keys",
                expected="keys to recompute distances on",
                found="--no-load-keys",
                do="drop one of the two",
            )

    def reads(self, options: KnnOptions) -> dict[str, list[Path]]:
        name = options.indexfile
        return {"--indexfile": [Path(name), Path(f"{name}.json")]} if name else {}

    def needs_order(self, options: KnnOptions) -> bool:
        return options.follows

    def check_sentences(self, options: KnnOptions) -> None:
        if options.follows:
            raise ConfigError(
                f"--pointers {options.pointers} follows a text",
                expected="fairseq-eval-lm, which reads one",
                found="sentences by themselves",
                do="leave --pointers out",
            )

    def open(self, options: KnnOptions, stores: Sequence[Datastore], number: int) -> LocalRetriever:
        if options.indexfile and len(stores) > 1:
            raise ConfigError(
                "--indexfile names one index, and there are several datastores",
                expected="knn.index in each datastore",
                found=options.indexfile,
                do="leave --indexfile out",
            )
        store, similarity = stores[number], str(options.knn_sim_func)
        if options.follows:
            remedy = "leave --pointers out, or use the original datastore"
            check_unmerged(store, "pointers", remedy)
            similarity = "l2"
        if options.knn_ray is not None:
            check_k(options.k, len(store))
            sharded = open_sharded(
                store,
                options.knn_ray,
                shards=options.knn_shards,
                replicas=options.knn_replicas,
                probe=options.probe,
            )
            return retriever_over(
                sharded,
                store,
                similarity=similarity,
                metric=options.faiss_metric_type,
                kind=ShardedRetriever,
            )
        return open_retriever(
            store,
            options.k,
            index=Path(options.indexfile) if options.indexfile else None,
            probe=options.probe,
            device=options.knn_device,
            mapped=options.mmap_index,
            similarity=similarity,
            metric=options.faiss_metric_type,
        )

    def idle(self, options: KnnOptions, opened: Sequence[Opened]) -> Iterator[str]:
        lists = [one.parts.index.card.nprobe for one in opened]
        if options.probe is not None and lists and not any(lists):
            yield "--probe does nothing: the index has no lists"
        least, most = options.least_pointers, options.k // PART_OF_K
        if least is not None and least > max(1, most):
            yield (
                f"--pointers replace saves no search: at most k / {PART_OF_K} = {most} pointers "
                f"are kept, and --pointer-min asks for {least}"
            )

    def grid(self, opened: Opened, models: Models) -> list[KnnSetting]:
        return knn_grid(opened.options.k)

    def make(
        self, opened: Opened, models: Models, settings: Sequence[KnnSetting], features: bool
    ) -> KnnExpert:
        options, name, retriever = opened.options, opened.name, opened.parts
        if not options.follows:
            k = options.k if features else least_neighbours(settings, options.k, retriever)
            return KnnExpert(retriever, k, settings, features=features, name=name)
        asked = (retriever, options.k, settings)
        least = options.least_pointers
        return PointerExpert(*asked, least=least, features=features, name=name)

    def described(self, opened: Opened, models: Models) -> dict[str, Any]:
        return {
            "k": opened.options.k,
            "index": opened.parts.index.card.describe(),
            "distances": opened.parts.distances,
            **opened.options.pointers_in_words,
        }

    def finish(self, opened: Opened) -> None:
        if checked := opened.parts.check_files():
            logger.info("checked the other %s chunks of %s", checked, opened.parts.store.path)

    def results(self, opened: Sequence[Opened], experts: Sequence[KnnExpert]) -> dict[str, Any]:
        first = opened[0]
        found: dict[str, Any] = {
            "k": first.options.k,
            "index": first.parts.index.card.describe(),
            "distances": first.parts.distances,
        }
        if any(isinstance(expert, PointerExpert) for expert in experts):
            found |= first.options.pointers_in_words
        return found

    def counts(self, experts: Sequence[KnnExpert]) -> dict[str, float]:
        found: dict[str, float] = {f"recalled_{one.name}": one.recalled for one in experts}
        found["search_seconds"] = sum(expert.search_seconds for expert in experts)
        pointed = [expert for expert in experts if isinstance(expert, PointerExpert)]
        if pointed:
            found["searches"] = sum(expert.searches for expert in pointed)
            found["queries"] = sum(expert.queries for expert in pointed)
        return found

    def figures(self, counts: Mapping[str, float]) -> dict[str, Any]:
        recalled = [count for name, count in counts.items() if name.startswith("recalled_")]
        found: dict[str, Any] = {
            "search_seconds": counts["search_seconds"],
            "tokens_recalled": int(max(recalled, default=0)),
        }
        if "queries" in counts:
            found["searches_saved"] = 1 - counts["searches"] / max(1, counts["queries"])
        return found

    def lines(self, found: Mapping[str, Any]) -> Iterator[str]:
        if "index" in found:
            yield f"k {found['k']}, index {found['index']}; distances {found['distances']}"
        if "pointers" in found:
            yield f"pointers {found['pointers']}: {found['searches_saved']:.1%} searches saved"

    def card(self, opened: Sequence[Opened]) -> dict[str, Any]:
        k = opened[0].options.k
        return {"distance_ranks": [rank for rank in DISTANCE_RANKS if rank <= k]}


def least_neighbours(settings: Sequence[KnnSetting], k: int, retriever: LocalRetriever) -> int:
    """How many neighbours are to be looked for: no more than count in any of the settings.

    They are then the nearest of those k, but for ties. Where distances are recomputed all k are
    looked for, since these put them in another order.
    """
    counted = [setting.k or k for setting in settings]
    return k if retriever.recomputes else min(k, max(counted, default=k))


def _check_ray(options: KnnOptions) -> None:
    if options.knn_ray is None:
        for name in ("knn_shards", "knn_replicas"):
            if getattr(options, name) is not None:
                raise ConfigError(
                    f"{spelled(name)} needs --knn-ray",
                    expected="--knn-ray local, auto or HOST:PORT",
                    found="nothing",
                )
        return
    check_address("--knn-ray", options.knn_ray)
    for given, name, why in (
        (options.indexfile, "--indexfile", "shards hold the index that lies in the datastore"),
        (options.mmap_index, "--mmap-index", "shards hold their part in memory"),
        (options.knn_device.startswith("cuda"), "--knn-device", "shards search on CPUs"),
    ):
        if given:
            raise ConfigError(
                f"--knn-ray and {name} exclude each other: {why}",
                expected="one of them",
                found="both",
                do=f"leave {name} out",
            )


def _check_pointers(options: KnnOptions, asked: bool) -> None:
    if options.pointer_min is not None and options.pointers != "replace":
        raise ConfigError(
            "--pointer-min needs --pointers replace",
            expected="--pointers replace",
            found="nothing",
        )
    if not options.follows:
        return
    if not asked:
        raise ConfigError(
            "--pointers lead from neighbours to neighbours",
            expected="--knnlm, or knn among --experts",
            found="neither",
        )
    if options.no_load_keys or options.knn_sim_func not in ("auto", "l2"):
        found = (
            "--no-load-keys" if options.no_load_keys else f"--knn-sim-func {options.knn_sim_func}"
        )
        raise ConfigError(
            f"--pointers {options.pointers} needs the keys",
            expected="distances recomputed on them, as squared L2",
            found=found,
            do=f"leave {found} out",
        )


KIND = KnnKind()
