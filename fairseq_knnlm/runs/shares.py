"""What a share of an evaluation says of itself, so that all of them can be joined to a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fairseq_knnlm.experts.registry import kinds
from fairseq_knnlm.lm.precision import precision
from fairseq_knnlm.runs.inputs import Inputs
from fairseq_knnlm.runs.mixing import described
from fairseq_knnlm.runs.options import Options
from fairseq_knnlm.runs.scorer import Tally

#: Flags that name where something lies. What lies there is known by its fingerprint.
PLACES = {"dstore_filename", "indexfile"}
#: Flags that leave every figure as it is.
IDLE = {"move_dstore_to_mem", "mmap_index"}


@dataclass(frozen=True)
class BatchRange:
    """Which batches of a run over a whole split a share has.

    Attributes:
        number: of the share, from 0.
        of: shares.
        first_batch: of the share, from 0.
        batches: that it has.
        of_batches: of the whole run.
        of_tokens: of the whole run, without those left out.
    """

    number: int
    of: int
    first_batch: int
    batches: int
    of_batches: int
    of_tokens: int


def share_of(
    inputs: Inputs, batch_range: BatchRange, tally: Tally, counts: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """What a share says of itself: a ``Share``, as JSON.

    Args:
        inputs: what the run worked on.
        batch_range: the share.
        tally: once all is scored.
        counts: by the kind of expert, what it counted.
    """
    memory = inputs.memory
    calibration = memory.calibration if memory is not None else None
    return {
        **asdict(batch_range),
        "model": inputs.model,
        "precision": precision(inputs.models[0]),
        "datastores": [one.fingerprint for one in memory.stores] if memory is not None else [],
        "calibration": calibration.fingerprint if calibration is not None else None,
        "described": described(memory.experts, inputs.loaded) if memory is not None else {},
        "flags": dict(given_flags(inputs.options)),
        "base_log_prob": tally.base.parts,
        "log_prob": tally.mixed.parts,
        "counts": {name: dict(some) for name, some in counts.items()},
        "sections": tally.sections.parts if tally.sections is not None else {},
    }


def given_flags(options: Options) -> Iterator[tuple[str, Any]]:
    """Flags that say anything but what they say where they are left out, and matter to figures."""
    checkpoints = {name for kind in kinds() for name in kind.flags("checkpoint")}
    of_a_run = options.lm, options.reading, options.datastores, options.mixing
    for some in (*of_a_run, *options.experts.values()):
        for one in fields(some):
            value = getattr(some, one.name)
            if one.name not in PLACES | IDLE | checkpoints and value != one.default:
                yield one.name, value
