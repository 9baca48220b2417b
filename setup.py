"""Packaging of fairseq_knnlm; `make setup` builds a ready environment around it."""

from setuptools import find_packages, setup

# It is imported as `fairseq`; the distribution of that name works up to Python 3.10 only.
FAIRSEQ = "fairseq-fixed==0.12.3.1"

setup(
    name="fairseq-knnlm",
    version="0.1.0",
    description="Nearest-neighbour language models for fairseq",
    license="MIT",
    packages=find_packages(include=["fairseq_knnlm", "fairseq_knnlm.*"]),
    python_requires=">=3.11",
    install_requires=[FAIRSEQ, "torch>=2.0", "numpy", "safetensors", "msgspec", "tqdm"],
    extras_require={
        # FAISS: one of these two. Requirements cannot say "either", so neither is forced on an
        # environment that has the other; the package asks for one when it needs it.
        "cpu": ["faiss-cpu>=1.8"],
        "gpu": ["faiss-gpu>=1.15"],
        "demo": ["sentencepiece", "rich"],
        "plot": ["matplotlib"],
        "cluster": ["ray"],
        "dev": ["mypy", "pytest", "pytest-xdist", "ruff", "types-tqdm"],
    },
    entry_points={"console_scripts": ["fairseq-knnlm = fairseq_knnlm.cli:main"]},
)
