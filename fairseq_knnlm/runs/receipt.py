"""The receipt of a figure: all that made it, by fingerprints, so that anybody can get it again.

It stands in the results JSON, which is sealed: a later change of any figure shows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch

from fairseq_knnlm.calibration.settings import Finite
from fairseq_knnlm.calibration.share import Count
from fairseq_knnlm.errors import ReceiptError
from fairseq_knnlm.experts.kind import spelled
from fairseq_knnlm.experts.registry import kind_of, kinds
from fairseq_knnlm.files import Fingerprint, fingerprint, parse_json, typed
from fairseq_knnlm.files.plain_json import read_text
from fairseq_knnlm.index.card import index_fingerprint
from fairseq_knnlm.lm.fingerprints import dictionary_fingerprint
from fairseq_knnlm.lm.precision import precision
from fairseq_knnlm.lm.processor import processor
from fairseq_knnlm.runs.inputs import Inputs
from fairseq_knnlm.runs.mixing import described
from fairseq_knnlm.runs.options import Options
from fairseq_knnlm.runs.shares import given_flags

#: What names the folder that fairseq-preprocess wrote, in the place of a flag.
DATA = "data"
CHECKPOINT = "--path"
RAW_TEXT = "--raw-text"
INDEX = "--indexfile"
TABLE, CALIBRATION, DICTIONARY = "--score-table", "--calibration", "--data"
#: Where a thing lies and what computes differ from one machine to the next.
OF_THE_MACHINE = {"path", "data", "processor", "threads"}


class SourceFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file that figures came of.

    Attributes:
        of: the flag that names it, or ``"data"`` for those in the folder of the text.
        path: as it was typed.
        bytes: its length.
        sha256: of all its bytes, as ``sha256sum`` prints it.
    """

    of: str
    path: str
    bytes: Count
    sha256: Fingerprint


class SourceStore(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A datastore that figures came of.

    Attributes:
        path: as it was typed.
        fingerprint: of its manifest, which has the checksums of its arrays.
        index: fingerprint of the index in it; None where none of it was searched.
    """

    path: str
    fingerprint: Fingerprint
    index: Fingerprint | None


class SourceIndex(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An index that ``--indexfile`` names.

    Attributes:
        path: as it was typed.
        fingerprint: of its card, which has the checksums of its bytes, or of these themselves.
    """

    path: str
    fingerprint: Fingerprint


class Receipt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What made the figures of a run.

    Attributes:
        data: the folder that fairseq-preprocess wrote, as it was typed.
        reading: fairseq's flags by which the text was read; null of those without a value.
        flags: those of ``knn_lm`` that were given and matter to figures.
        files: that were read, but for datastores and what lies in them.
        datastores, index: likewise.
        calibration: fingerprint of what was fitted; None where nothing of it was used.
        model: fingerprint of the language model's weights.
        dictionary: that of the dictionary's symbols.
        precision: of the weights, such as ``float32``.
        processor, threads: that computed.
        score_table: whether one was written, for which more is computed at a time.
        described: what each expert was, by its name.
    """

    data: str
    reading: dict[str, str | None]
    flags: dict[str, str | bool | Count | Finite | None]
    files: list[SourceFile]
    datastores: list[SourceStore]
    index: SourceIndex | None
    calibration: Fingerprint | None
    model: Annotated[str, msgspec.Meta(max_length=64)]
    dictionary: Fingerprint
    precision: str
    processor: str
    threads: Count
    score_table: bool
    described: dict[str, dict[str, Any]]

    def of(self, name: str) -> list[SourceFile]:
        """The files that a flag names."""
        return [file for file in self.files if file.of == name]


class TableReceipt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What made the figures of a report on a score table.

    Attributes:
        table_files: that were read, by the flags that name them: the score table, the calibration,
            and, where figures a word and a byte are told by them, dictionary and raw text.
    """

    table_files: Annotated[list[SourceFile], msgspec.Meta(min_length=2)]

    def __post_init__(self) -> None:
        """Refuses a receipt that names no table or no calibration.

        Raises:
            ValueError: saying so.
        """
        if not {TABLE, CALIBRATION} <= {file.of for file in self.table_files}:
            raise ValueError(f"a receipt without {TABLE} and {CALIBRATION}")


@dataclass(frozen=True)
class Typed:
    """What fairseq was given besides the flags of ``knn_lm``.

    Attributes:
        data: the folder that fairseq-preprocess wrote.
        reading: its flags by which the text is read.
        files: that it reads, by the flag that names them, or ``DATA``.
    """

    data: str
    reading: Mapping[str, str | None]
    files: Mapping[str, Sequence[str]] = field(default_factory=dict)


def make_receipt(inputs: Inputs, typed: Typed) -> dict[str, Any]:
    """What made the figures of a run: a ``Receipt``, as JSON.

    Args:
        inputs: what the run worked on.
        typed: what fairseq was given.
    """
    memory, options, model = inputs.memory, inputs.options, inputs.models[0]
    calibration = memory.calibration if memory is not None else None
    stores = memory.stores if memory is not None else ()
    indexfile = options.knn.indexfile if _searched(inputs, 0) else None
    names = {**typed.files, **_named(options, memory.experts if memory is not None else ())}
    files = [source_file(name, Path(path)) for name, paths in names.items() for path in paths]
    receipt = Receipt(
        data=typed.data,
        reading=dict(typed.reading),
        flags=dict(given_flags(options)),
        files=[file for file in files if file is not None],
        datastores=[
            SourceStore(
                str(store.path),
                store.fingerprint,
                index_fingerprint(store.index_path)
                if _searched(inputs, number) and indexfile is None
                else None,
            )
            for number, store in enumerate(stores)
        ],
        index=SourceIndex(indexfile, index_fingerprint(Path(indexfile))) if indexfile else None,
        calibration=calibration.fingerprint if calibration is not None else None,
        model=inputs.model,
        dictionary=dictionary_fingerprint(inputs.vocabulary.symbols),
        precision=precision(model),
        processor=processor(model),
        threads=torch.get_num_threads(),
        score_table=bool(options.writing.score_table),
        described=described(memory.experts, inputs.loaded) if memory is not None else {},
    )
    return dict(msgspec.to_builtins(receipt))


def _searched(inputs: Inputs, number: int) -> bool:
    """Whether the datastore of this number is searched."""
    stores = len(inputs.memory.stores) if inputs.memory is not None else 0
    asked = inputs.memory.experts if inputs.memory is not None else {}
    return any(
        kind_of(name).searches and kind_of(name).names(stores).index(name) == number
        for name in asked
    )


def _named(options: Options, experts: Iterable[str]) -> dict[str, list[str]]:
    """Files that flags of ``knn_lm`` name, by the flag, but for datastores and indexes."""
    found = {RAW_TEXT: [options.writing.raw_text] if options.writing.raw_text else []}
    asked = {kind_of(name).name for name in experts}
    for kind in kinds():
        for flag in kind.flags("checkpoint"):
            path = getattr(options.of(kind), flag)
            found[spelled(flag)] = [path] if path and kind.name in asked else []
    return found


def source_file(of: str, path: Path) -> SourceFile | None:
    """What a receipt says of a file; None where there is none, as of the parts of a checkpoint."""
    if not path.is_file():
        return None
    return SourceFile(of, str(path), path.stat().st_size, sha256(path))


def sha256(path: Path) -> str:
    """Of all bytes of a file, as ``sha256sum`` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(found: Mapping[str, Any]) -> dict[str, Any]:
    """Results with a fingerprint at their end, by which a later change shows."""
    content = {name: x for name, x in found.items() if name != "fingerprint"}
    return {**content, "fingerprint": fingerprint(content)}


def anywhere(receipt: Any) -> Any:
    """A receipt, as JSON, without what differs from one machine to the next."""
    if isinstance(receipt, dict):
        return {x: anywhere(y) for x, y in receipt.items() if x not in OF_THE_MACHINE}
    return [anywhere(one) for one in receipt] if isinstance(receipt, list) else receipt


def read_results(path: Path) -> tuple[dict[str, Any], Receipt | TableReceipt]:
    """Results of a whole run, or of a report, and their receipt.

    Raises:
        ReceiptError: where they cannot be read, were altered, are of a share, or have no receipt.
    """
    try:
        found = parse_json(read_text(path))
        if not isinstance(found, dict) or "tokens" not in found:
            raise ValueError("JSON of another kind")
        if found.get("receipt") is None:
            raise ValueError("results without a receipt, such as earlier versions wrote")
        if sealed(found)["fingerprint"] != found.get("fingerprint"):
            raise ValueError("an altered file (its fingerprint differs)")
        if found.get("share") is not None:
            raise ValueError("results of a share, which `fairseq-knnlm report --join` joins")
        told = found["receipt"]
        of_a_table = isinstance(told, dict) and "table_files" in told
        return found, typed(told, TableReceipt) if of_a_table else typed(told, Receipt)
    except ValueError as error:
        raise ReceiptError(
            f"{path} cannot be replayed",
            expected="results of a whole run, as --results-json FILE writes them",
            found=error,
            do="evaluate again, with --results-json",
        ) from None
