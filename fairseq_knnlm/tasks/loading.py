"""How fairseq loads a text: what is refused or named of it, with what a run needs."""

from __future__ import annotations

import logging
from typing import Any

from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.runs.options import Options

logger = logging.getLogger(__name__)

#: fairseq starts a process, and so a shard, for each GPU that it sees.
ONE_PROCESS = "leave --num-shards out, and on several GPUs pass --distributed-world-size 1"


def check_loader(context_window: int, num_shards: int, options: Options) -> None:
    """Refuses a part of a text where the whole of it is to be written, or gives contexts.

    A datastore is shared out by its blocks, whatever their contexts.

    Raises:
        ConfigError: where there are several shards.
    """
    saving, writing = options.saving.save_knnlm_dstore, options.writing
    if context_window > 0 and not saving:
        _check_one_process(num_shards, "contexts reach over the whole text")
    if writing.score_table or writing.results_json:
        what = "a score table or results file is written by one process"
        _check_one_process(num_shards, what)


def check_order(num_shards: int) -> None:
    """Refuses a part of the text for the cache or pointers, which live on what was just read.

    Raises:
        ConfigError: where there are several shards.
    """
    _check_one_process(num_shards, "the cache and pointers need the text in one piece")


def _check_one_process(num_shards: int, problem: str) -> None:
    if num_shards > 1:
        raise ConfigError(
            problem,
            expected="one process over the whole split",
            found=f"{num_shards} shards",
            do=ONE_PROCESS,
        )


def check_writes_nothing(options: Options, where: str = "where text is generated") -> None:
    """Refuses files of an evaluation.

    Args:
        options: what the run is asked to do.
        where: what else is done.

    Raises:
        ConfigError: naming the flag.
    """
    given = {
        "--score-table": options.writing.score_table,
        "--results-json": options.writing.results_json,
    }
    for flag, value in given.items():
        if value:
            raise ConfigError(
                f"{flag} does nothing {where}",
                expected="fairseq-eval-lm, or --score-reference",
                found=flag,
                do="leave it out",
            )


def check_stock_is_enough(options: Options, what: str) -> None:
    """Refuses flags that only our scorer heeds where fairseq's own will do the work.

    Args:
        options: what the run is asked to do.
        what: what our scorer cannot do.

    Raises:
        ConfigError: naming a flag that would be ignored.
    """
    mixing, writing = options.mixing, options.writing
    given = {
        "--knnlm": mixing.knnlm,
        "--experts": mixing.experts,
        "--score-table": writing.score_table,
        "--results-json": writing.results_json,
    }
    for flag, value in given.items():
        if value:
            raise ConfigError(
                f"{flag} does not work with {what}",
                expected="scoring with a Transformer decoder",
                found=what,
                do="leave it out, or score with fairseq-eval-lm or --score-reference",
            )


def name_omitted(tokens: int, mode: str) -> None:
    """Says how many tokens lie in no block."""
    if tokens:
        logger.warning(
            "--sample-break-mode %s leaves out %s tokens, at the borders of documents: nothing is "
            "scored or saved of them",
            *(mode, f"{tokens:,}"),
        )


def check_left_out(tokens: int, longest: Any, saving: bool) -> None:
    """Refuses to save, and warns to evaluate, a split that fairseq would read only in part.

    Args:
        tokens: in blocks that are longer than the model takes, which fairseq leaves out.
        longest: tokens that the model takes.
        saving: a datastore is being made.

    Raises:
        ConfigError: where a datastore would lack these tokens.
    """
    if not tokens:
        return
    remedy = "--sample-break-mode none, or a smaller --tokens-per-sample"
    if saving:
        raise ConfigError(
            f"{tokens:,} tokens lie in blocks longer than the model takes",
            expected=f"blocks of at most {longest:,} tokens",
            found="longer ones, which fairseq would leave out",
            do=remedy,
        )
    logger.warning(
        "fairseq leaves out %s tokens, in blocks longer than the %s that the model takes: the "
        "perplexity is over fewer tokens. Use %s.",
        f"{tokens:,}",
        f"{longest:,}",
        remedy,
    )


def name_precision(fp16: bool, bf16: bool, on_gpu: bool) -> None:
    """Says where fairseq's flags of half precision gain nothing."""
    if bf16:
        logger.warning("--bf16 does nothing: it is for training")
    if fp16 and not on_gpu:
        logger.warning("--fp16 gains nothing on a CPU: it rounds the model, and is no faster")
