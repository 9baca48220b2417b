"""What a run is asked to do, as typed options: all flags but fairseq's own.

Flags are read in ``tasks``, where each becomes the field of the same name. Those of experts stand
with the experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fairseq_knnlm.experts.kind import Kind, flag
from fairseq_knnlm.experts.neighbours import KnnOptions
from fairseq_knnlm.experts.registry import DEFAULT, find_kind, kinds
from fairseq_knnlm.lm.keys import KEY_TYPES
from fairseq_knnlm.lm.precision import DTYPES, FLOAT32


@dataclass(frozen=True)
class LanguageModelOptions:
    """How the language models compute."""

    lm_dtype: str = flag(
        FLOAT32,
        "what the language model's layers compute in, in training too: bfloat16 is for a CPU or "
        "GPU with instructions for it; weights, features and keys stay float32",
        choices=DTYPES,
    )


@dataclass(frozen=True)
class ReadingOptions:
    """How a text is read."""

    stride: int | None = flag(
        None,
        "read the text as Hugging Face's page on perplexity does: windows of --tokens-per-sample "
        "tokens that begin so many tokens apart, each predicting what none before it did; in the "
        "place of --context-window",
        counts="tokens from one window to the next",
    )


@dataclass(frozen=True)
class DatastoreOptions:
    """Which datastores are read, and how."""

    dstore_filename: str | None = flag(
        None,
        "datastore to read: its folder, or the PREFIX of urvashik/knnlm's files; several with : "
        "between them, each an expert",
    )
    dstore_size: int | None = flag(
        None, "entries, to read urvashik/knnlm's files; ours say it themselves"
    )
    dstore_fp16: bool = flag(
        False,
        "to read urvashik/knnlm's files: float16 keys and int16 values (saving writes float16 keys "
        "anyway)",
    )
    move_dstore_to_mem: bool = flag(False, "read the datastore into memory instead of mapping it")
    knn_keytype: str = flag(
        "last_ffn_input", "the representation that is the key", choices=tuple(KEY_TYPES)
    )

    @property
    def names(self) -> list[str]:
        """The datastores as they were typed: folders, or prefixes of urvashik/knnlm's files."""
        return self.dstore_filename.split(":") if self.dstore_filename else []


@dataclass(frozen=True)
class MixingOptions:
    """Who is mixed, and how."""

    knnlm: bool = flag(False, "evaluate the kNN-LM")
    experts: str | None = flag(
        None,
        "who is mixed with the language model: of knn, cache, ngram, suffix and lm2, with commas "
        "between them (default: as calibrated, else knn)",
    )
    mixer: Literal["auto", "fixed", "blend", "bins", "gate", "none"] = flag(
        "auto",
        "the calibrated mixer: fixed, blend, bins, gate, or auto for the best; none to mix "
        "nothing, where a score table is all that is wanted",
    )
    skip_searches: float | None = flag(
        None,
        "share of the searches to skip, 0 to 1: where a calibrated gate that sees only what is "
        "known before the search expects least of the neighbours",
    )

    @property
    def evaluates(self) -> bool:
        """Whether experts are asked for."""
        return bool(self.knnlm or self.experts)

    @property
    def named(self) -> list[str] | None:
        """The kinds of experts that are named, None where nothing is said."""
        return [name.strip() for name in self.experts.split(",")] if self.experts else None


@dataclass(frozen=True)
class SavingOptions:
    """The datastore to be saved."""

    save_knnlm_dstore: bool = flag(False, "save a datastore of --gen-subset at --dstore-mmap")
    dstore_mmap: str | None = flag(None, "folder of the datastore to save")
    dstore_fp32: bool = flag(False, "save the keys in float32")
    no_save_keys: bool = flag(
        False,
        "with --save-knnlm-dstore: do not write the keys, but pass them into an index of --recipe, "
        "trained on a first pass over a part of the text",
    )
    recipe: str = flag("auto", "that index: auto, paper or a FAISS factory string (default: auto)")
    max_bytes_per_key: int | None = flag(
        None, "memory that --recipe auto may spend on a key (default: 72)", counts="bytes"
    )
    append_dstore: bool = flag(
        False,
        "with --save-knnlm-dstore: add the text to the datastore that is at --dstore-mmap, and to "
        "its index",
    )
    block_rows: int = flag(
        2**20,
        "entries of a block, about: a datastore of more than one is made block by block, and goes "
        "on where it was stopped (default: 1,048,576)",
        counts="entries",
    )
    document_boundary: str | None = flag(
        None,
        "regular expression that the first line of each document of the text matches at its "
        "beginning, such as '= [^=]' of WikiText (default: documents begin after empty lines)",
    )

    @property
    def key_dtype(self) -> str | None:
        """Of the keys that are written; None where none are."""
        if self.no_save_keys:
            return None
        return "float32" if self.dstore_fp32 else "float16"


@dataclass(frozen=True)
class WritingOptions:
    """What else is left behind."""

    results_json: str | None = flag(None, "write what was measured to this file")
    raw_text: str | None = flag(
        None,
        "the text of the split before it was cut into tokens, of the same lines: perplexity is "
        "then told a word and a byte of it, too (default: the split's pieces of words, joined)",
    )
    score_table: str | None = flag(None, "write one row a scored token to this .npz")
    progress_file: str | None = flag(
        None, "write to this file, once a second, how many tokens are scored, and of how many"
    )
    lm_features: bool = flag(
        False,
        "with --score-table: also the entropy and top probability of the language model, which "
        "costs a softmax over the vocabulary",
    )
    table_costs: bool = flag(
        False,
        "with --score-table: also measure what its columns cost in time, for `fairseq-knnlm tune "
        "--speed`",
    )


@dataclass(frozen=True)
class GenerationOptions:
    """How text is generated."""

    speculate: Literal["auto", "on", "off"] = flag(
        "auto",
        "greedy search (--beam 1) drafts several tokens by the text and its neighbours, and checks "
        "them in one forward pass; what is written stays the same: on, off, or auto for batches in "
        "which that pays",
    )

    @property
    def wanted(self) -> bool | None:
        """Whether drafts are asked for; None for where they pay."""
        return None if self.speculate == "auto" else self.speculate == "on"


@dataclass(frozen=True)
class Options:
    """All that a run is asked to do.

    Attributes:
        lm: how the language models compute.
        reading: how a text is read.
        datastores: which are read, and how.
        mixing: who is mixed, and how.
        saving: the datastore to be saved.
        writing: what else is left behind.
        generation: how text is generated.
        experts: the options of every kind of expert, by its name.
    """

    lm: LanguageModelOptions = field(default_factory=LanguageModelOptions)
    reading: ReadingOptions = field(default_factory=ReadingOptions)
    datastores: DatastoreOptions = field(default_factory=DatastoreOptions)
    mixing: MixingOptions = field(default_factory=MixingOptions)
    saving: SavingOptions = field(default_factory=SavingOptions)
    writing: WritingOptions = field(default_factory=WritingOptions)
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    experts: Mapping[str, Any] = field(
        default_factory=lambda: {kind.name: kind.options() for kind in kinds()}
    )

    def of(self, kind: Kind) -> Any:
        """The options of a kind of expert."""
        return self.experts[kind.name]

    @property
    def knn(self) -> KnnOptions:
        """The options of the neighbours, some of which are of the datastore itself.

        They say whether its keys are opened, and how the index is searched that is made of them.
        """
        found: KnnOptions = self.experts["knn"]
        return found

    @property
    def named_experts(self) -> list[str] | None:
        """The experts that are named, None where nothing is said; knn for each datastore."""
        return None if self.mixing.named is None else self._names(self.mixing.named)

    @property
    def default_experts(self) -> list[str]:
        """The experts that are asked where nothing is said and nothing was fitted."""
        return self._names([DEFAULT])

    def _names(self, named: list[str]) -> list[str]:
        stores = len(self.datastores.names)
        found = [(find_kind(name), name) for name in named]
        return [one for kind, name in found for one in (kind.names(stores) if kind else [name])]

    @property
    def given(self) -> dict[str, str]:
        """Flags that give a weight or setting, and the kind of expert whose they are."""
        return {name: kind.name for kind in kinds() for name in kind.given(self.of(kind))}

    @property
    def given_weights(self) -> dict[str, float]:
        """The weights that flags give, by the kind of expert."""
        weights = {kind.name: kind.given_weight(self.of(kind)) for kind in kinds()}
        return {name: weight for name, weight in weights.items() if weight is not None}
