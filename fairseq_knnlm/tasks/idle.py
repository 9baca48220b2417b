"""Flags that do nothing in a run: refused where that is known beforehand, else named."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fairseq_knnlm.datastore.legacy import is_legacy
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.experts.kind import Kind, Opened, spelled
from fairseq_knnlm.experts.registry import kinds
from fairseq_knnlm.runs.opening import Memory
from fairseq_knnlm.runs.options import Options
from fairseq_knnlm.runs.stores import name_foreign
from fairseq_knnlm.tasks.flags import is_given

logger = logging.getLogger(__name__)

#: Of an index, which saving makes too where keys are streamed into it.
OF_STREAMING = ("probe", "knn_device")
#: What a score table has besides.
OF_TABLES = ("lm_features", "table_costs")


def of_experts() -> list[str]:
    """Flags that mean nothing without experts to ask."""
    of_all = ["mixer", "skip_searches", *OF_TABLES, "move_dstore_to_mem", "speculate"]
    return [*of_all, *(name for kind in kinds() for name in kind.flags())]


def check_heeded(cfg: Any, options: Options) -> None:
    """Refuses flags that another kind of run heeds, or an expert that is not asked.

    Raises:
        ConfigError: naming the flag.
    """
    if options.saving.save_knnlm_dstore:
        streaming = OF_STREAMING if options.saving.no_save_keys else ()
        ignored = [name for name in of_experts() if name not in streaming] + ["dstore_filename"]
        needs = "--knnlm or --experts, in a later run"
        _refuse_given(cfg, ignored, "saving a datastore", needs)
    elif options.mixing.evaluates:
        needs = "--save-knnlm-dstore, in a run of its own"
        _refuse_given(cfg, ["dstore_mmap", "dstore_fp32"], "evaluating", needs)
    else:
        _refuse_given(cfg, of_experts(), "a run without experts", "--knnlm or --experts")
        _refuse_given(cfg, ["dstore_fp32"], "a run that saves nothing", "--save-knnlm-dstore")
    for name in OF_TABLES if not options.writing.score_table else ():
        if is_given(cfg, name):
            needs = "--score-table FILE.npz"
            raise ConfigError(f"{spelled(name)} needs {needs}", expected=needs, found="nothing")
    named = options.mixing.named
    for kind in kinds():
        if named is not None and kind.name not in named and not kind.optional:
            run, needs = f"--experts {options.mixing.experts}", f"{kind.name} among --experts"
            _refuse_given(cfg, kind.plain_flags, run, needs)


def _refuse_given(cfg: Any, names: Iterable[str], run: str, needs: str) -> None:
    for name in names:
        if is_given(cfg, name):
            raise ConfigError(
                f"{spelled(name)} does nothing in {run}",
                expected=f"{spelled(name)} with {needs}",
                found=run,
                do=f"leave {spelled(name)} out",
            )


def name_ignored(cfg: Any, options: Options, memory: Memory | None) -> None:
    """Says, a line each, which flags do nothing with these experts and datastores.

    Args:
        cfg: the flags, checked.
        options: the same as options.
        memory: what was opened; None where nobody is to be asked.
    """
    if memory is not None:
        _name_unheeded(cfg, options, memory.by_kind)
    if not any(is_legacy(Path(name)) for name in options.datastores.names):
        name_foreign(options.datastores.dstore_size, options.datastores.dstore_fp16)


def _name_unheeded(cfg: Any, options: Options, asked: Mapping[Kind, Sequence[Opened]]) -> None:
    for kind in kinds():
        for name in kind.plain_flags if kind not in asked else ():
            if is_given(cfg, name):
                logger.warning("%s does nothing: %s is not asked", spelled(name), kind.name)
        for words in kind.idle(options.of(kind), asked.get(kind, ())):
            logger.warning("%s", words)
