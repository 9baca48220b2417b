"""What fairseq was given besides the flags of ``knn_lm``, as it is typed again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fairseq.tasks.language_modeling import LanguageModelingConfig

from fairseq_knnlm.experts.kind import spelled
from fairseq_knnlm.runs.inputs import Inputs
from fairseq_knnlm.runs.origins import MAX_TOKENS
from fairseq_knnlm.runs.receipt import CHECKPOINT, DATA, Typed
from fairseq_knnlm.tasks import stock

#: Flags of fairseq's task by which a text is read, besides those that every run tells.
OF_THE_TASK = (
    *("max_target_positions", "output_dictionary_size", "self_target", "future_target"),
    *("past_target", "shorten_method", "shorten_data_split_list"),
)


def typed_run(whole: Any, known: Any, inputs: Inputs) -> Typed:
    """What a run of ``fairseq-eval-lm`` was given.

    Args:
        whole: fairseq's whole configuration.
        known: the task's part of it.
        inputs: what the run works on.
    """
    data, path = str(known.data), str(whole.common_eval.path)
    return Typed(
        data=stock.folder(data),
        reading=_reading(whole, known, inputs),
        files={
            CHECKPOINT: [path] if Path(path).is_file() else path.split(os.pathsep),
            DATA: stock.data_files(data, inputs.split),
        },
    )


def _reading(whole: Any, known: Any, inputs: Inputs) -> dict[str, str | None]:
    """The flags, by name; None of those without a value."""
    window = int(whole.eval_lm.context_window)
    found: dict[str, str | None] = {
        "--gen-subset": inputs.split,
        # fairseq counts the window in, and takes it off again
        "--tokens-per-sample": str(int(known.tokens_per_sample) + window),
        "--context-window": str(window),
        "--sample-break-mode": str(known.sample_break_mode),
        "--max-tokens": str(inputs.batches.get("max_tokens") or MAX_TOKENS),
    }
    if (size := inputs.batches.get("batch_size")) is not None:
        found["--batch-size"] = str(size)
    if (overrides := str(whole.common_eval.model_overrides)) != "{}":
        found["--model-overrides"] = overrides
    for name, given in (
        ("--add-bos-token", known.add_bos_token),
        ("--fp16", whole.common.fp16),
        (
            "--skip-invalid-size-inputs-valid-test",
            whole.dataset.skip_invalid_size_inputs_valid_test,
        ),
    ):
        if given:
            found[name] = None
    fields = LanguageModelingConfig.__dataclass_fields__
    for name in OF_THE_TASK:
        value = getattr(known, name)
        value = getattr(value, "value", value)
        default = fields[name].default
        if value != getattr(default, "value", default):
            found[spelled(name)] = None if value is True else str(value)
    return found
