"""A language model, its memory and its spelling, opened once for a command of this package."""

from __future__ import annotations

import ast
import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, options, tasks, utils
from fairseq.dataclass.configs import EvalLMConfig
from fairseq.dataclass.utils import convert_namespace_to_omegaconf, gen_parser_from_dataclass

from fairseq_knnlm.runs.inputs import Inputs
from fairseq_knnlm.runs.token_spelling import AnySpelling
from fairseq_knnlm.tasks.spelling import spelling


@dataclass(frozen=True)
class Session:
    """What was opened.

    Attributes:
        cfg: fairseq's whole configuration.
        task: ``knn_lm``, with its memory.
        spelling: how their text is cut.
    """

    cfg: Any
    task: Any
    spelling: AnySpelling

    @cached_property
    def models(self) -> list[Any]:
        """The language models, ready to predict; read once they are asked for."""
        return _models(self.cfg, self.task)

    @cached_property
    def inputs(self) -> Inputs:
        """Options, models and memory."""
        found: Inputs = self.task.inputs(self.models)
        return found

    @property
    def longest(self) -> int | None:
        """Tokens that the model takes; None where there is no end to them."""
        most = self.models[0].max_positions()
        longest = (most[0] if isinstance(most, tuple) else most) if most else None
        return int(longest) if longest and math.isfinite(longest) else None

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        found: torch.device = next(self.models[0].parameters()).device
        return found


def open_session(data: str, flags: Sequence[str]) -> Session:
    """Opens what fairseq's flags name, as ``fairseq-interactive`` does, but for the models.

    Args:
        data: folder that fairseq-preprocess wrote.
        flags: fairseq's own and those of ``knn_lm``, with ``--path``.

    Raises:
        KnnlmError: of the kind that fits what is wrong.
    """
    for name in ("fairseq", "fairseq_cli"):
        logging.getLogger(name).setLevel(logging.WARNING)
    package = Path(__file__).absolute().parents[1]  # as it was imported
    words = [data, "--user-dir", str(package), "--task", "knn_lm", *flags]
    sys.argv = ["fairseq-interactive", *words]  # where fairseq looks for --user-dir
    parser = options.get_interactive_generation_parser(default_task="knn_lm")
    gen_parser_from_dataclass(parser.add_argument_group("LM Evaluation"), EvalLMConfig())
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, words))
    utils.import_user_module(cfg.common)
    if not cfg.generation.no_seed_provided:
        utils.set_torch_seed(cfg.common.seed)
    cfg.task.tokens_per_sample -= cfg.eval_lm.context_window  # as fairseq-eval-lm does
    task = tasks.setup_task(cfg.task)
    cut = spelling(cfg, task.vocabulary(), task.target_dictionary.unk())
    return Session(cfg, task, cut)


def _models(cfg: Any, task: Any) -> list[Any]:
    models, _ = checkpoint_utils.load_model_ensemble(
        cfg.common_eval.path.split(os.pathsep),
        arg_overrides=ast.literal_eval(cfg.common_eval.model_overrides),
        task=task,
    )
    on_gpu = torch.cuda.is_available() and not cfg.common.cpu
    for model in models:
        if cfg.common.fp16:
            model.half()
        if on_gpu:
            model.cuda()
        model.prepare_for_inference_(cfg)
    return list(models)
