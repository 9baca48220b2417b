"""Builds the FAISS index of a datastore.

    python examples/build_index.py --dstore DSTORE --recipe auto

The same as ``fairseq-knnlm build-index``; see ``--help``.
"""

import sys
from pathlib import Path

# Also from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fairseq_knnlm.cli import main

if __name__ == "__main__":
    sys.exit(main(["build-index", *sys.argv[1:]]))
