"""Nearest-neighbour language models for fairseq.

Importing the package loads nothing heavy: a datastore or a score table can be read anywhere, at
once. The task ``knn_lm`` is registered by ``fairseq_knnlm.tasks``, which fairseq imports by itself
where the package is its ``--user-dir``, and which is imported here where fairseq is there already.
"""

import sys

from fairseq_knnlm.versions import VERSION

__version__ = VERSION

if "fairseq.tasks" in sys.modules:
    from fairseq_knnlm import tasks  # noqa: F401
