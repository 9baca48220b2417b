"""The flags of the task ``knn_lm``, as one dataclass, and the one place where they are checked.

fairseq reads the fields' annotations at run time and understands ``Optional[int]`` only, so this
module does without postponed annotations and ``int | None``.
"""

import logging
from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum
from fairseq.tasks.language_modeling import LanguageModelingConfig

from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.lm import KEY_TYPES

logger = logging.getLogger(__name__)

#: fairseq starts a process, and so a shard, for each GPU that it sees.
ONE_PROCESS = "leave --num-shards out, and on several GPUs pass --distributed-world-size 1"
DEFAULT_LAMBDA = 0.25
DEFAULT_TEMPERATURE = 1.0
#: Pointers that save a search.
DEFAULT_POINTER_MIN = 64
#: Of the other experts, where nothing was fitted.
DEFAULT_OTHER_LAMBDA = 0.1
#: Who can be mixed with the language model; further datastores are knn2, knn3, ...
EXPERTS = ("knn", "cache", "ngram", "lm2")

KEY_TYPE_CHOICES = ChoiceEnum(list(KEY_TYPES))
SIMILARITY_CHOICES = ChoiceEnum(["auto", "do_not_recomp_l2", "l2", "dot"])
MIXER_CHOICES = ChoiceEnum(["auto", "fixed", "blend", "bins", "gate", "none"])
POINTER_CHOICES = ChoiceEnum(["none", "join", "replace"])
METRIC_CHOICES = ChoiceEnum(["auto", "l2", "ip"])


@dataclass
class KnnlmConfig(LanguageModelingConfig):
    knnlm: bool = field(default=False, metadata={"help": "evaluate the kNN-LM"})
    save_knnlm_dstore: bool = field(
        default=False, metadata={"help": "save a datastore of --gen-subset at --dstore-mmap"}
    )
    dstore_mmap: Optional[str] = field(  # noqa: UP045
        default=None, metadata={"help": "folder of the datastore to save"}
    )
    dstore_filename: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "datastore to read: its folder, or the PREFIX of urvashik/knnlm's files; "
            "several with : between them, each an expert"
        },
    )
    indexfile: Optional[str] = field(  # noqa: UP045
        default=None, metadata={"help": "FAISS index (default: knn.index in the datastore)"}
    )
    dstore_size: Optional[int] = field(  # noqa: UP045
        default=None,
        metadata={"help": "entries, to read urvashik/knnlm's files; ours say it themselves"},
    )
    dstore_fp16: bool = field(
        default=False,
        metadata={
            "help": "to read urvashik/knnlm's files: float16 keys and int16 values "
            "(saving writes float16 keys anyway)"
        },
    )
    dstore_fp32: bool = field(default=False, metadata={"help": "save the keys in float32"})
    no_save_keys: bool = field(
        default=False,
        metadata={
            "help": "with --save-knnlm-dstore: do not write the keys, but pass them into an index "
            "of --recipe, trained on a first pass over a part of the text"
        },
    )
    recipe: str = field(
        default="auto",
        metadata={"help": "that index: auto, paper or a FAISS factory string (default: auto)"},
    )
    max_bytes_per_key: Optional[int] = field(  # noqa: UP045
        default=None,
        metadata={"help": "memory that --recipe auto may spend on a key (default: 72)"},
    )
    experts: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "who is mixed with the language model: of knn, cache, ngram and lm2, with "
            "commas between them (default: as calibrated, else knn)"
        },
    )
    mixer: MIXER_CHOICES = field(  # type: ignore[valid-type]
        default="auto",
        metadata={
            "help": "the calibrated mixer: fixed, blend, bins, gate, or auto for the best; none to "
            "mix nothing, where a score table is all that is wanted"
        },
    )
    k: int = field(default=1024, metadata={"help": "neighbours a token"})
    lmbda: Optional[float] = field(  # noqa: UP045
        default=None,
        metadata={"help": "weight of the neighbours, 0 to 1 (default: the calibration, else 0.25)"},
    )
    knn_temp: Optional[float] = field(  # noqa: UP045
        default=None,
        metadata={"help": "temperature of the distances (default: the calibration, else 1.0)"},
    )
    cache_lmbda: Optional[float] = field(  # noqa: UP045
        default=None,
        metadata={"help": "weight of the cache (default: the calibration, else 0.1)"},
    )
    cache_window: Optional[int] = field(  # noqa: UP045
        default=None,
        metadata={"help": "tokens that the cache looks back (default: the calibration, else 4000)"},
    )
    cache_theta: Optional[float] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "sharpness of the cache, times the product of features (default: the "
            "calibration, else 1 / sqrt of their width)"
        },
    )
    cache_reset: bool = field(
        default=False, metadata={"help": "empty the cache where a document ends, at an empty line"}
    )
    ngram_lmbda: Optional[float] = field(  # noqa: UP045
        default=None,
        metadata={"help": "weight of the n-grams (default: the calibration, else 0.1)"},
    )
    expert_lm: Optional[str] = field(  # noqa: UP045
        default=None, metadata={"help": "checkpoint of a second language model, for lm2"}
    )
    expert_lm_lmbda: Optional[float] = field(  # noqa: UP045
        default=None,
        metadata={"help": "weight of that model (default: the calibration, else 0.1)"},
    )
    skip_searches: Optional[float] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "share of the searches to skip, 0 to 1: where a calibrated gate that sees only "
            "what is known before the search expects least of the neighbours"
        },
    )
    lm_features: bool = field(
        default=False,
        metadata={
            "help": "with --score-table: also the entropy and top probability of the language "
            "model, which costs a softmax over the vocabulary"
        },
    )
    probe: Optional[int] = field(  # noqa: UP045
        default=None,
        metadata={"help": "inverted lists visited a query (default: as the index was built)"},
    )
    knn_keytype: KEY_TYPE_CHOICES = field(  # type: ignore[valid-type]
        default="last_ffn_input", metadata={"help": "the representation that is the key"}
    )
    knn_sim_func: SIMILARITY_CHOICES = field(  # type: ignore[valid-type]
        default="auto",
        metadata={
            "help": "distances: the index's own (do_not_recomp_l2), or recomputed on the stored "
            "keys as squared L2 (l2) or inner product (dot); auto recomputes L2 unless the index "
            "loses less than a tenth of the neighbours in its lists, or the keys are not loaded"
        },
    )
    faiss_metric_type: METRIC_CHOICES = field(  # type: ignore[valid-type]
        default="auto",
        metadata={"help": "the index's metric; checked against the index where given"},
    )
    pointers: POINTER_CHOICES = field(  # type: ignore[valid-type]
        default="none",
        metadata={
            "help": "follow the neighbours through their text: their successors join the "
            "neighbours of the next token, or replace the search for them; distances are "
            "recomputed as squared L2"
        },
    )
    pointer_min: Optional[int] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "with --pointers replace: pointers that save a search (default: 64); at most "
            "k / 4 are kept"
        },
    )
    no_load_keys: bool = field(
        default=False, metadata={"help": "do not open the keys; use the index's distances"}
    )
    move_dstore_to_mem: bool = field(
        default=False, metadata={"help": "read the datastore into memory instead of mapping it"}
    )
    mmap_index: bool = field(
        default=False,
        metadata={"help": "map the index's codes instead of reading them into memory"},
    )
    knn_device: str = field(
        default="auto", metadata={"help": "where to search: auto, cpu, cuda or cuda:i,j"}
    )
    results_json: Optional[str] = field(  # noqa: UP045
        default=None, metadata={"help": "write what was measured to this file"}
    )
    score_table: Optional[str] = field(  # noqa: UP045
        default=None, metadata={"help": "write one row a scored token to this .npz"}
    )


def check(cfg: Any) -> None:
    """Refuses flags that cannot be used.

    Args:
        cfg: a ``KnnlmConfig``, or fairseq's object with its fields.

    Raises:
        ConfigError: naming the first flag that is wrong.
    """
    _check_block(cfg.tokens_per_sample)
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
            raise ConfigError("--dstore-fp16 and --dstore-fp32 exclude each other", do="drop one")
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
    window, theta = cfg.cache_window, cfg.cache_theta
    if window is not None and window < 1:
        raise ConfigError("--cache-window counts tokens", expected="1 or more", found=window)
    if theta is not None and not 0 <= theta < float("inf"):
        raise ConfigError("--cache-theta is a sharpness", expected="0 or more", found=theta)
    if cfg.knn_temp is not None and not 0 < cfg.knn_temp < float("inf"):
        raise ConfigError("--knn-temp divides distances", expected="above 0", found=cfg.knn_temp)
    if cfg.k < 1:
        raise ConfigError("--k counts neighbours", expected="1 or more", found=cfg.k)
    _check_pointers(cfg)
    if cfg.no_load_keys and cfg.knn_sim_func in ("l2", "dot"):
        raise ConfigError(
            f"--knn-sim-func {cfg.knn_sim_func} needs the keys",
            expected="keys to recompute distances on",
            found="--no-load-keys",
            do="drop one of the two",
        )


def evaluates(cfg: Any) -> bool:
    """Whether experts are asked for."""
    return bool(cfg.knnlm or cfg.experts)


def named_experts(cfg: Any) -> list[str] | None:
    """The experts that ``--experts`` names, None where it is left out; knn for each datastore."""
    if not cfg.experts:
        return None
    stores = len(datastore_paths(cfg))
    names = [name.strip() for name in cfg.experts.split(",")]
    knn = ["knn", *(f"knn{number}" for number in range(2, stores + 1))]
    return [each for name in names for each in (knn if name == "knn" else [name])]


def datastore_paths(cfg: Any) -> list[str]:
    """What ``--dstore-filename`` names."""
    return cfg.dstore_filename.split(":") if cfg.dstore_filename else []


def least_pointers(cfg: Any) -> int | None:
    """The pointers that save a search; None where every token is searched."""
    if str(cfg.pointers) != "replace":
        return None
    return DEFAULT_POINTER_MIN if cfg.pointer_min is None else cfg.pointer_min


def pointers_in_words(cfg: Any) -> str:
    """What pointers do in this run."""
    least = least_pointers(cfg)
    return str(cfg.pointers) if least is None else f"{cfg.pointers} from {least}"


def given_weights(cfg: Any) -> dict[str, float]:
    """The weights that flags give, by the expert's name."""
    flags = {
        "knn": cfg.lmbda,
        "cache": cfg.cache_lmbda,
        "ngram": cfg.ngram_lmbda,
        "lm2": cfg.expert_lm_lmbda,
    }
    return {name: weight for name, weight in flags.items() if weight is not None}


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
        if cfg.pointer_min < 1:
            raise ConfigError(
                "--pointer-min counts pointers", expected="1 or more", found=cfg.pointer_min
            )
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


def check_size(dstore_size: int | None, rows: int) -> None:
    """Refuses a ``--dstore-size`` that contradicts the manifest.

    Raises:
        ConfigError: where it is given and wrong.
    """
    if dstore_size is not None and dstore_size != rows:
        raise ConfigError(
            "--dstore-size contradicts the datastore",
            expected=f"{rows:,}, as its manifest says",
            found=f"{dstore_size:,}",
            do="leave --dstore-size out; it is for files of urvashik/knnlm",
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
    if writing and num_shards > 1:
        raise ConfigError(
            "a datastore, score table or results file is written by one process",
            expected="one process over the whole split",
            found=f"{num_shards} shards",
            do=ONE_PROCESS,
        )


def check_order(num_shards: int) -> None:
    """Refuses a part of the text for the cache or pointers, which live on what was just read.

    Raises:
        ConfigError: where there are several shards.
    """
    if num_shards > 1:
        raise ConfigError(
            "the cache and pointers need the text in one piece",
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
