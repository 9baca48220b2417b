"""How fairseq loads a text: what is refused or named of it, with what a run needs."""

from __future__ import annotations

import logging
from typing import Any

import torch

from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.experts.kind import spelled
from fairseq_knnlm.lm.precision import FLOAT32, fast_in_bfloat16
from fairseq_knnlm.runs.options import Options

logger = logging.getLogger(__name__)

#: fairseq's flags that convert a model, or have it compute otherwise.
HALF = ("fp16", "bf16", "amp", "memory_efficient_fp16", "memory_efficient_bf16")


def check_saving(shards: int, options: Options) -> None:
    """Refuses figures of a datastore that several processes save, blocks each as they come.

    Raises:
        ConfigError: naming the flag.
    """
    flag = _written(options)
    if flag and shards > 1:
        raise ConfigError(
            f"{flag} of a run that saves a datastore is written by one process",
            expected="one process over the whole split",
            found=f"{shards} shards",
            do=f"leave {flag} out, and evaluate in a run of its own",
        )


def _written(options: Options) -> str | None:
    """The flag of a file of figures that is to be written."""
    if options.writing.results_json:
        return "--results-json"
    return "--score-table" if options.writing.score_table else None


def check_processes(num_shards: int, processes: int, options: Options) -> None:
    """Refuses several processes of fairseq's, one a GPU, where each must have flags of its own.

    Args:
        num_shards: as typed.
        processes: that fairseq starts by itself; a shard each, where ``num_shards`` is 1.
        options: what the run is asked to do.

    Raises:
        ConfigError: where they would share what each is to have for itself.
    """
    if processes > 1 and num_shards > 1:
        raise ConfigError(
            "a share is one process",
            expected="--num-shards, or several processes that fairseq starts",
            found=f"--num-shards {num_shards}, and a process for each of {processes} GPUs",
            do="pass --distributed-world-size 1; CUDA_VISIBLE_DEVICES=i before it says which GPU",
        )
    progress = "--progress-file" if options.writing.progress_file else None
    if processes > 1 and (flag := _written(options) or progress):
        raise ConfigError(
            "each process writes files of its own",
            expected=f"{flag} of one process",
            found=f"{processes} processes, one for each GPU, that fairseq starts",
            do=f"pass --distributed-world-size 1; or, for a share on each GPU, also "
            f"--num-shards {processes}, --shard-id and files with other names",
        )


def check_looks_back(looks_back: int | None) -> int:
    """Refuses shares for an expert that must have read all text before them.

    Args:
        looks_back: tokens that must have been read; None for all.

    Raises:
        ConfigError: where that is all.
    """
    if looks_back is None:
        raise ConfigError(
            "an expert goes by all text before a token: each share would read the whole",
            expected="one process over the whole split, or experts that look back so far",
            found="several shards",
            do="leave --num-shards out, or name other --experts",
        )
    return looks_back


def check_writes_nothing(
    options: Options, where: str = "where text is generated", *, reads_split: bool = False
) -> None:
    """Refuses files of an evaluation, and how a split is read where none is.

    Args:
        options: what the run is asked to do.
        where: what else is done.
        reads_split: whether a split is read.

    Raises:
        ConfigError: naming the flag.
    """
    given = {
        "--score-table": options.writing.score_table,
        "--results-json": options.writing.results_json,
        "--raw-text": options.writing.raw_text,
        "--progress-file": options.writing.progress_file,
        "--stride": None if reads_split else options.reading.stride,
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
        "--raw-text": writing.raw_text,
        "--progress-file": writing.progress_file,
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


def check_lm_dtype(run: Any, dtype: str) -> None:
    """Refuses fairseq's flags of half precision beside ours; says where ours gains nothing.

    Args:
        run: fairseq's whole configuration; None where the task's part comes alone.
        dtype: that the language model's layers are to compute in.

    Raises:
        ConfigError: naming the flag.
    """
    if dtype == FLOAT32:
        return
    common = run.common if run is not None else None
    for name in HALF if common is not None else ():
        if getattr(common, name):
            raise ConfigError(
                f"--lm-dtype {dtype} and {spelled(name)} exclude each other",
                expected=f"--lm-dtype {dtype}, which leaves the weights in float32, or "
                f"{spelled(name)}, which converts the model",
                found="both",
                do="leave one of them out",
            )
    on_gpu = torch.cuda.is_available() and not (common is not None and common.cpu)
    if not fast_in_bfloat16(torch.device("cuda" if on_gpu else "cpu")):
        logger.warning(
            "--lm-dtype %s works, but gains nothing here and may be slow: this %s has no "
            "instructions for it",
            *(dtype, "GPU" if on_gpu else "CPU"),
        )
