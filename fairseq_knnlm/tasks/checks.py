"""What is refused of the flags, and what is named because it does nothing in a run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fairseq_knnlm.bounds import MOST, MOST_ENTRIES, check_device, check_range
from fairseq_knnlm.datastore.legacy import is_legacy, keys_file, values_file
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.files import check_outputs
from fairseq_knnlm.runs.places import check_apart, check_new_datastore, exists
from fairseq_knnlm.runs.stores import name_foreign
from fairseq_knnlm.tasks.flags import (
    EXPERTS,
    KnnlmConfig,
    datastore_paths,
    evaluates,
    given_weights,
    least_pointers,
)

logger = logging.getLogger(__name__)

#: fairseq starts a process, and so a shard, for each GPU that it sees.
ONE_PROCESS = "leave --num-shards out, and on several GPUs pass --distributed-world-size 1"
#: Temperatures that leave float32 distances what they are: numbers.
TEMPERATURES = 1e-6, 1e9
MOST_THETA = 1e9
COUNTS = {
    "k": "neighbours",
    "probe": "lists",
    "cache_window": "tokens",
    "pointer_min": "pointers",
    "max_bytes_per_key": "bytes",
}
PATHS = (
    *("dstore_mmap", "dstore_filename", "indexfile", "expert_lm", "results_json", "score_table"),
)
#: Flags that nobody heeds but the expert of that name.
HEEDED_BY = {
    "knn": (
        *("k", "indexfile", "probe", "knn_sim_func", "faiss_metric_type", "no_load_keys"),
        *("mmap_index", "knn_device"),
    ),
    "cache": ("cache_reset",),
    "lm2": ("expert_lm",),
}
#: Flags that mean nothing without experts to ask.
OF_EXPERTS = (
    *("mixer", "lmbda", "knn_temp", "cache_lmbda", "cache_window", "cache_theta", "ngram_lmbda"),
    *("expert_lm_lmbda", "skip_searches", "lm_features", "pointers", "pointer_min"),
    *("move_dstore_to_mem", *(flag for flags in HEEDED_BY.values() for flag in flags)),
)
#: Of these, flags of the index that keys are streamed into.
OF_STREAMING = ("probe", "knn_device")


def check(cfg: Any) -> None:
    """Refuses flags that cannot be used, or that would do nothing where much was expected of them.

    Args:
        cfg: a ``KnnlmConfig``, or fairseq's object with its fields.

    Raises:
        ConfigError: naming the first flag that is wrong.
    """
    _check_names(cfg)
    _check_block(cfg.tokens_per_sample)
    _check_numbers(cfg)
    if evaluates(cfg) and cfg.save_knnlm_dstore:
        raise ConfigError(
            "--knnlm or --experts and --save-knnlm-dstore are two runs",
            expected="one of them",
            found="both",
            do="save first, build the index, then evaluate with --knnlm",
        )
    if cfg.save_knnlm_dstore:
        _need(cfg.dstore_mmap, "--save-knnlm-dstore", "--dstore-mmap FOLDER")
        if cfg.dstore_fp16 and cfg.dstore_fp32:
            raise ConfigError(
                "--dstore-fp16 and --dstore-fp32 exclude each other",
                expected="one width of the keys",
                found="both",
                do="drop one",
            )
    elif cfg.no_save_keys:
        _need(cfg.save_knnlm_dstore, "--no-save-keys", "--save-knnlm-dstore")
    if cfg.recipe != "auto" or cfg.max_bytes_per_key is not None:
        _need(cfg.no_save_keys, "--recipe", "--no-save-keys (else build-index takes it)")
    if evaluates(cfg):
        _check_experts(cfg)
    elif not cfg.save_knnlm_dstore and (cfg.dstore_filename or cfg.dstore_mmap):
        raise ConfigError(
            "a datastore is given, but nothing is asked of it",
            expected="--knnlm with --dstore-filename, or --save-knnlm-dstore with --dstore-mmap",
            found="neither --knnlm nor --save-knnlm-dstore",
        )
    _check_weights(cfg)
    if cfg.skip_searches is not None:
        _check_skipping(cfg)
    _check_pointers(cfg)
    if cfg.no_load_keys and cfg.knn_sim_func in ("l2", "dot"):
        raise ConfigError(
            f"--knn-sim-func {cfg.knn_sim_func} needs the keys",
            expected="keys to recompute distances on",
            found="--no-load-keys",
            do="drop one of the two",
        )
    _check_heeded(cfg)


def _check_names(cfg: Any) -> None:
    """Of files, devices and the like."""
    for name in (*PATHS, "experts", "recipe", "knn_device"):
        if getattr(cfg, name) == "":
            raise ConfigError(f"{_typed(name)} is empty", expected="a name", found="''")
    _check_datastores(cfg)
    check_device(cfg.knn_device)


def _check_datastores(cfg: Any) -> None:
    names = datastore_paths(cfg)
    if len(names) > 1 and ("" in names or (_there(cfg.dstore_filename) and not _there(names[0]))):
        raise ConfigError(
            "in --dstore-filename a colon separates datastores",
            expected="paths without a colon, with one colon between them",
            found=cfg.dstore_filename,
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


def _check_numbers(cfg: Any) -> None:
    for name, things in COUNTS.items():
        _check_count(_typed(name), getattr(cfg, name), f"counts {things}")
    check_range("--tokens-per-sample", cfg.tokens_per_sample, 1, MOST, "counts tokens")
    _check_count("--dstore-size", cfg.dstore_size, "counts entries", MOST_ENTRIES)
    theta, temperature = cfg.cache_theta, cfg.knn_temp
    _check_count("--cache-theta", theta, "is a sharpness", MOST_THETA, least=0)
    low, high = TEMPERATURES
    if temperature is not None and not low <= temperature <= high:
        raise ConfigError(
            "--knn-temp divides distances",
            expected=f"above 0: {low:g} to {high:g}",
            found=temperature,
        )


def _check_count(
    flag: str, value: float | None, what: str, most: float = MOST, least: float = 1
) -> None:
    """Whoever is below the least is not bothered with the most."""
    above = value is not None and value > most
    check_range(flag, value, least, most if above else None, what)


def _check_heeded(cfg: Any) -> None:
    """Refuses flags that another kind of run heeds."""
    if cfg.save_knnlm_dstore:
        streaming = OF_STREAMING if cfg.no_save_keys else ()
        ignored, run = [name for name in OF_EXPERTS if name not in streaming], "saving a datastore"
        _refuse_given(
            cfg, [*ignored, "dstore_filename"], run, "--knnlm or --experts, in a later run"
        )
    elif evaluates(cfg):
        needs = "--save-knnlm-dstore, in a run of its own"
        _refuse_given(cfg, ["dstore_mmap", "dstore_fp32"], "evaluating", needs)
    else:
        _refuse_given(cfg, OF_EXPERTS, "a run without experts", "--knnlm or --experts")
        _refuse_given(cfg, ["dstore_fp32"], "a run that saves nothing", "--save-knnlm-dstore")
    if cfg.lm_features:
        _need(cfg.score_table, "--lm-features", "--score-table FILE.npz")
    named = cfg.experts.split(",") if cfg.experts else EXPERTS
    for expert in ("cache", "lm2"):
        if expert not in map(str.strip, named):
            needs = f"{expert} among --experts"
            _refuse_given(cfg, HEEDED_BY[expert], f"--experts {cfg.experts}", needs)


def _refuse_given(cfg: Any, names: Iterable[str], run: str, needs: str) -> None:
    for name in names:
        if _given(cfg, name):
            raise ConfigError(
                f"{_typed(name)} does nothing in {run}",
                expected=f"{_typed(name)} with {needs}",
                found=run,
                do=f"leave {_typed(name)} out",
            )


def _given(cfg: Any, name: str) -> bool:
    """Whether a flag says anything but what it says where it is left out."""
    default = KnnlmConfig.__dataclass_fields__[name].default
    value = getattr(cfg, name)
    return value is not default and str(value) != str(default)


def _typed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def name_ignored(cfg: Any, experts: Iterable[str] | None, *, lists: bool = True) -> None:
    """Says, a line each, which flags do nothing with these experts and datastores.

    Args:
        cfg: the flags, checked.
        experts: names of those that will be asked; None where nobody is to be asked.
        lists: whether an index has inverted lists.
    """
    if cfg.probe is not None and not lists:
        logger.warning("--probe does nothing: the index has no lists")
    if experts is not None:
        _name_unheeded(cfg, {"knn" if name.startswith("knn") else name for name in experts})
    if not any(is_legacy(Path(name)) for name in datastore_paths(cfg)):
        name_foreign(cfg.dstore_size, cfg.dstore_fp16)


def _name_unheeded(cfg: Any, asked: set[str]) -> None:
    for expert, names in HEEDED_BY.items():
        for name in names if expert not in asked else ():
            if _given(cfg, name):
                logger.warning("%s does nothing: %s is not asked", _typed(name), expert)
    least = least_pointers(cfg)
    if least is not None and least > max(1, cfg.k // 4):
        logger.warning(
            "--pointers replace saves no search: at most k / 4 = %s pointers are kept, and "
            "--pointer-min asks for %s",
            *(cfg.k // 4, least),
        )


def writes(cfg: Any) -> bool:
    """Whether the run leaves a file behind."""
    return bool(cfg.save_knnlm_dstore or cfg.score_table or cfg.results_json)


def check_writes(cfg: Any, inputs: Mapping[str, Iterable[str]]) -> None:
    """Tries what the run will write, and keeps it apart from what it reads.

    Args:
        cfg: the flags, checked.
        inputs: files that fairseq will read, by what names them.

    Raises:
        DatastoreError: where the datastore to be saved is there already.
        OutputError: naming the flag whose path cannot be written.
    """
    new = cfg.dstore_mmap if cfg.save_knnlm_dstore else None
    outputs = {"--results-json": cfg.results_json, "--score-table": cfg.score_table}
    read = {
        **{name: [Path(file) for file in files] for name, files in inputs.items()},
        "--expert-lm": [Path(cfg.expert_lm)] if cfg.expert_lm else [],
        "--indexfile": _index_files(cfg.indexfile),
        "--dstore-filename": [
            file for name in datastore_paths(cfg) for file in _datastore_files(Path(name))
        ],
    }
    if new is not None:
        check_new_datastore("--dstore-mmap", Path(new), outputs)
    check_apart(outputs, read)
    check_outputs({"--dstore-mmap": new, **outputs})


def _index_files(name: str | None) -> list[Path]:
    return [Path(name), Path(f"{name}.json")] if name else []


def _datastore_files(path: Path) -> list[Path]:
    return [keys_file(path), values_file(path)] if is_legacy(path) else [path]


def name_precision(fp16: bool, bf16: bool, on_gpu: bool) -> None:
    """Says where fairseq's flags of half precision gain nothing."""
    if bf16:
        logger.warning("--bf16 does nothing: it is for training")
    if fp16 and not on_gpu:
        logger.warning("--fp16 gains nothing on a CPU: it rounds the model, and is no faster")


def _check_experts(cfg: Any) -> None:
    names = [name.strip() for name in cfg.experts.split(",")] if cfg.experts else ["knn"]
    unknown = [name for name in names if name not in EXPERTS]
    if unknown or len(set(names)) < len(names):
        raise ConfigError(
            "--experts names experts, each once",
            expected=f"of {', '.join(EXPERTS)}",
            found=cfg.experts,
        )
    for name in {"knn", "ngram"} & set(names):
        flag = "--knnlm" if not cfg.experts else f"--experts {name}"
        _need(cfg.dstore_filename, flag, "--dstore-filename DSTORE")
    if cfg.knnlm:
        _need(cfg.dstore_filename, "--knnlm", "--dstore-filename DSTORE")
    if "lm2" in names:
        _need(cfg.expert_lm, "--experts lm2", "--expert-lm CHECKPOINT")


def _check_pointers(cfg: Any) -> None:
    if cfg.pointer_min is not None:
        _need(str(cfg.pointers) == "replace", "--pointer-min", "--pointers replace")
    if str(cfg.pointers) == "none":
        return
    if not evaluates(cfg) or "knn" not in (cfg.experts or "knn"):
        raise ConfigError(
            "--pointers lead from neighbours to neighbours",
            expected="--knnlm, or knn among --experts",
            found="neither",
        )
    if cfg.no_load_keys or cfg.knn_sim_func not in ("auto", "l2"):
        found = "--no-load-keys" if cfg.no_load_keys else f"--knn-sim-func {cfg.knn_sim_func}"
        raise ConfigError(
            f"--pointers {cfg.pointers} needs the keys",
            expected="distances recomputed on them, as squared L2",
            found=found,
            do=f"leave {found} out",
        )


def _check_skipping(cfg: Any) -> None:
    if not 0 <= cfg.skip_searches <= 1:
        raise ConfigError("--skip-searches is a share", expected="0 to 1", found=cfg.skip_searches)
    _need(evaluates(cfg), "--skip-searches", "--knnlm, or --experts with knn")
    if cfg.score_table:
        raise ConfigError(
            "a score table tells what every search found",
            expected="--score-table or --skip-searches",
            found="both",
            do="leave --skip-searches out; `fairseq-knnlm report` says from the table what "
            "skipping would do",
        )


def _check_weights(cfg: Any) -> None:
    given = given_weights(cfg)
    flags = {"knn": "lmbda", "lm2": "expert-lm-lmbda"}
    for name, weight in given.items():
        if not 0 <= weight <= 1:
            flag = flags.get(name, f"{name}-lmbda")
            raise ConfigError(f"--{flag} is a weight", expected="0 to 1", found=weight)
    total = sum(given.values())
    total += given.get("knn", 0) * (len(datastore_paths(cfg)) - 1)  # a weight for each
    if total > 1:
        raise ConfigError(
            "the experts' weights leave nothing to the language model",
            expected="a sum of at most 1",
            found=f"{total:g}",
        )


def check_k(k: int, rows: int) -> None:
    """Refuses to ask for more neighbours than there are.

    Raises:
        ConfigError: where ``k`` exceeds ``rows``.
    """
    if k > rows:
        raise ConfigError(
            "--k exceeds the datastore",
            expected=f"at most {rows:,}, its entries",
            found=f"{k:,}",
            do=f"pass --k {rows} or less",
        )


def check_metric(asked: str, metric: str) -> None:
    """Refuses a ``--faiss-metric-type`` that the index was not built with.

    Raises:
        ConfigError: where it is given and differs.
    """
    if asked not in ("auto", metric):
        raise ConfigError(
            "--faiss-metric-type is not the index's",
            expected=metric,
            found=asked,
            do="leave it out, or build the index with --metric " + asked,
        )


def check_loader(context_window: int, num_workers: int, num_shards: int, writing: bool) -> None:
    """Refuses ways of loading that would give wrong contexts, or part of what is to be written.

    fairseq's context window is state in the process that collates, and shards take every n-th
    batch, so contexts would be of other blocks.

    Raises:
        ConfigError: naming the flag.
    """
    for flag, number in (("--num-workers", num_workers), ("--num-shards", num_shards)):
        if context_window > 0 and number > 1:
            raise ConfigError(
                f"{flag} {number} would give wrong contexts with a context window",
                expected=f"{flag} 1, or no --context-window",
                found=f"{flag} {number} and --context-window {context_window}",
                do=ONE_PROCESS if flag == "--num-shards" else None,
            )
    if writing:
        what = "a datastore, score table or results file is written by one process"
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


def check_in_text(cfg: Any) -> None:
    """Refuses pointers where tokens come without their place in a text.

    Raises:
        ConfigError: where pointers are asked for.
    """
    if str(cfg.pointers) != "none":
        raise ConfigError(
            f"--pointers {cfg.pointers} follows a text",
            expected="fairseq-eval-lm, which reads one",
            found="sentences by themselves",
            do="leave --pointers out",
        )


def check_stock_is_enough(cfg: Any, what: str) -> None:
    """Refuses flags that only our scorer heeds where fairseq's own will do the work.

    Args:
        cfg: the flags.
        what: what our scorer cannot do.

    Raises:
        ConfigError: naming a flag that would be ignored.
    """
    for flag in ("knnlm", "experts", "score_table", "results_json"):
        if getattr(cfg, flag):
            raise ConfigError(
                f"--{flag.replace('_', '-')} does not work with {what}",
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


def _check_block(tokens_per_sample: int) -> None:
    if tokens_per_sample <= 0:
        raise ConfigError(
            "no tokens are left to score in a block",
            expected="--tokens-per-sample above --context-window, which fairseq takes off it",
            found=f"a block of {tokens_per_sample} tokens",
            do="pass both, as in --tokens-per-sample 3072 --context-window 2560",
        )


def _need(value: object, flag: str, needs: str) -> None:
    if not value:
        raise ConfigError(f"{flag} needs {needs}", expected=needs, found="nothing")
