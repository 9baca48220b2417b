"""The command ``fairseq-knnlm``, one file a subcommand; ``tables`` prints their tables.

Each file has ``HELP`` and an ``EXAMPLE``, ``add_arguments``, ``check`` (what can be refused before
anything is opened) and ``run``. What takes long or is worth calling from Python lies in ``runs``.

Nothing that is imported at the top of these files imports torch, fairseq or FAISS, which take
seconds: such imports stand within the functions that need them, so that ``--help`` and ``info``
answer at once.
"""

from fairseq_knnlm.cli.main import main

__all__ = ["main"]
