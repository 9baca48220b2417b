"""Nearest-neighbour language models for fairseq.

Importing the package registers the task ``knn_lm``, which is how ``--user-dir`` uses it.
"""

from fairseq_knnlm.host import settle_in

settle_in()  # before the task, whose imports may already have something to say to the user

from fairseq_knnlm import task  # noqa: E402, F401

__version__ = "0.1.0"
