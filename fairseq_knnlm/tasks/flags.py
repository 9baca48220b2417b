"""The flags of the task ``knn_lm``, as one dataclass, and how they are read.

fairseq reads the fields' annotations at run time and understands ``Optional[int]`` only, so this
module does without postponed annotations and ``int | None``.
"""

from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum
from fairseq.tasks.language_modeling import LanguageModelingConfig
from omegaconf import OmegaConf

from fairseq_knnlm.lm.keys import KEY_TYPES

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


def whole_run(cfg: Any) -> Any | None:
    """fairseq's whole configuration, of which the task's is a part; None where it comes alone."""
    root = cfg._get_root() if OmegaConf.is_config(cfg) else None
    return root if root is not None and "common_eval" in root else None


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
