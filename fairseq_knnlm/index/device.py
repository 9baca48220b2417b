"""Where an index is searched: the CPU, a GPU, or shards on several."""

from __future__ import annotations

import logging
from typing import Any

import torch

from fairseq_knnlm.errors import ConfigError, IndexFileError
from fairseq_knnlm.index.card import IndexCard
from fairseq_knnlm.index.library import faiss, innermost, set_nprobe
from fairseq_knnlm.index.search import SearchIndex

logger = logging.getLogger(__name__)

#: FAISS's limits on a GPU (k and nprobe; the sizes of 8-bit product codes).
GPU_MAX = 2048
GPU_CODE_SIZES = {1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96}


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
    inner = innermost(index)
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

    set_nprobe(index, card.nprobe)  # the clones inherit it
    options = faiss.GpuMultipleClonerOptions()
    # Lookup tables for 64-byte codes fit in shared memory in float16 only; full keys stay float32.
    options.useFloat16 = isinstance(innermost(index), faiss.IndexIVFPQ)
    options.shard = len(gpus) > 1
    resources = [faiss.StandardGpuResources() for _ in gpus]
    placed = faiss.index_cpu_to_gpu_multiple_py(resources, index, options, gpus)
    return SearchIndex(placed, card, resources)
