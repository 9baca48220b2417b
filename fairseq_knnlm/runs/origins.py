"""From what a datastore says of its making back to the flags that it was made with."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from fairseq_knnlm.datastore import Origin
from fairseq_knnlm.datastore.making import Plan

#: Where ``fairseq-eval-lm`` is not told how many tokens a batch holds.
MAX_TOKENS = 36000


def reading_flags(origin: Origin) -> dict[str, str | None]:
    """The flags by which a split is read as it was, by name; None of those without a value.

    What the datastore does not know of itself is left out.
    """
    known = origin.context
    found: dict[str, str | None] = {"--knn-keytype": origin.key_type}
    if origin.split:
        found["--gen-subset"] = origin.split
    if "tokens_per_sample" in known:  # fairseq counts the window in, and takes it off again
        window = int(known.get("context_window") or 0)
        found["--tokens-per-sample"] = str(int(known["tokens_per_sample"] or 0) + window)
        found["--context-window"] = str(window)
    for name in ("sample_break_mode", "stride", "max_tokens", "batch_size"):
        if known.get(name) is not None:
            found[f"--{name.replace('_', '-')}"] = str(known[name])
    if known.get("add_bos_token"):
        found["--add-bos-token"] = None
    if known.get("precision") == "float16":
        found["--fp16"] = None
    if known.get("precision") == "bfloat16":
        found["--lm-dtype"] = "bfloat16"
    return found


def words(flags: dict[str, str | None]) -> list[str]:
    """The same as they are typed."""
    return [word for flag, value in flags.items() for word in (flag, value) if word is not None]


def block_rows(starts: Sequence[int]) -> int:
    """A ``--block-rows`` by which a text is cut before these rows: the largest one."""
    return min((start // number for number, start in enumerate(starts) if number), default=1)


def making_command(path: Path, plan: Plan) -> str:
    """The command that goes on with a datastore in the making, but for data and checkpoint."""
    flags = reading_flags(plan.origin)
    if flags.get("--max-tokens") == str(MAX_TOKENS):
        del flags["--max-tokens"]
    flags["--block-rows"] = str(block_rows(plan.starts[:-1]))
    if plan.boundary is not None:
        flags["--document-boundary"] = plan.boundary
    if plan.onto:  # whose keys are as those that are there
        return _typed(["append", path, "DATA", "--path", "CKPT"], flags)
    if plan.recipe is not None:
        flags |= {"--no-save-keys": None, "--recipe": plan.recipe}
    elif plan.key_dtype == "float32":
        flags["--dstore-fp32"] = None
    return _typed(["save", "DATA", "--path", "CKPT", "--dstore", path], flags)


def _typed(command: Sequence[object], flags: dict[str, str | None]) -> str:
    return shlex.join(["fairseq-knnlm", *map(str, command), *words(flags)])
