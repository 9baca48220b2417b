"""The FAISS index: train, add, save, load, place on a CPU or GPU, search.

The only module that imports faiss. Beside an index file lies its card (``knn.index.json``), which
says how it was built, of which datastore, and how good it is.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq_knnlm.errors import ConfigError, IndexFileError, KnnlmError
from fairseq_knnlm.files import altered, checksums, publish, read_sealed, write_sealed

logger = logging.getLogger(__name__)
logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it reports every attempt
try:
    import faiss
except ImportError:
    raise KnnlmError(
        "FAISS is not installed",
        expected="the Python package faiss",
        found="none",
        do="pip install faiss-cpu, or on a machine with a GPU faiss-gpu",
    ) from None

#: FAISS's limits on a GPU (k and nprobe; the sizes of 8-bit product codes).
GPU_MAX = 2048
GPU_CODE_SIZES = {1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96}
FORMAT = "fairseq-knnlm index"
VERSION = 1
#: Share of what the lists hold that compressed keys must find to be trusted with distances.
FAITHFUL = 0.9
METRICS = {"l2": faiss.METRIC_L2, "ip": faiss.METRIC_INNER_PRODUCT}


@dataclass(frozen=True)
class IndexCard:
    """What an index is.

    Attributes:
        factory: FAISS's factory string.
        metric: ``"l2"`` or ``"ip"``.
        rows: entries, N.
        width: dimensions of a query, D.
        nprobe: inverted lists visited a query, unless said otherwise; 0 without lists.
        exact: the index compares full keys.
        datastore: fingerprint of the datastore it was built of; empty for a foreign index.
        coverage: share of the true ``recall_at`` nearest that lie in the lists visited, on sampled
            keys; None without lists or unmeasured.
        recall: share of the true ``recall_at`` nearest that it finds, on sampled keys.
        recall_at: that k.
        seconds: time to build.
        faiss: version that built it.
        bytes: length of the index file.
        chunks: the file's checksums.
    """

    factory: str
    metric: str
    rows: int
    width: int
    nprobe: int
    exact: bool
    datastore: str = ""
    coverage: float | None = None
    recall: float | None = None
    recall_at: int = 0
    seconds: float = 0.0
    faiss: str = ""
    bytes: int = 0
    chunks: Sequence[str] = ()

    @property
    def faithful(self) -> bool:
        """Whether the index's own distances do nearly as well as exact ones.

        An exact index's do. Others' do where compression loses few of the true neighbours that the
        lists visited hold.
        """
        if self.exact:
            return True
        if self.recall is None or self.coverage is None:
            return False
        return self.recall >= FAITHFUL * self.coverage

    def describe(self) -> str:
        """For a report: ``"IVF4096,PQ64, nprobe 32 (covers 0.94), recall@1024 0.87"``."""
        parts = [self.factory]
        if self.nprobe:
            covers = f" (covers {self.coverage:.2f})" if self.coverage is not None else ""
            parts.append(f"nprobe {self.nprobe}{covers}")
        if self.recall is not None and not self.exact:
            parts.append(f"recall@{self.recall_at} {self.recall:.2f}")
        return ", ".join(parts)


class SearchIndex:
    """An index that is ready to search.

    Args:
        index: a FAISS index, on its device; one in the CPU's memory is set to visit
            ``card.nprobe`` lists.
        card: what it is.
        gpu_resources: FAISS's, which must live as long as the index; empty on a CPU.
    """

    def __init__(self, index: Any, card: IndexCard, gpu_resources: Sequence[Any] = ()) -> None:
        self.index = index
        self.card = card
        self._gpu_resources = gpu_resources
        # Shards and indexes with a transform before them take NumPy arrays only.
        self._takes_tensors = type(index).__name__.startswith("Gpu")
        if not gpu_resources:
            _set_nprobe(index, card.nprobe)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest entries.

        Args:
            queries: (N, D) float32.
            k: neighbours a query.

        Returns:
            distances (N, k) float32, squared L2 or inner product, best first; ids (N, k) int64,
            -1 where fewer than k were found. Both on the queries' device.
        """
        if self._takes_tensors and queries.is_cuda:
            distances, ids = self.index.search(queries.contiguous(), k)
            return distances, ids
        found = self.index.search(np.ascontiguousarray(queries.cpu().numpy()), k)
        distances, ids = (torch.from_numpy(part).to(queries.device) for part in found)
        return distances, ids


def save(index: Any, card: IndexCard, path: Path, datastore: str) -> IndexCard:
    """Writes an index and its card, each atomically, the card last.

    Args:
        index: a FAISS index in the CPU's memory.
        card: from ``build``.
        path: the index file.
        datastore: fingerprint of the datastore it was built of.
    """
    card_path(path).unlink(missing_ok=True)
    with publish(path) as temporary:
        write_file(index, temporary)
    card = replace(
        card,
        datastore=datastore,
        bytes=path.stat().st_size,
        chunks=checksums(path),
    )
    write_sealed(card_path(path), FORMAT, VERSION, asdict(card))
    return card


def card_path(index_path: Path) -> Path:
    """``knn.index`` -> ``knn.index.json``."""
    return index_path.with_name(f"{index_path.name}.json")


def load(
    path: Path,
    *,
    datastore: str,
    rows: int,
    width: int,
    device: str = "cpu",
    nprobe: int | None = None,
    k: int = 1,
    mapped: bool = False,
) -> SearchIndex:
    """Reads an index, checks that it belongs to the datastore, and places it.

    Args:
        path: the index file.
        datastore: fingerprint of the datastore.
        rows: its entries.
        width: its keys' dimensions.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:0,1``.
        nprobe: lists visited a query, where not the card's.
        k: neighbours that will be asked for.
        mapped: leave the keys' codes in the file, mapped, so that they take no memory of their own.

    Raises:
        IndexFileError: where it is missing, damaged, of another datastore, or cannot be mapped or
            searched on the device.
        ConfigError: where the device does not exist, or nprobe exceeds the lists.
    """
    card = read_card(path)
    if card is not None:
        _check_file(path, card, datastore)
    exact = card is not None and card.exact
    index = _map_file(path, exact) if mapped else read_file(path)
    if index.ntotal != rows or index.d != width:
        raise IndexFileError(
            f"{path} is an index of another datastore",
            expected=f"{rows:,} keys of width {width}",
            found=f"{index.ntotal:,} keys of width {index.d}",
            do="build it again: python examples/build_index.py --dstore DSTORE",
        )
    card = card or _foreign_card(index)
    if nprobe is not None:
        card = replace(card, nprobe=_checked_nprobe(index, nprobe))
    return place(index, card, device, k)


def read_card(path: Path) -> IndexCard | None:
    """The card beside an index, or None for an index that somebody else built.

    Raises:
        IndexFileError: where the index is missing or its card damaged.
    """
    if not path.is_file():
        raise IndexFileError(
            f"no index at {path}",
            expected="an index of the datastore",
            found="nothing",
            do="build it: python examples/build_index.py --dstore DSTORE",
        )
    file = card_path(path)
    if not file.is_file():
        return None
    try:
        return IndexCard(**read_sealed(file, FORMAT, VERSION, dict)[0])
    except (TypeError, ValueError) as error:
        raise _damaged(file, "the card of an index", str(error)) from None


def _check_file(path: Path, card: IndexCard, datastore: str) -> None:
    size = path.stat().st_size
    if size != card.bytes:
        raise _damaged(path, f"{card.bytes:,} bytes", f"{size:,} bytes")
    if card.datastore != datastore:
        raise IndexFileError(
            f"{path} is an index of another datastore",
            expected=f"datastore {datastore[:12]}...",
            found=f"datastore {card.datastore[:12]}...",
            do="build it again: python examples/build_index.py --dstore DSTORE",
        )
    if altered(path, card.chunks):
        raise _damaged(path, "the bytes that were written", "other ones (checksums differ)")


def write_file(index: Any, path: Path) -> None:
    """Writes a FAISS index that is in the CPU's memory."""
    faiss.write_index(index, str(path))


def read_file(path: Path, flags: int = 0) -> Any:
    """Reads a FAISS index, with FAISS's flags for reading.

    Raises:
        IndexFileError: where FAISS cannot.
    """
    try:
        return faiss.read_index(str(path), flags)
    except (RuntimeError, MemoryError) as error:
        raise _damaged(path, "an index that FAISS reads", first_line(error)) from None


def _map_file(path: Path, exact: bool) -> Any:
    """An index whose codes stay in the file; ``exact`` where its card says that it is."""
    if exact:
        return read_file(path, faiss.IO_FLAG_MMAP_IFC)
    index = read_file(path, faiss.IO_FLAG_MMAP)
    if is_exact(index):  # one without a card; this flag has read it into memory
        return read_file(path, faiss.IO_FLAG_MMAP_IFC)
    lists: Any = faiss.extract_index_ivf(index).invlists if has_lists(index) else None
    if not isinstance(lists and faiss.downcast_InvertedLists(lists), faiss.OnDiskInvertedLists):
        raise IndexFileError(
            f"{path} cannot be mapped",
            expected="an index whose codes lie in the file as they are searched: Flat, or IVF..,PQ "
            "of 8 bits, such as --recipe paper",
            found=type(_innermost(index)).__name__,
            do="leave --mmap-index out, or build another index",
        )
    return index


def _damaged(file: Path, expected: str, found: str) -> IndexFileError:
    return IndexFileError(
        f"{file} is damaged",
        expected=expected,
        found=found,
        do="build the index again: python examples/build_index.py --dstore DSTORE",
    )


def _foreign_card(index: Any) -> IndexCard:
    metric = next(name for name, kind in METRICS.items() if kind == index.metric_type)
    return IndexCard(
        factory=type(_innermost(index)).__name__,
        metric=metric,
        rows=index.ntotal,
        width=index.d,
        nprobe=32 if has_lists(index) else 0,  # the paper's
        exact=is_exact(index),
    )


def _checked_nprobe(index: Any, nprobe: int) -> int:
    if not has_lists(index):
        return 0
    lists = faiss.extract_index_ivf(index).nlist
    if not 1 <= nprobe <= lists:
        raise ConfigError(
            "--probe does not fit the index",
            expected=f"1 to {lists:,}, its inverted lists",
            found=nprobe,
            do="leave --probe out to use the value chosen when the index was built",
        )
    return nprobe


def place(index: Any, card: IndexCard, device: str, k: int) -> SearchIndex:
    """Puts an index where it is to be searched.

    Args:
        index: a FAISS index in the CPU's memory.
        card: what it is.
        device: ``auto`` (a GPU where FAISS has one and the index can go there), ``cpu``,
            ``cuda`` (the first one) or ``cuda:i,j`` (shards over several).
        k: neighbours that will be asked for.

    Raises:
        ConfigError: where there is no such device.
        IndexFileError: where a GPU cannot search this index.
    """
    if device == "cpu":
        return SearchIndex(index, card)
    available = _gpus()
    if device == "auto":
        obstacle = "no GPU" if not available else gpu_obstacle(index, card, k)
        if available and obstacle:
            logger.info("searching on the CPU: %s", obstacle)
        return SearchIndex(index, card) if obstacle else _to_gpus(index, card, [0])
    gpus = _parse_gpus(device, available)
    obstacle = gpu_obstacle(index, card, k)
    if obstacle:
        raise IndexFileError(
            f"this index cannot be searched on {device}",
            expected="Flat, IVF..,Flat, IVF..,SQ.. or IVF..,PQ.. with 8-bit codes; k <= 2048",
            found=obstacle,
            do="pass --knn-device cpu, or build with --recipe paper",
        )
    return _to_gpus(index, card, gpus)


def wants_gpu(device: str) -> bool:
    """Whether a ``--knn-device`` will search on a GPU, once it is placed."""
    return device.startswith("cuda") or (device == "auto" and _gpus() > 0)


def gpu_of_torch_alone(device: str) -> str | None:
    """The first GPU of a ``--knn-device`` where torch can use one and FAISS cannot."""
    kind, _, numbers = device.partition(":")
    if kind not in ("auto", "cuda") or _gpus() or not torch.cuda.is_available():
        return None
    return f"cuda:{numbers.split(',')[0] or 0}"


def _gpus() -> int:
    """GPUs that FAISS can use; faiss-cpu knows none."""
    return faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0


def _parse_gpus(device: str, available: int) -> list[int]:
    kind, _, numbers = device.partition(":")
    chosen = numbers.split(",") if numbers else ["0"]
    if kind != "cuda" or not all(number.isdigit() for number in chosen):
        raise ConfigError(
            "--knn-device names no device",
            expected="auto, cpu, cuda, or cuda:i,j",
            found=device,
        )
    gpus = [int(number) for number in chosen]
    if max(gpus) >= available:
        raise ConfigError(
            f"--knn-device {device} is not here",
            expected=f"a GPU below {available}" if available else "a GPU, and faiss-gpu",
            found=f"{available} GPUs that FAISS can use",
            do="pass --knn-device cpu, or install faiss-gpu in the place of faiss-cpu",
        )
    return gpus


def gpu_obstacle(index: Any, card: IndexCard, k: int) -> str | None:
    """Why FAISS cannot search this index on a GPU; None where it can."""
    if k > GPU_MAX or card.nprobe > GPU_MAX:
        return f"k {k} and nprobe {card.nprobe}, at most {GPU_MAX} on a GPU"
    inner = _innermost(index)
    if isinstance(inner, faiss.IndexIVFPQ):
        if inner.pq.nbits != 8 or inner.pq.M not in GPU_CODE_SIZES or not inner.by_residual:
            return f"{inner.pq.M} codes of {inner.pq.nbits} bits"
        return None
    if isinstance(inner, faiss.IndexFlat | faiss.IndexIVFFlat | faiss.IndexIVFScalarQuantizer):
        return None
    return f"{card.factory} has no GPU version"


def _to_gpus(index: Any, card: IndexCard, gpus: list[int]) -> SearchIndex:
    """Clones an index to one GPU, or in shards to several."""
    import faiss.contrib.torch_utils  # lets GPU indexes take torch tensors

    _set_nprobe(index, card.nprobe)  # the clones inherit it
    options = faiss.GpuMultipleClonerOptions()
    # Lookup tables for 64-byte codes fit in shared memory in float16 only; full keys stay float32.
    options.useFloat16 = isinstance(_innermost(index), faiss.IndexIVFPQ)
    options.shard = len(gpus) > 1
    resources = [faiss.StandardGpuResources() for _ in gpus]
    placed = faiss.index_cpu_to_gpu_multiple_py(resources, index, options, gpus)
    return SearchIndex(placed, card, resources)


def _innermost(index: Any) -> Any:
    """The index behind transforms and id maps."""
    index = faiss.downcast_index(index)
    while isinstance(index, faiss.IndexPreTransform | faiss.IndexIDMap):
        index = faiss.downcast_index(index.index)
    return index


def has_lists(index: Any) -> bool:
    return faiss.try_extract_index_ivf(index) is not None


def is_exact(index: Any) -> bool:
    return isinstance(faiss.downcast_index(index), faiss.IndexFlat)


def _set_nprobe(index: Any, nprobe: int) -> None:
    if nprobe:
        faiss.ParameterSpace().set_index_parameter(index, "nprobe", nprobe)


def first_line(error: Exception) -> str:
    """FAISS's reason, without its source location; its C++ signatures say nothing to a user."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = lines[0].split("Error: ")[-1]
    return "what FAISS does not know" if "::" in reason else reason
