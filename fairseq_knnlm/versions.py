"""Versions of the libraries that results depend on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

#: The same import name comes from either of several distributions.
LIBRARIES = {
    "fairseq_knnlm": ("fairseq-knnlm",),
    "fairseq": ("fairseq-fixed", "fairseq"),
    "torch": ("torch",),
    "faiss": ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs"),
    "numpy": ("numpy",),
}


def versions() -> dict[str, str]:
    """Library versions, Python's included; ``"unknown"`` for what is not installed by name."""
    found = {name: _first(distributions) for name, distributions in LIBRARIES.items()}
    return {"python": platform.python_version(), **found}


def _first(distributions: tuple[str, ...]) -> str:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"
