"""What a run measured, as lines to read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fairseq_knnlm.experts.kind import Kind
from fairseq_knnlm.runs.conditions import condition_lines

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
    for line in doubts(found):
        logger.warning(line)
    if (share := found.get("share")) is not None:
        logger.info(
            "share %s of %s (--shard-id): these figures, and the loss that fairseq tells below, "
            "are of its %s of %s tokens; what all shares write joins to the whole by "
            "`fairseq-knnlm report --join FILES`, of --results-json or --score-table",
            *(share["number"], share["of"], f"{found['tokens']:,}", f"{share['of_tokens']:,}"),
        )


def doubts(found: dict[str, Any]) -> Iterator[str]:
    """Why its figures say little, if anything.

    Args:
        found: the results.
    """
    if found.get("tokens_recalled", 0) > RECALLED * found["tokens"]:
        yield (
            f"{found['tokens_recalled']:,} of {found['tokens']:,} tokens have an entry of their "
            "own in the datastore, at no distance: it seems to hold the evaluated text, and then "
            "the perplexity says nothing"
        )
    if found["tokens_impossible"]:
        yield f"{found['tokens_impossible']:,} tokens have probability 0: the loss is infinite"


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
    lines += comparable_lines(found)
    for kind in kinds:
        lines += kind.lines(found)
    speed = f"{found['tokens_per_second']:,.0f} tokens/s over {found['seconds']:.1f} s"
    if "search_seconds" in found:
        speed += f", of which search {found['search_seconds']:.1f} s"
    if "searches_skipped" in found:
        speed += f"; {found['searches_skipped']:.1%} of the searches skipped"
    return [*lines, speed]


def comparable_lines(found: Mapping[str, Any]) -> list[str]:
    """What figures need to be compared with others.

    Args:
        found: the results.
    """
    return [*_error_lines(found), *_text_lines(found), *condition_lines(found)]


def _error_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """How far the losses would go another way on other text like it."""
    if (error := found.get("loss_error")) is None:
        return
    if found.get("mixed") and found.get("gain_error") is not None:
        gain = f"gain {found['gain']:.4f} bits, standard error {found['gain_error']:.4f}; "
    else:
        gain = ""
    yield f"{gain}standard error of the loss {error:.4f} bits, by {found['errors_by']}"


def _text_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Figures a word and a byte."""
    if (text := found.get("text")) is None or found["word_perplexity"] is None:
        return
    unknown = f", {text['unknown']:,} of the tokens unknown" if text["unknown"] else ""
    yield (
        f"a word: perplexity {found['word_perplexity']:.2f} (base LM "
        f"{found['base_word_perplexity']:.2f}); a byte: {found['byte_perplexity']:.4f}, "
        f"{found['bits_per_byte']:.4f} bits (base LM {found['base_bits_per_byte']:.4f}); of "
        f"{text['words']:,} words and {text['bytes']:,} bytes ({text['source']}{unknown})"
    )


def _is_knn(expert: str) -> bool:
    return expert.startswith("knn")


def _line(name: str, loss: float | None, perplexity: float | None, tokens: int) -> str:
    if loss is None or perplexity is None:
        return f"{name:<8} perplexity infinite"
    return f"{name:<8} perplexity {perplexity:.2f}, loss {loss:.4f} bits, {tokens:,} tokens"
