"""Nearest-neighbour language models for fairseq.

Importing the package registers the task ``knn_lm``, which is how ``--user-dir`` uses it.
"""

from fairseq_knnlm import clean_exit, task  # noqa: F401

__version__ = "0.1.0"
