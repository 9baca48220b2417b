"""The FAISS index: save, load, place on a CPU or GPU, search.

Behind FAISS's bytes an index file holds its card, which says how it was built, of which datastore,
and how good it is. FAISS reads from the front and does not see it. So an index and its card are
one file, and no moment leaves one without the other.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
import torch
from msgspec.structs import asdict, replace
from torch import Tensor

from fairseq_knnlm.errors import ConfigError, IndexFileError, KnnlmError
from fairseq_knnlm.files import (
    MOST_JSON,
    altered,
    checksums,
    chunks_of,
    publish,
    read_sealed,
    seal,
    unseal,
)
from fairseq_knnlm.index.trial import looked_at, obstacle_to_recipe, reason

T = TypeVar("T")

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
VERSION = 2
#: The end of an index file that holds its card: the length of the card (8 bytes, little-endian)
#: and this.
MAGIC = b"kNNcard1"
TAIL_BYTES = 8 + len(MAGIC)
#: The paper's nprobe, for an index of which nothing is known.
FOREIGN_NPROBE = 32
#: Factory strings of which FAISS refuses the wrong ones without a crash.
KNOWN_RECIPES = re.compile(
    r"Flat|(PCAR[1-9]\d{0,3},)?IVF[1-9]\d{0,5},(Flat|SQ8|PQ[1-9]\d{0,3}(x4fsr?)?)", re.ASCII
)
#: What a user may ask for.
RECIPES = (
    "auto, paper, or a factory string such as Flat or IVF1024,PQ32x4fs; code sizes divide the "
    "width, and there are more keys than centroids"
)
BUILD = "build it again: python examples/build_index.py --dstore DSTORE"
#: Share of what the lists hold that compressed keys must find to be trusted with distances.
FAITHFUL = 0.9
METRICS = {"l2": faiss.METRIC_L2, "ip": faiss.METRIC_INNER_PRODUCT}


#: Types of the card's fields, with their bounds.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Fingerprint = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Checksum = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]


class IndexCard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
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
        threads: that FAISS built it with, whose number shows in the last digits of what is
            multiplied; 0 where it is not known.
        faiss: version that built it.
        bytes: length of what FAISS wrote.
        chunks: its checksums.
    """

    factory: str
    metric: Annotated[str, msgspec.Meta(pattern="^(l2|ip)$")]
    rows: Annotated[int, msgspec.Meta(ge=1, le=2**62)]
    width: Annotated[int, msgspec.Meta(ge=1, le=10**6)]
    nprobe: Annotated[int, msgspec.Meta(ge=0, le=2**31)]
    exact: bool
    datastore: Fingerprint = ""
    coverage: Share | None = None
    recall: Share | None = None
    recall_at: Count = 0
    threads: Count = 0
    faiss: str = ""
    bytes: Count = 0
    chunks: tuple[Checksum, ...] = ()

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
    """Writes an index and its card as one file, atomically.

    Args:
        index: a FAISS index in the CPU's memory.
        card: from ``build``.
        path: the index file.
        datastore: fingerprint of the datastore it was built of.

    Raises:
        OSError: where the disk is full, or cannot be written to; what was there stays.
    """
    with publish(path) as temporary:
        write_file(index, temporary)
        card = replace(
            card,
            datastore=datastore,
            bytes=temporary.stat().st_size,
            chunks=tuple(checksums(temporary)),
        )
        text = json.dumps(seal(FORMAT, VERSION, asdict(card)), allow_nan=False).encode()
        with temporary.open("ab") as file:
            file.write(text + len(text).to_bytes(8, "little") + MAGIC)
    beside = card_path(path)
    if beside.is_file() or beside.is_symlink():
        beside.unlink()  # of the index that was there before
    return card


def card_path(index_path: Path) -> Path:
    """Where earlier versions kept an index's card: ``knn.index`` -> ``knn.index.json``."""
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
    foreign: bool = False,
    everything: bool = False,
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
        foreign: take an index without a card too, checked for what can be.
        everything: compare all bytes, also of a large file.

    Raises:
        IndexFileError: where it is missing, damaged, without its card, of another datastore, or
            cannot be mapped or searched on the device.
        ConfigError: where the device does not exist, or nprobe exceeds the lists.
    """

    def read() -> tuple[Any, IndexCard]:
        card = read_card(path, foreign=foreign)
        if card is None:
            card = _foreign_card(path, rows, width)
        else:
            _check_file(path, card, datastore, everything=everything)
        index = _map_file(path, card.exact) if mapped else read_file(path)
        if index.ntotal != rows or index.d != width:
            raise _of_another(path, rows, width, index.ntotal, index.d)
        if card.datastore:  # one of ours
            _check_card(path, card, index)
        return index, card

    index, card = _settled(path, read)
    if nprobe is not None:
        card = replace(card, nprobe=_checked_nprobe(index, nprobe))
    return place(index, card, device, k)


def _settled(path: Path, read: Callable[[], T]) -> T:
    """What ``read`` makes of a file that nobody replaced meanwhile."""
    while True:
        before = _identity(path)
        try:
            found = read()
        except IndexFileError:
            if _identity(path) == before:
                raise
            continue
        if _identity(path) == before:
            return found


def _identity(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def read_card(path: Path, *, foreign: bool = False) -> IndexCard | None:
    """The card of an index; None where it has none and is welcome all the same.

    Args:
        path: the index file.
        foreign: whether an index that another program built, which has no card, is welcome.

    Raises:
        IndexFileError: where the index is missing, or its card is missing or damaged.
    """
    if not path.is_file():
        raise IndexFileError(
            f"no index at {path}",
            expected="an index of the datastore",
            found="another kind of thing" if os.path.lexists(path) else "nothing",
            do=BUILD,
        )
    beside, size = card_path(path), path.stat().st_size
    text = None
    try:
        if (text := _card_within(path)) is not None:
            size -= len(text.encode()) + TAIL_BYTES
            card, _ = unseal(text, FORMAT, VERSION, IndexCard, _renewed)
        elif beside.is_file():
            card, _ = read_sealed(beside, FORMAT, 1, IndexCard, _renewed)
        elif foreign:
            return None
        else:
            raise IndexFileError(
                f"{path} is damaged or another program's: it has no card",
                expected="an index that fairseq-knnlm wrote: its card is the end of the file, or "
                f"lies beside it as {beside.name}",
                found="neither",
                do=f"{BUILD}; or, if another program built it, name it with --indexfile",
            )
        if len(card.chunks) != chunks_of(card.bytes):
            raise ValueError(f"{len(card.chunks):,} checksums for {card.bytes:,} bytes")
    except ValueError as error:
        where = beside if text is None else path
        raise _damaged(where, "the card of an index", str(error)) from None
    if card.bytes != size:
        raise _damaged(path, f"{card.bytes:,} bytes", f"{size:,} bytes")
    return card


def _card_within(path: Path) -> str | None:
    """The card that an index file ends with, as JSON text; None where it ends otherwise."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        tail = file.read()
        if not tail.endswith(MAGIC) or len(tail) < TAIL_BYTES:
            return None
        length = int.from_bytes(tail[:8], "little")
        if length > min(MOST_JSON, size - TAIL_BYTES):
            raise ValueError(f"one of {length:,} bytes, in a file of {size:,}")
        file.seek(size - TAIL_BYTES - length)
        try:
            return file.read(length).decode()
        except UnicodeDecodeError:
            raise ValueError("bytes that are no text") from None


def _renewed(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of version 1, which told the time in the place of the threads, as of today."""
    if "seconds" not in fields:
        return fields
    return {"threads": 0} | {name: fields[name] for name in fields if name != "seconds"}


def _check_card(path: Path, card: IndexCard, index: Any) -> None:
    """Refuses a card that says of its index what is not so."""
    lists = faiss.extract_index_ivf(index).nlist if has_lists(index) else 0
    metric = METRICS[card.metric]
    for name, said, ok in (
        ("rows", card.rows, card.rows == index.ntotal),
        ("width", card.width, card.width == index.d),
        ("metric", card.metric, index.metric_type == metric),
        ("exact", card.exact, card.exact == is_exact(index)),
        ("nprobe", card.nprobe, min(1, lists) <= card.nprobe <= lists),
    ):
        if not ok:
            raise _damaged(path, "a card that fits the index", f"{name} {said}")


def _check_file(path: Path, card: IndexCard, datastore: str, *, everything: bool) -> None:
    if card.datastore != datastore:
        raise IndexFileError(
            f"{path} is an index of another datastore",
            expected=f"datastore {datastore[:12]}...",
            found=f"datastore {card.datastore[:12]}...",
            do=BUILD,
        )
    if altered(path, card.chunks, everything=everything, size=card.bytes):
        raise _damaged(path, "the bytes that were written", "other ones (checksums differ)")


def write_file(index: Any, path: Path) -> None:
    """Writes a FAISS index that is in the CPU's memory.

    By way of Python, since FAISS itself passes over what fails at the end of a file.

    Raises:
        OSError: where that fails.
    """
    with path.open("wb", buffering=0) as file:

        def write(some: Any) -> None:
            left = memoryview(some)
            while left:
                left = left[file.write(left) :]

        # Its type stubs leave this class out.
        writer: Any = faiss.PyCallbackIOWriter(write, 2**20)  # type: ignore[attr-defined]
        faiss.write_index(index, writer)


def read_file(path: Path, flags: int = 0) -> Any:
    """Reads a FAISS index, with FAISS's flags for reading.

    Raises:
        IndexFileError: where FAISS cannot.
    """
    try:
        return faiss.read_index(str(path), flags)
    except (RuntimeError, MemoryError) as error:
        raise _damaged(path, "an index that FAISS reads", reason(error)) from None


def _map_file(path: Path, exact: bool) -> Any:
    """An index whose codes stay in the file; ``exact`` where its card says that it is."""
    if exact:
        return read_file(path, faiss.IO_FLAG_MMAP_IFC)
    index = read_file(path, faiss.IO_FLAG_MMAP)
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
        do=BUILD,
    )


def _of_another(path: Path, rows: int, width: int, found_rows: int, found: int) -> IndexFileError:
    return IndexFileError(
        f"{path} is an index of another datastore",
        expected=f"{rows:,} keys of width {width}",
        found=f"{found_rows:,} keys of width {found}",
        do=BUILD,
    )


def _foreign_card(path: Path, rows: int, width: int) -> IndexCard:
    """What an index that another program built is, as far as it can be known and checked."""
    found = looked_at(path)
    if "error" in found:
        raise _damaged(path, "an index that FAISS reads and searches", found["error"])
    if found["behind"]:
        raise _damaged(
            path, "the end of the file where FAISS's index ends", f"{found['behind']:,} more bytes"
        )
    if (found["rows"], found["width"]) != (rows, width):
        raise _of_another(path, rows, width, found["rows"], found["width"])
    ids = {"held": rows, "lowest": 0, "highest": rows - 1}
    if any(found[name] != number for name, number in ids.items()):
        raise IndexFileError(
            f"{path} does not hold the rows of the datastore",
            expected=f"{rows:,} ids from 0 to {rows - 1:,}",
            found="{held:,} ids from {lowest:,} to {highest:,}".format(**found),
            do=BUILD,
        )
    metric = next((name for name, kind in METRICS.items() if kind == found["metric"]), None)
    if metric is None:
        raise IndexFileError(
            f"{path} compares keys in another way",
            expected="squared L2 or inner product",
            found=f"FAISS's metric {found['metric']}",
            do=BUILD,
        )
    logger.warning(
        "%s has no card, so it is taken as another program's %s: its ids, metric and width fit, "
        "but nothing tells whether it is whole, or of these keys. Lists are visited as in the "
        "paper, %d a query, unless --probe says otherwise.",
        path,
        found["kind"],
        FOREIGN_NPROBE,
    )
    return IndexCard(
        factory=found["inner"],
        metric=metric,
        rows=rows,
        width=width,
        nprobe=FOREIGN_NPROBE if found["lists"] else 0,
        exact=found["kind"] in ("IndexFlat", "IndexFlatL2", "IndexFlatIP"),
    )


def check_factory(factory: str, width: int, metric: str = "l2") -> None:
    """Tries a FAISS factory string where a crash does no harm, unless it is one that is known.

    Args:
        factory: FAISS's factory string.
        width: dimensions of a key, D.
        metric: ``"l2"`` or ``"ip"``.

    Raises:
        IndexFileError: where FAISS cannot make, fill and search such an index.
    """
    if KNOWN_RECIPES.fullmatch(factory):
        return
    found = obstacle_to_recipe(factory, width, METRICS[metric])
    if found is not None:
        shown = factory if len(factory) <= 60 else f"{factory[:60]}..."
        raise IndexFileError(
            f"FAISS cannot make the index {shown!r} for keys of width {width}",
            expected=RECIPES,
            found=found,
            do="build with --recipe auto, or see FAISS's index factory",
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
