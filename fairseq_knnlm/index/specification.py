"""Factory strings, tried before FAISS is trusted with them. Loads no FAISS itself."""

from __future__ import annotations

import re

from fairseq_knnlm.errors import IndexFileError
from fairseq_knnlm.index.trial import obstacle_to_recipe

#: Factory strings of which FAISS refuses the wrong ones without a crash.
KNOWN_RECIPES = re.compile(
    r"Flat|(PCAR[1-9]\d{0,3},)?IVF[1-9]\d{0,5},(Flat|SQ8|PQ[1-9]\d{0,3}(x4fsr?)?)", re.ASCII
)
#: What a user may ask for.
RECIPES = (
    "auto, paper, or a factory string such as Flat or IVF1024,PQ32x4fs; code sizes divide the "
    "width, and there are more keys than centroids"
)


def check_factory(factory: str, width: int, metric: str = "l2") -> None:
    """Tries a FAISS factory string where a crash does no harm, unless it is one that is known.

    Args:
        factory: FAISS's factory string.
        width: dimensions of a key, D.
        metric: ``"l2"`` or ``"ip"``.

    Raises:
        IndexFileError: where FAISS cannot make, fill and search such an index.
    """
    if KNOWN_RECIPES.fullmatch(factory):
        return
    found = obstacle_to_recipe(factory, width, metric)
    if found is not None:
        shown = factory if len(factory) <= 60 else f"{factory[:60]}..."
        raise IndexFileError(
            f"FAISS cannot make the index {shown!r} for keys of width {width}",
            expected=RECIPES,
            found=found,
            do="build with --recipe auto, or see FAISS's index factory",
        )
