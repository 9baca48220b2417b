"""What a run measured, as lines to read."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from fairseq_knnlm.experts.kind import Kind

logger = logging.getLogger(__name__)

#: Share of the tokens with an entry of their own from which a datastore seems to hold the text.
RECALLED = 0.25


def tell(found: dict[str, Any], kinds: Iterable[Kind]) -> None:
    """Logs the end of a run's report, and warns where its figures say little.

    Args:
        found: the results.
        kinds: of the experts that were asked.
    """
    for line in closing_lines(found, kinds):
        logger.info(line)
    if found.get("tokens_recalled", 0) > RECALLED * found["tokens"]:
        logger.warning(
            "%s of %s tokens have an entry of their own in the datastore, at no distance: it "
            "seems to hold the evaluated text, and then the perplexity says nothing",
            *(f"{found[name]:,}" for name in ("tokens_recalled", "tokens")),
        )
    if found["tokens_impossible"]:
        logger.warning(
            "%s tokens have probability 0: the loss is infinite",
            f"{found['tokens_impossible']:,}",
        )


def closing_lines(found: dict[str, Any], kinds: Iterable[Kind] = ()) -> list[str]:
    """The end of a run's report.

    Args:
        found: the results.
        kinds: of the experts that were asked.
    """
    if not found["tokens"]:
        return ["no tokens were scored"]
    lines = [_line("base LM", found["base_loss"], found["base_perplexity"], found["tokens"])]
    if "mixture" in found:
        if found["mixed"]:
            name = "kNN-LM" if all(map(_is_knn, found["mixed"])) else "mixture"
            lines.append(_line(name, found["loss"], found["perplexity"], found["tokens"]))
        lines.append(f"{found['mixture']} ({found['mixture_from']})")
    for kind in kinds:
        lines += kind.lines(found)
    speed = f"{found['tokens_per_second']:,.0f} tokens/s over {found['seconds']:.1f} s"
    if "search_seconds" in found:
        speed += f", of which search {found['search_seconds']:.1f} s"
    if "searches_skipped" in found:
        speed += f"; {found['searches_skipped']:.1%} of the searches skipped"
    return [*lines, speed]


def _is_knn(expert: str) -> bool:
    return expert.startswith("knn")


def _line(name: str, loss: float | None, perplexity: float | None, tokens: int) -> str:
    if loss is None or perplexity is None:
        return f"{name:<8} perplexity infinite"
    return f"{name:<8} perplexity {perplexity:.2f}, loss {loss:.4f} bits, {tokens:,} tokens"
