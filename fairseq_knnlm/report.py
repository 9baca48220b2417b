"""What a run measured, as a dictionary and as lines to read."""

from __future__ import annotations

import math
from typing import Any


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
    """Mean loss in bits; None (JSON's null) where it is infinite or there are no tokens."""
    if not tokens or math.isinf(log_prob):
        return None
    return -log_prob / tokens / math.log(2)


def _power(loss: float | None) -> float | None:
    return None if loss is None else 2**loss


def closing_lines(found: dict[str, Any]) -> list[str]:
    """The end of a run's report."""
    lines = [_line("base LM", found["base_loss"], found["base_perplexity"], found["tokens"])]
    if "lambda" in found:
        lines.append(_line("kNN-LM", found["loss"], found["perplexity"], found["tokens"]))
        lines.append(
            f"lambda {found['lambda']:g}, temperature {found['temperature']:g} "
            f"({found['mixture_from']}), k {found['k']}"
        )
        lines.append(f"index {found['index']}; distances {found['distances']}")
    speed = f"{found['tokens_per_second']:,.0f} tokens/s over {found['seconds']:.1f} s"
    if "search_seconds" in found:
        speed += f", of which search {found['search_seconds']:.1f} s"
    return [*lines, speed]


def _line(name: str, loss: float | None, perplexity: float | None, tokens: int) -> str:
    if loss is None or perplexity is None:
        return f"{name:<8} perplexity infinite"
    return f"{name:<8} perplexity {perplexity:.2f}, loss {loss:.4f} bits, {tokens:,} tokens"
