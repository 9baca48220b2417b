"""Packaging of fairseq_knnlm; `make setup` builds a ready environment around it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
# Read, not imported: what the package needs may not be there yet.
VERSIONS = (HERE / "fairseq_knnlm/versions.py").read_text(encoding="utf-8")
# It is imported as `fairseq`; the distribution of that name works up to Python 3.10 only.
FAIRSEQ = "fairseq-fixed==0.12.3.1"

setup(
    name="fairseq-knnlm",
    version=re.findall(r'^VERSION = "(.*)"$', VERSIONS, re.MULTILINE)[0],
    description="Nearest-neighbour language models for fairseq",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["fairseq_knnlm", "fairseq_knnlm.*"]),
    package_data={"fairseq_knnlm": ["py.typed", "explanation/template/*"]},
    zip_safe=False,  # fairseq is given the package's folder
    python_requires=">=3.11",
    install_requires=[FAIRSEQ, "torch>=2.0", "numpy", "safetensors", "msgspec", "rich", "tqdm"],
    extras_require={
        # FAISS: one of these two. Requirements cannot say "either", so neither is forced on an
        # environment that has the other; the package asks for one when it needs it.
        "cpu": ["faiss-cpu>=1.8"],
        "gpu": ["faiss-gpu>=1.15"],
        "demo": ["sentencepiece"],
        # Tried with transformers 5.24, tokenizers 0.23.
        "hf": ["transformers>=5", "tokenizers"],
        "plot": ["matplotlib"],
        "cluster": ["ray>=2.40"],
        "dev": ["mypy", "pytest", "pytest-xdist", "ruff", "selenium", "types-tqdm"],
    },
    entry_points={"console_scripts": ["fairseq-knnlm = fairseq_knnlm.cli:main"]},
)
