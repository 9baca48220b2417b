"""Nearest-neighbour language models for fairseq.

Importing the package loads nothing heavy: a datastore or a score table can be read anywhere, at
once. The task ``knn_lm`` is registered by ``fairseq_knnlm.tasks``, which fairseq imports by itself
where the package is its ``--user-dir``, and which is imported here where fairseq is there already;
but not where another package is its ``--user-dir``, which may have experts to add before.
"""

import sys
from pathlib import Path

from fairseq_knnlm.versions import VERSION

__version__ = VERSION


def _is_for_another() -> bool:
    """Whether fairseq was told of another ``--user-dir``, and not of this package."""
    read = getattr(sys.modules.get("fairseq.utils"), "import_user_module", None)
    folders = getattr(read, "memo", ())
    return bool(folders) and str(Path(__file__).resolve().parent) not in map(_resolved, folders)


def _resolved(folder: str) -> str:
    return str(Path(folder).resolve())


if "fairseq.tasks" in sys.modules and not _is_for_another():
    from fairseq_knnlm import tasks  # noqa: F401
