"""An index that another program built, which has no card: taken as far as it can be checked."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fairseq_knnlm.errors import IndexFileError
from fairseq_knnlm.index.card import BUILD, IndexCard, damaged, of_another
from fairseq_knnlm.index.library import METRICS
from fairseq_knnlm.index.trial import looked_at

logger = logging.getLogger(__name__)

#: The paper's nprobe, for an index of which nothing is known.
FOREIGN_NPROBE = 32
_NAMES = {number: name for name, number in METRICS.items()}


def foreign_card(path: Path, rows: int, width: int) -> IndexCard:
    """What an index that another program built is, as far as it can be known and checked.

    Args:
        path: the index file; FAISS looks at it in a process of its own, which it may crash.
        rows: entries of the datastore.
        width: dimensions of its keys.

    Raises:
        IndexFileError: where it cannot be searched, or does not fit the datastore.
    """
    found = looked_at(path)
    _check_found(path, found, rows, width)
    logger.warning(
        "%s has no card, so it is taken as another program's %s: its ids, metric and width fit, "
        "but nothing tells whether it is whole, or of these keys. Lists are visited as in the "
        "paper, %d a query, unless --probe says otherwise.",
        path,
        found["kind"],
        FOREIGN_NPROBE,
    )
    return IndexCard(
        factory=found["inner"],
        metric=_NAMES[found["metric"]],
        rows=rows,
        width=width,
        nprobe=FOREIGN_NPROBE if found["lists"] else 0,
        exact=found["kind"] in ("IndexFlat", "IndexFlatL2", "IndexFlatIP"),
    )


def _check_found(path: Path, found: dict[str, Any], rows: int, width: int) -> None:
    """Refuses what cannot be searched, or is not of ``rows`` keys of this width."""
    if "error" in found:
        raise damaged(path, "an index that FAISS reads and searches", found["error"])
    if found["behind"]:
        raise damaged(
            path, "the end of the file where FAISS's index ends", f"{found['behind']:,} more bytes"
        )
    if (found["rows"], found["width"]) != (rows, width):
        raise of_another(path, rows, width, found["rows"], found["width"])
    ids = {"held": rows, "lowest": 0, "highest": rows - 1}
    if any(found[name] != number for name, number in ids.items()):
        raise IndexFileError(
            f"{path} does not hold the rows of the datastore",
            expected=f"{rows:,} ids from 0 to {rows - 1:,}",
            found="{held:,} ids from {lowest:,} to {highest:,}".format(**found),
            do=BUILD,
        )
    if found["metric"] not in _NAMES:
        raise IndexFileError(
            f"{path} compares keys in another way",
            expected="squared L2 or inner product",
            found=f"FAISS's metric {found['metric']}",
            do=BUILD,
        )
