"""What computes: the last digits of a language model's keys depend on it."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from torch import nn

#: Where Linux says what the processor is.
CPUINFO = Path("/proc/cpuinfo")


def processor(model: nn.Module) -> str:
    """The processor that a model is on, and what PyTorch uses of it.

    Returns:
        Such as ``"AMD EPYC 7B13, AVX2"`` or ``"NVIDIA H100, CUDA 12.4"``.
    """
    device = next(model.parameters()).device
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    if device.type != "cpu":
        return device.type
    return f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"


def _cpu_name() -> str:
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.machine() or "unknown"
