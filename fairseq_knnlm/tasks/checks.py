"""What is refused of the flags, alone or together, before anything is opened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fairseq_knnlm.bounds import MOST, MOST_ENTRIES, check_count, check_range
from fairseq_knnlm.datastore.boundaries import check_expression
from fairseq_knnlm.datastore.legacy import is_legacy
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.experts.kind import spelled
from fairseq_knnlm.experts.registry import DEFAULT, kind_of, kinds
from fairseq_knnlm.runs.options import DatastoreOptions, Options, SavingOptions
from fairseq_knnlm.runs.places import exists
from fairseq_knnlm.runs.raw_text import check_raw_text
from fairseq_knnlm.tasks.flags import every_flag, options_of, whole_run
from fairseq_knnlm.tasks.idle import check_heeded
from fairseq_knnlm.tasks.strides import check_stride


def check(cfg: Any) -> Options:
    """Refuses flags that cannot be used, or that would do nothing where much was expected of them.

    Args:
        cfg: a ``KnnlmConfig``, or fairseq's object with its fields.

    Returns:
        The flags as options.

    Raises:
        ConfigError: naming the first flag that is wrong.
    """
    options = options_of(cfg)
    _check_names(cfg)
    _check_datastores(options.datastores)
    if options.reading.stride is not None:
        check_stride(cfg, whole_run(cfg))
    _check_block(cfg.tokens_per_sample)
    _check_numbers(cfg, options)
    if options.mixing.evaluates and options.saving.save_knnlm_dstore:
        raise ConfigError(
            "--knnlm or --experts and --save-knnlm-dstore are two runs",
            expected="one of them",
            found="both",
            do="save first, build the index, then evaluate with --knnlm",
        )
    _check_saving(options.saving, fp16=options.datastores.dstore_fp16)
    if options.mixing.evaluates:
        _check_experts(options)
    elif not options.saving.save_knnlm_dstore and (
        options.datastores.dstore_filename or options.saving.dstore_mmap
    ):
        raise ConfigError(
            "a datastore is given, but nothing is asked of it",
            expected="--knnlm with --dstore-filename, or --save-knnlm-dstore with --dstore-mmap",
            found="neither --knnlm nor --save-knnlm-dstore",
        )
    _check_weights(options)
    if options.writing.raw_text is not None:
        _check_raw_text(options, options.writing.raw_text)
    if options.mixing.skip_searches is not None:
        _check_skipping(options, options.mixing.skip_searches)
    for kind in kinds():
        named = options.mixing.named
        asked = options.mixing.evaluates and (named is None or kind.name in named)
        kind.check(options.of(kind), asked)
    check_heeded(cfg, options)
    return options


def _check_names(cfg: Any) -> None:
    """Of files, devices and the like."""
    for name in every_flag():
        if getattr(cfg, name) == "":
            raise ConfigError(f"{spelled(name)} is empty", expected="a name", found="''")


def _check_datastores(options: DatastoreOptions) -> None:
    typed, names = options.dstore_filename, options.names
    if len(names) > 1 and ("" in names or (_there(str(typed)) and not _there(names[0]))):
        raise ConfigError(
            "in --dstore-filename a colon separates datastores",
            expected="paths without a colon, with one colon between them",
            found=typed,
            do="rename the folder, or name it by a link without a colon",
        )
    seen: dict[str, str] = {}
    for name in names:
        place = os.path.realpath(name)
        if place in seen:
            raise ConfigError(
                "--dstore-filename names the same datastore twice",
                expected="each once; --lmbda is its weight",
                found=f"{seen[place]} and {name}",
                do="leave one of them out",
            )
        seen[place] = name


def _there(name: str) -> bool:
    return exists(Path(name)) or is_legacy(Path(name))


def _check_block(tokens_per_sample: int) -> None:
    if tokens_per_sample <= 0:
        raise ConfigError(
            "no tokens are left to score in a block",
            expected="--tokens-per-sample above --context-window, which fairseq takes off it",
            found=f"a block of {tokens_per_sample} tokens",
            do="pass both, as in --tokens-per-sample 3072 --context-window 2560",
        )


def _check_numbers(cfg: Any, options: Options) -> None:
    for name, metadata in every_flag().items():
        if (things := metadata.get("counts")) is not None:
            check_count(spelled(name), getattr(cfg, name), f"counts {things}")
    check_range("--tokens-per-sample", cfg.tokens_per_sample, 1, MOST, "counts tokens")
    size = options.datastores.dstore_size
    check_count("--dstore-size", size, "counts entries", MOST_ENTRIES)


def _check_saving(options: SavingOptions, *, fp16: bool) -> None:
    saving = options.save_knnlm_dstore
    if saving:
        _need(options.dstore_mmap, "--save-knnlm-dstore", "--dstore-mmap FOLDER")
        if fp16 and options.dstore_fp32:
            raise ConfigError(
                "--dstore-fp16 and --dstore-fp32 exclude each other",
                expected="one width of the keys",
                found="both",
                do="drop one",
            )
    elif options.no_save_keys:
        _need(saving, "--no-save-keys", "--save-knnlm-dstore")
    if options.recipe != "auto" or options.max_bytes_per_key is not None:
        _need(options.no_save_keys, "--recipe", "--no-save-keys (else build-index takes it)")
    if options.append_dstore:
        _need(saving, "--append-dstore", "--save-knnlm-dstore")
        if options.recipe != "auto" or options.max_bytes_per_key is not None:
            raise ConfigError(
                "--recipe does nothing where a text is added",
                expected="the datastore's own index, which goes on",
                found="--recipe or --max-bytes-per-key",
                do="leave it out, or build another index afterwards",
            )
    if options.block_rows != SavingOptions.block_rows:
        _need(saving, "--block-rows", "--save-knnlm-dstore")
    if options.document_boundary is not None:
        _need(saving, "--document-boundary", "--save-knnlm-dstore (else verify takes it)")
        check_expression("--document-boundary", options.document_boundary)


def _check_experts(options: Options) -> None:
    names = options.mixing.named
    known = [kind.name for kind in kinds()]
    if names is not None and (set(names) - set(known) or len(set(names)) < len(names)):
        raise ConfigError(
            "--experts names experts, each once",
            expected=f"of {', '.join(known)}",
            found=options.mixing.experts,
        )
    for flag, needs, value in _needs(options):
        _need(value, flag, needs)


def _needs(options: Options) -> Iterator[tuple[str, str, object]]:
    """Who needs what, and what was given of it."""
    named, store = options.mixing.named, options.datastores.dstore_filename
    for kind in map(kind_of, named or [DEFAULT]):
        flag = f"--experts {kind.name}" if named else "--knnlm"
        if kind.needs_datastore:
            yield flag, "--dstore-filename DSTORE", store
    if options.mixing.knnlm:
        yield "--knnlm", "--dstore-filename DSTORE", store
    for kind in map(kind_of, named or [DEFAULT]):
        for name in kind.flags("checkpoint"):
            needs = f"{spelled(name)} CHECKPOINT"
            yield f"--experts {kind.name}", needs, getattr(options.of(kind), name)


def _check_weights(options: Options) -> None:
    total, stores = 0.0, len(options.datastores.names)
    for kind in kinds():
        weight = kind.given_weight(options.of(kind))
        if weight is None:
            continue
        if not 0 <= weight <= 1:
            (flag,) = kind.flags("weight")
            raise ConfigError(f"{spelled(flag)} is a weight", expected="0 to 1", found=weight)
        total += weight * len(kind.names(stores))  # a weight for each
    if total > 1:
        raise ConfigError(
            "the experts' weights leave nothing to the language model",
            expected="a sum of at most 1",
            found=f"{total:g}",
        )


def _check_raw_text(options: Options, path: str) -> None:
    if options.saving.save_knnlm_dstore:
        raise ConfigError(
            "--raw-text does nothing where a datastore is saved",
            expected="an evaluation",
            found="--raw-text with --save-knnlm-dstore",
            do="leave --raw-text out",
        )
    check_raw_text(Path(path))


def _check_skipping(options: Options, share: float) -> None:
    if not 0 <= share <= 1:
        raise ConfigError("--skip-searches is a share", expected="0 to 1", found=share)
    _need(options.mixing.evaluates, "--skip-searches", "--knnlm, or --experts with knn")
    if options.writing.score_table:
        raise ConfigError(
            "a score table tells what every search found",
            expected="--score-table or --skip-searches",
            found="both",
            do="leave --skip-searches out; `fairseq-knnlm report` says from the table what "
            "skipping would do",
        )


def _need(value: object, flag: str, needs: str) -> None:
    if not value:
        raise ConfigError(f"{flag} needs {needs}", expected=needs, found="nothing")
