"""Under which conditions figures hold: what stands before a token, and what was fitted on what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairseq_knnlm.runs.inputs import Inputs
from fairseq_knnlm.runs.scorer import KnnScorer


def conditions(inputs: Inputs, scorer: KnnScorer) -> dict[str, Any]:
    """What belongs to a figure for it to be compared with others.

    Args:
        inputs: what the run worked on.
        scorer: what scored.

    Returns:
        ``stride``, tokens from one block to the next, and of the scored tokens and of the entries
        of each datastore how many tokens stand before them, as [least, most]; the splits of these;
        and what the weights were fitted on, if anything.
    """
    memory = inputs.memory
    origins = [store.manifest.origin for store in memory.stores] if memory is not None else []
    calibration = memory.calibration if memory is not None else None
    return {
        "stride": stride(inputs.context or {}),
        "context_of_queries": reach(inputs.context or {}),
        "context_of_keys": [reach(origin.context) for origin in origins],
        "datastores_of": [origin.split for origin in origins],
        "fitted_on": {name: calibration.fitted_on[name] for name in ("split", "tokens")}
        if calibration is not None and "calibrated on" in scorer.mixture_from
        else None,
    }


def stride(context: Mapping[str, Any]) -> int | None:
    """Tokens from one block, or window, to the next; None where nobody knows.

    Args:
        context: ``tokens_per_sample`` and ``stride``, as a manifest's ``origin`` has them.
    """
    found = context.get("stride") or context.get("tokens_per_sample")
    return found if isinstance(found, int) else None


def reach(context: Mapping[str, Any]) -> list[int] | None:
    """The fewest and the most tokens that stand before one, but for the beginning of the text.

    They are what the model is given until it predicts: behind the window of a block comes the token
    before the block's first one. What ``--add-bos-token`` puts there is not counted.

    Args:
        context: ``tokens_per_sample``, ``context_window`` and ``stride``, as a manifest's
            ``origin`` has them.
    """
    size, apart = context.get("tokens_per_sample"), context.get("stride")
    if not isinstance(size, int):
        return None
    if isinstance(apart, int):  # windows of so many tokens, of which the last ones are predicted
        return [max(1, size - apart), size - 1]
    window = int(context.get("context_window") or 0)
    return [window + 1, window + size]


def condition_lines(found: Mapping[str, Any]) -> list[str]:
    """The same as lines of the report.

    Args:
        found: the results.
    """
    known = found.get("conditions")
    if not known or known["context_of_queries"] is None:
        return []
    parts = [
        f"{tokens_told(known['context_of_queries'])} before each token, stride {known['stride']:,}"
    ]
    for split, context in zip(known["datastores_of"], known["context_of_keys"], strict=True):
        of = f"of {split}" if split else "of a text that is not named"
        parts.append(f"keys {of}" + (f", {tokens_told(context)} before each" if context else ""))
    if (fitted := known["fitted_on"]) is not None:
        parts.append(f"fitted on {fitted['split']}, {fitted['tokens']:,} tokens")
    return ["; ".join(parts)]


def tokens_told(reach: list[int]) -> str:
    """The fewest and the most tokens, in words."""
    least, most = reach
    return f"{least:,} to {most:,} tokens"
