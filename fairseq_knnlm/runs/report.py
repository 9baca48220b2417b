"""What a run measured, as a dictionary and as lines to read."""

from __future__ import annotations

import math
from typing import Any

#: The loss whose perplexity a float can just hold.
MOST_BITS = 1023


def results(
    *,
    tokens: int,
    base_log_prob: float,
    log_prob: float,
    seconds: float,
    impossible: int = 0,
    left_out: int = 0,
) -> dict[str, Any]:
    """Losses in bits a token, perplexities, and speed.

    Args:
        tokens: scored tokens.
        base_log_prob: sum of log p_LM, natural log.
        log_prob: sum of log p of the mixture, natural log.
        seconds: spent scoring.
        impossible: tokens that the mixture gives no probability; its loss is then infinite.
        left_out: tokens in blocks that fairseq dropped because they are too long.
    """
    base_loss, loss = (_bits(total, tokens) for total in (base_log_prob, log_prob))
    return {
        "tokens": tokens,
        "tokens_left_out": left_out,
        "tokens_impossible": impossible,
        "base_loss": base_loss,
        "base_perplexity": _power(base_loss),
        "loss": loss,
        "perplexity": _power(loss),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
    }


def _bits(log_prob: float, tokens: int) -> float | None:
    """Mean loss in bits; None (JSON's null) where it is no number or there are no tokens."""
    if not tokens or not math.isfinite(log_prob):
        return None
    return -log_prob / tokens / math.log(2)


def _power(loss: float | None) -> float | None:
    return None if loss is None or loss > MOST_BITS else 2**loss


def closing_lines(found: dict[str, Any]) -> list[str]:
    """The end of a run's report."""
    if not found["tokens"]:
        return ["no tokens were scored"]
    lines = [_line("base LM", found["base_loss"], found["base_perplexity"], found["tokens"])]
    if "mixture" in found:
        if found["mixed"]:
            name = "kNN-LM" if all(map(_is_knn, found["mixed"])) else "mixture"
            lines.append(_line(name, found["loss"], found["perplexity"], found["tokens"]))
        lines.append(f"{found['mixture']} ({found['mixture_from']})")
    if "index" in found:
        lines.append(f"k {found['k']}, index {found['index']}; distances {found['distances']}")
    if "pointers" in found:
        lines.append(f"pointers {found['pointers']}: {found['searches_saved']:.1%} searches saved")
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
