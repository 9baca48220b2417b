"""The version of this package, and those of the libraries that results depend on."""

from __future__ import annotations

import platform

#: Of this package: the one place that says it, which setup.py reads too.
VERSION = "0.2.0"
#: The same import name comes from either of several distributions.
LIBRARIES = {
    "fairseq": ("fairseq-fixed", "fairseq"),
    "torch": ("torch",),
    "faiss": ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs"),
    "numpy": ("numpy",),
}


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of libraries; ``"unknown"`` for what is not installed
    by name.
    """
    found = {name: _first(distributions) for name, distributions in LIBRARIES.items()}
    return {"python": platform.python_version(), "fairseq_knnlm": VERSION, **found}


def _first(distributions: tuple[str, ...]) -> str:
    # Here, since every import of the package passes by, and few ask.
    from importlib.metadata import PackageNotFoundError, version

    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"
