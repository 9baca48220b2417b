"""The process that makes a checkpoint of today of an older one; ``runs.conversion`` starts it.

It takes a task as JSON, writes the new file, and answers in JSON. Whatever a file may do to its
reader, it does to this process and not to that of the user.
"""

from __future__ import annotations

import json
import re
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from fairseq.checkpoint_utils import _upgrade_state_dict
from omegaconf import OmegaConf
from torch import Tensor

from fairseq_knnlm.errors import KnnlmError, ModelError
from fairseq_knnlm.lm.pickled import Plain, open_checkpoint

#: Settings that fairseq evaluates as Python when it builds a model or trains one.
EVALUATED = re.compile(
    r"(en|de)coder_(layers|attention|kernel_size_list)|character_filters"
    r"|adaptive_(input|softmax)_cutoff|lr|update_freq|(adam_)?betas"
)
#: Numbers, lists, tuples, repetition; no names but these, and no powers.
HARMLESS = re.compile(r"(True|False|None|\*(?!\*)|[\d\s\[\](),.+eE-])*")
MOST_EVALUATED = 10_000
#: What old versions of transformers stored of a GPT-2 that new ones compute, and refuse.
RECOMPUTED = re.compile(r"decoder\.model\.transformer\.h\.\d+\.attn\.(masked_)?bias")


def converted(path: Path) -> tuple[dict[str, Any], list[str]]:
    """A checkpoint as fairseq writes it today, of plain values, and what was left out of it.

    Args:
        path: of the old one.

    Raises:
        ModelError: where it cannot be read, names what could run code, or is no checkpoint of
            fairseq's.
    """
    make_plain = Plain()
    state = make_plain(open_checkpoint(path))
    _check_is_fairseqs(path, state)
    left_out = make_plain.left_out
    for settings in (state.get("args"), state.get("cfg")):
        _check_evaluated(path, settings)
    weights = state["model"]
    recomputed = [name for name in weights if RECOMPUTED.fullmatch(name)]
    state["model"] = {name: weights[name] for name in weights if name not in recomputed}
    if state.get("args") is not None:
        _check_no_references(path, state["args"])
        state["args"] = Namespace(**state["args"])
    else:
        # What fairseq brings up to date of a configuration it does by attribute.
        state["cfg"] = OmegaConf.create(state["cfg"], flags={"allow_objects": True})
    state = _upgrade_state_dict(state)
    state["cfg"] = _without_namespaces(OmegaConf.to_container(state["cfg"], enum_to_str=True))
    state["args"] = None
    return state, sorted([*left_out, *recomputed])


def _check_is_fairseqs(path: Path, state: Any) -> None:
    """Refuses what has no weights or no settings.

    Raises:
        ModelError: saying what is missing.
    """
    found = None
    if not isinstance(state, dict):
        found = f"a {type(state).__name__}"
    elif not isinstance(weights := state.get("model"), dict) or not weights:
        found = f"no weights under 'model', but {', '.join(map(str, state)) or 'nothing'}"
    elif strange := [name for name, one in weights.items() if not isinstance(one, Tensor)]:
        found = f"no tensor under {strange[0]}"
    elif not any(isinstance(state.get(name), dict) for name in ("args", "cfg")):
        found = "no settings, under 'args' or 'cfg'"
    if found is not None:
        raise ModelError(
            f"{path} is no checkpoint of fairseq's",
            expected="weights ('model') and settings ('args' or 'cfg') that fairseq-train wrote",
            found=found,
        )


def _check_evaluated(path: Path, settings: Any) -> None:
    """Refuses settings that fairseq would evaluate, and that are more than numbers and lists.

    Raises:
        ModelError: naming the first.
    """
    if not isinstance(settings, dict):
        return
    for name, value in settings.items():
        _check_evaluated(path, value)
        if not isinstance(value, str) or not EVALUATED.fullmatch(str(name)):
            continue
        if len(value) > MOST_EVALUATED or not HARMLESS.fullmatch(value):
            raise ModelError(
                f"the checkpoint {path} has a setting that could run code",
                expected=f"{name} of numbers and lists, which fairseq evaluates",
                found=value[:100],
                do="nothing of it was run; ask who made it",
            )


def _check_no_references(path: Path, settings: Any) -> None:
    """Refuses references, which flags never hold, and which Hydra would look up here.

    Raises:
        ModelError: naming the first.
    """
    for name, value in settings.items():
        if isinstance(value, str) and "${" in value:
            raise ModelError(
                f"the checkpoint {path} has a setting that refers to others",
                expected=f"{name} as it was typed",
                found=value[:100],
            )


def _without_namespaces(value: Any) -> Any:
    """The settings of models that fairseq keeps in a Namespace, in a dict."""
    if isinstance(value, Namespace):
        return _without_namespaces(vars(value))
    if isinstance(value, dict):
        return {key: _without_namespaces(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_namespaces(one) for one in value]
    return value


def write(old: Path, new: Path) -> dict[str, Any]:
    """Writes the new checkpoint and opens it as fairseq will.

    Returns:
        ``parameters``, ``architecture``, and ``left_out``, names.
    """
    state, left_out = converted(old)
    torch.save(state, new)
    again = torch.load(new, map_location="cpu", weights_only=True)
    pairs = zip(state["model"].values(), again["model"].values(), strict=True)
    assert all(_same(one, other) for one, other in pairs)
    model = state["cfg"].get("model") or {}
    return {
        "parameters": sum(one.numel() for one in state["model"].values()),
        "architecture": str(model.get("arch") or model.get("_name")),
        "left_out": left_out,
    }


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are of one type, shape and bits."""
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and one.numpy(force=True).tobytes() == other.numpy(force=True).tobytes()


def _main() -> None:
    """The program: a task on standard input, the answer on standard output."""
    task = json.loads(sys.stdin.buffer.read())
    try:
        answer = write(Path(task["old"]), Path(task["new"]))
    except KnnlmError as error:
        answer = {"error": str(error)}
    sys.stdout.write("\n" + json.dumps(answer))


if __name__ == "__main__":
    _main()
