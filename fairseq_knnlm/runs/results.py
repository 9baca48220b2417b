"""What a run measured, as a dictionary: for the results JSON and for a score table's card."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import numpy as np

from fairseq_knnlm.calibration.card import Card
from fairseq_knnlm.calibration.sections import METHOD, Sections
from fairseq_knnlm.experts.kind import Kind
from fairseq_knnlm.experts.registry import find_kind
from fairseq_knnlm.mixture.mixers import Fixed
from fairseq_knnlm.mixture.skipping import SkippingMixtureLM
from fairseq_knnlm.runs.conditions import conditions
from fairseq_knnlm.runs.inputs import Inputs
from fairseq_knnlm.runs.mixing import describe, described, mixed_experts
from fairseq_knnlm.runs.opening import Memory
from fairseq_knnlm.runs.raw_text import RawText, text_figures
from fairseq_knnlm.runs.scorer import KnnScorer
from fairseq_knnlm.runs.shares import BatchRange, share_of
from fairseq_knnlm.versions import versions

#: The loss whose perplexity a float can just hold.
MOST_BITS = 1023
#: Stands among the kinds of experts for what was counted of skipped searches.
SKIPPING = "skipping"


def run_results(
    inputs: Inputs,
    scorer: KnnScorer,
    left_out: int,
    batch_range: BatchRange | None = None,
    text: RawText | None = None,
) -> dict[str, Any]:
    """All that there is to tell of a run.

    Args:
        inputs: what it worked on.
        scorer: what scored, once all is scored.
        left_out: tokens in blocks that fairseq dropped.
        batch_range: the share of the run that this is; None of a whole one.
        text: what figures a word and a byte are taken over, where it is known.
    """
    tally, counts = scorer.tally, _counts(inputs.memory, scorer)
    sums = tally.sections
    sections = sums.sections if sums is not None else None
    found = losses(
        tokens=tally.tokens,
        base_log_prob=tally.base.value,
        log_prob=tally.mixed.value,
        seconds=tally.seconds,
        impossible=tally.impossible,
        left_out=left_out,
        sections=sections,
    )
    whole = batch_range is None
    found |= text_figures(text, tally.base.value, tally.mixed.value, whole=whole)
    if inputs.memory is not None:
        found |= mixed_results(inputs.memory, scorer) | figures(counts)
    found |= {"split": inputs.split, "context": inputs.told_context, "versions": versions()}
    found["conditions"] = conditions(inputs, scorer)
    if sums is not None and sections is not None:
        found["sections"] = told_sections(sections) | {"rows": sums.rows.tolist()}
    if batch_range is not None:
        found["share"] = share_of(inputs, batch_range, tally, counts)
    return found


def losses(
    *,
    tokens: int,
    base_log_prob: float,
    log_prob: float,
    seconds: float,
    impossible: int = 0,
    left_out: int = 0,
    sections: Sections | None = None,
) -> dict[str, Any]:
    """Losses in bits a token, their standard errors, perplexities, and speed.

    Args:
        tokens: scored tokens.
        base_log_prob: sum of log p_LM, natural log.
        log_prob: sum of log p of the mixture, natural log.
        seconds: spent scoring.
        impossible: tokens that the mixture gives no probability; its loss is then infinite.
        left_out: tokens in blocks that fairseq dropped because they are too long.
        sections: the same sums by sections of the text, where it is one.
    """
    base_loss, loss = (_bits(total, tokens) for total in (base_log_prob, log_prob))
    gain = base_loss - loss if base_loss is not None and loss is not None else None
    return {
        "tokens": tokens,
        "tokens_left_out": left_out,
        "tokens_impossible": impossible,
        "base_loss": base_loss,
        "base_loss_error": sections.base_error if sections and base_loss is not None else None,
        "base_perplexity": _power(base_loss),
        "loss": loss,
        "loss_error": sections.error if sections and loss is not None else None,
        "perplexity": _power(loss),
        "gain": gain,
        "gain_error": sections.gain_error if sections and gain is not None else None,
        "errors_by": METHOD,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
    }


def told_sections(sections: Sections) -> dict[str, Any]:
    """Sums over sections of the text, natural log, as JSON; null where a token is impossible."""

    def told(sums: np.ndarray) -> list[float | None]:
        return [one if math.isfinite(one) else None for one in sums.tolist()]

    return {
        "tokens": sections.tokens.tolist(),
        "base_log_prob": told(sections.base),
        "log_prob": told(sections.mixed),
    }


def _bits(log_prob: float, tokens: int) -> float | None:
    """Mean loss in bits; None (JSON's null) where it is no number or there are no tokens."""
    if not tokens or not math.isfinite(log_prob):
        return None
    return -log_prob / tokens / math.log(2)


def _power(loss: float | None) -> float | None:
    return None if loss is None or loss > MOST_BITS else 2**loss


def mixed_results(memory: Memory, scorer: KnnScorer) -> dict[str, Any]:
    """What was mixed."""
    mixture = scorer.mixture
    found: dict[str, Any] = {
        "experts": list(memory.experts),
        "mixed": mixed_experts(mixture.mixer),
        "mixer": mixture.mixer.kind,
        "mixture": describe(mixture.mixer),
        "mixture_from": scorer.mixture_from,
    }
    if isinstance(mixture.mixer, Fixed):
        pairs = zip(mixture.mixer.components, mixture.mixer.weights, strict=True)
        found["weights"] = [
            {"expert": component.expert, "weight": weight, **component.setting}
            for component, weight in pairs
        ]
    for kind, opened in memory.by_kind.items():
        experts = [expert for expert in mixture.experts if find_kind(expert.name) is kind]
        found |= kind.results(opened, experts)
    if memory.stores:
        found |= {
            "datastore": ":".join(str(store.path) for store in memory.stores),
            "entries": sum(map(len, memory.stores)),
        }
    return found


def _counts(memory: Memory | None, scorer: KnnScorer) -> dict[str, dict[str, float]]:
    """By the kind of expert, what it counted; skipped searches by their own name."""
    mixture = scorer.mixture
    found = {
        kind.name: kind.counts([one for one in mixture.experts if find_kind(one.name) is kind])
        for kind in (memory.by_kind if memory is not None else ())
    }
    if isinstance(mixture, SkippingMixtureLM):
        found[SKIPPING] = {"tokens": mixture.tokens, "searched": mixture.searched}
    return {name: counts for name, counts in found.items() if counts}


def figures(counts: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """What results tell of what was counted.

    Args:
        counts: by the kind of expert, as a run counted them, or their sums over its shares.
    """
    found: dict[str, Any] = {}
    for name, some in counts.items():
        if name == SKIPPING:
            found["searches_skipped"] = 1 - some["searched"] / max(some["tokens"], 1)
        else:  # a kind from outside the package may not be known here
            found |= (find_kind(name) or Kind()).figures(some)
    return found


def table_card(
    inputs: Inputs, scorer: KnnScorer, features: Iterable[str], found: Mapping[str, Any]
) -> dict[str, Any]:
    """What the score table says of itself: the results, and what its columns are.

    Args:
        inputs: what the run worked on.
        scorer: what scored.
        features: names of the columns that are features.
        found: the results, of which a table keeps what every reader of tables knows.
    """
    known = {one.name for one in msgspec.structs.fields(Card)}
    card = {name: value for name, value in found.items() if name in known}
    card |= {"model": inputs.model, "experts": {}, "features": []}
    memory = inputs.memory
    if memory is not None:
        card |= {
            "datastores": [store.fingerprint for store in memory.stores],
            "described": described(memory.experts, inputs.loaded),
            "experts": {
                expert.name: [dict(column) for column in expert.settings]
                for expert in scorer.mixture.experts
                if expert.settings
            },
            "features": sorted(features),
        }
        for kind, opened in memory.by_kind.items():
            card |= kind.card(opened)
    return card
