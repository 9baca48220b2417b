"""Whether the processes of a Ray have the same libraries, on which figures depend."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fairseq_knnlm.errors import KnnlmError

logger = logging.getLogger(__name__)

#: Without the same versions of these nothing goes on: neighbours would be others.
NEEDED = "fairseq_knnlm", "faiss"
#: Other versions of these may show in last digits.
NAMED = "numpy", "torch"


def check_needed(ours: Mapping[str, str], theirs: Mapping[str, str], where: str) -> None:
    """Refuses a worker whose libraries would find other neighbours.

    Args:
        ours: versions in the process that asks, by library, as ``versions()`` gives them.
        theirs: in the worker.
        where: the worker's machine, in words.

    Raises:
        KnnlmError: naming the first difference.
    """
    for name in NEEDED:
        if ours[name] != theirs[name]:
            raise KnnlmError(
                f"a worker of Ray has another {name}, and figures depend on it",
                expected=f"{name} {ours[name]}, as in the process that asks",
                found=f"{name} {theirs[name]} on {where}",
                do="install the same versions on all machines (constraints.txt)",
            )


def name_others(ours: Mapping[str, str], theirs: Mapping[str, str], where: str) -> None:
    """Says in the log what else differs."""
    for name in NAMED:
        if ours[name] != theirs[name]:
            logger.warning(
                "%s has %s %s, and this process %s: last digits may differ",
                where,
                name,
                theirs[name],
                ours[name],
            )
