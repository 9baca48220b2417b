"""What a datastore says of itself: ``manifest.json``, read, checked and written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec.structs import replace

from fairseq_knnlm.errors import DatastoreError
from fairseq_knnlm.files import Checksum, Fingerprint, chunks_of, read_sealed, write_sealed
from fairseq_knnlm.files.arrays import MOST_HEADER

FORMAT = "fairseq-knnlm datastore"
#: Version 2 may lack keys, 3 is compressed, 4 is in blocks. What needs none of these is written as
#: version 1.
VERSION = 4
MANIFEST, KEYS, VALUES = "manifest.json", "keys.npy", "values.npy"
PROJECTION, WEIGHTS = "projection.npy", "weights.npy"
INDEX, DOCUMENTS = "knn.index", "documents.npz"
#: What ``versions`` call the processor.
PROCESSOR = "processor"
#: Where the blocks lie of a datastore that has several.
BLOCKS = "blocks"

#: Types of fields, with their bounds: rows, dimensions, fingerprints.
Bounded = Annotated[int, msgspec.Meta(ge=1, le=2**48)]
Row = Annotated[int, msgspec.Meta(ge=0, le=2**48)]
Width = Annotated[int, msgspec.Meta(ge=1, le=10**6)]
#: Of a model, dictionary or datastore; empty where unknown.
Known = Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{64})?$")]


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What made a datastore; what a model must match to use it.

    Attributes:
        model: fingerprint of the language model's weights.
        dictionary: fingerprint of the dictionary.
        vocabulary: types in the dictionary; values are below it.
        key_type: which representation the keys are (``--knn-keytype``).
        split: the data split that was read.
        context: block length, context window and break mode of the forward pass; how its batches
            were made, and in which precision it was computed.
        versions: library versions at the time of writing, and the processor.
    """

    model: Known
    dictionary: Known
    vocabulary: Annotated[int, msgspec.Meta(ge=1, le=2**62)]
    key_type: str
    split: str = ""
    context: dict[str, Annotated[int, msgspec.Meta(ge=-(2**48), le=2**48)] | str | None] = {}
    versions: dict[str, str] = {}

    @property
    def anywhere(self) -> Origin:
        """The same, whichever processor it was computed on: processes that share the work may have
        several kinds.
        """
        others = {name: it for name, it in self.versions.items() if name != PROCESSOR}
        return replace(self, versions=others)


class Compression(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a datastore was made of a larger one.

    Attributes:
        datastore: fingerprint of the larger one.
        rows: its entries.
        width: dimensions of its keys.
        pca: principal components kept; None where keys were not projected.
        merge: nearest neighbours that an entry could absorb; None where none were merged.
        seed: of everything random in it.
    """

    datastore: Fingerprint
    rows: Bounded
    width: Width
    pca: Width | None
    merge: Bounded | None
    seed: int

    def describe(self) -> str:
        """``"from 2,088,628 entries of width 256 by --merge 8 --pca 128 --seed 0"``."""
        chosen = {"merge": self.merge, "pca": self.pca, "seed": self.seed}
        flags = " ".join(f"--{name} {value}" for name, value in chosen.items() if value is not None)
        return f"from {self.rows:,} entries of width {self.width} by {flags}"


class Sums(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What tells whether a file is as it was written.

    Attributes:
        bytes: its length.
        chunks: its checksums, one for each 64 MiB.
    """

    bytes: Annotated[int, msgspec.Meta(ge=0, le=2**62)]
    chunks: Sequence[Checksum]


class Stretch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A block, as the datastore that it belongs to knows it.

    Attributes:
        name: of its folder, in ``blocks``.
        rows: entries that it holds.
        fingerprint: of its own manifest.
        breaks: those of its rows that do not follow the row before them in a text, ascending.
        forgotten: its rows that count no more, as (first, behind the last), ascending and apart.
    """

    name: Annotated[str, msgspec.Meta(pattern="^[0-9]{6,12}$")]
    rows: Bounded
    fingerprint: Fingerprint
    breaks: Sequence[Row] = ()
    forgotten: Sequence[tuple[Row, Row]] = ()

    @property
    def kept(self) -> list[tuple[int, int]]:
        """Its rows that count, as (first, behind the last), ascending."""
        edges = [0, *(edge for pair in self.forgotten for edge in pair), self.rows]
        pairs = zip(edges[::2], edges[1::2], strict=True)
        return [(start, stop) for start, stop in pairs if start < stop]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shape, types and origin of a datastore.

    Attributes:
        rows: entries, N; of several blocks those that were not forgotten.
        width: dimensions of a key, D, or P after PCA.
        key_dtype: ``"float16"`` or ``"float32"``; None for a datastore that kept no keys.
        value_dtype: the integer type of the values.
        origin: what made it.
        files: the arrays by name.
        compressions: what was done to the datastore that was saved, in that order.
        blocks: of a datastore that has several; it holds no arrays of its own.
        before: fingerprints that this datastore had before it was changed, the last one last.
    """

    rows: Bounded
    width: Width
    key_dtype: Annotated[str, msgspec.Meta(pattern="^float(16|32)$")] | None
    value_dtype: Annotated[str, msgspec.Meta(pattern="^(uint16|int32|int64)$")]
    origin: Origin
    files: dict[str, Sums] = {}
    compressions: Sequence[Compression] = ()
    blocks: Sequence[Stretch] = ()
    before: Sequence[Fingerprint] = ()

    @property
    def has_checksums(self) -> bool:
        """Whether there is something to tell by that the arrays are as they were written.

        Files of urvashik/knnlm carry nothing of the kind.
        """
        return bool(self.files or self.blocks)

    @property
    def query_width(self) -> int:
        """Dimensions of the language model's keys, which are projected where ``width`` is less."""
        return self.compressions[0].width if self.compressions else self.width

    @property
    def merged(self) -> bool:
        """Whether entries were merged, so that row i + 1 need not follow row i."""
        return any(step.merge for step in self.compressions)

    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of each array in the datastore's own folder, by the name of its file."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        if self.blocks:
            return found
        if self.key_dtype is not None:
            found[KEYS] = self.key_dtype, (self.rows, self.width)
        found[VALUES] = self.value_dtype, (self.rows,)
        if any(step.pca for step in self.compressions):
            found[PROJECTION] = "float32", (self.query_width, self.width)
        if self.merged:
            found[WEIGHTS] = "int32", (self.rows,)
        return found


def read_manifest(path: Path) -> tuple[Manifest, str]:
    """The manifest of the datastore at ``path``, and its fingerprint.

    Raises:
        DatastoreError: where there is none, or it is damaged or of a newer version; it names the
            field that is not as it should be.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise DatastoreError(
            f"no datastore at {path}",
            expected=f"a folder with {MANIFEST}, or PREFIX with PREFIX_keys.npy and --dstore-size",
            found="a folder without it" if path.is_dir() else "nothing",
            do="save one: fairseq-eval-lm ... --save-knnlm-dstore --dstore-mmap PATH",
        )
    try:
        manifest, seal = read_sealed(file, FORMAT, VERSION, Manifest, _renewed)
        _check_manifest(manifest)
        return manifest, seal
    except ValueError as error:
        raise damaged(file, "the manifest as it was written", str(error)) from None


def _renewed(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of any version, with those that it does without."""
    if "blocks" in fields:
        return {"files": {}, "compressions": [], **fields}
    return {"compressions": [], "blocks": [], "before": [], **fields}


def _check_manifest(manifest: Manifest) -> None:
    """Refuses fields that contradict each other.

    Raises:
        ValueError: naming the field.
    """
    if np.iinfo(manifest.value_dtype).max < manifest.origin.vocabulary - 1:
        raise ValueError(
            f"{manifest.value_dtype}, which cannot hold {manifest.origin.vocabulary:,} types "
            "- at `$.value_dtype`"
        )
    _check_widths(manifest)
    _check_files(manifest)
    if manifest.blocks:
        _check_blocks(manifest)


def _check_blocks(manifest: Manifest) -> None:
    """Refuses blocks that come twice, and rows that they do not have."""
    for number, block in enumerate(manifest.blocks):
        place = f"at `$.blocks[{number}]"
        edges = [edge for pair in block.forgotten for edge in pair]
        if any(a >= b for a, b in pairwise(edges)) or (edges and edges[-1] > block.rows):
            raise ValueError(f"rows that do not ascend to {block.rows:,} - {place}.forgotten`")
        breaks = [*block.breaks, block.rows]
        if any(a >= b for a, b in pairwise(breaks)):
            raise ValueError(f"rows that do not ascend to {block.rows:,} - {place}.breaks`")
        if not block.kept:
            raise ValueError(f"a block of which nothing is left - {place}`")
    if len({block.name for block in manifest.blocks}) < len(manifest.blocks):
        raise ValueError("a block that comes twice - at `$.blocks`")
    kept = sum(stop - start for block in manifest.blocks for start, stop in block.kept)
    if kept != manifest.rows:
        raise ValueError(f"{manifest.rows:,}, where the blocks keep {kept:,} - at `$.rows`")


def _check_widths(manifest: Manifest) -> None:
    """Refuses compressions of which one does not start where the one before ended."""
    width = manifest.query_width
    for number, step in enumerate(manifest.compressions):
        place = f"at `$.compressions[{number}]`"
        if step.width != width:
            raise ValueError(f"width {step.width} after {width} - {place}")
        width = step.pca or width
        if width > step.width:
            raise ValueError(f"pca {width} of width {step.width} - {place}")
        if step.pca is None and step.merge is None:
            raise ValueError(f"neither pca nor merge - {place}")
    if width != manifest.width:
        raise ValueError(f"{manifest.width} after compressing to {width} - at `$.width`")


def _check_files(manifest: Manifest) -> None:
    """Refuses other files than there must be, and lengths that do not fit their shapes."""
    arrays = manifest.arrays()
    if different := sorted(set(arrays) ^ set(manifest.files)):
        known = "missing" if different[0] in arrays else "not to be expected"
        raise ValueError(f"{different[0]}, which is {known} - at `$.files`")
    for name, (dtype, shape) in arrays.items():
        sums = manifest.files[name]
        least = math.prod(shape) * np.dtype(dtype).itemsize
        if not least < sums.bytes <= least + MOST_HEADER:
            raise ValueError(
                f"{sums.bytes:,} for {shape} {dtype}, {least:,} bytes and a header "
                f"- at `$.files.{name}.bytes`"
            )
        if len(sums.chunks) != chunks_of(sums.bytes):
            raise ValueError(
                f"{len(sums.chunks)} checksums for {sums.bytes:,} bytes "
                f"- at `$.files.{name}.chunks`"
            )


def write_manifest(file: Path, manifest: Manifest) -> str:
    """Writes it in the oldest version that can say it; returns the fingerprint."""
    content = msgspec.to_builtins(manifest)
    if manifest.blocks:
        del content["files"], content["compressions"]
        return write_sealed(file, FORMAT, VERSION, content)
    del content["blocks"], content["before"]
    if manifest.compressions:
        return write_sealed(file, FORMAT, 3, content)
    del content["compressions"]
    return write_sealed(file, FORMAT, 1 if manifest.key_dtype else 2, content)


def damaged(file: Path, expected: str, found: str) -> DatastoreError:
    """What a user is told of a file whose bytes are not those that were written."""
    return DatastoreError(
        f"{file} is damaged",
        expected=expected,
        found=found,
        do="restore it from a copy, or save the datastore again",
    )


def value_dtype(vocabulary: int) -> np.dtype:
    """The smallest of uint16, int32 and int64 that holds every token id below ``vocabulary``."""
    for name in ("uint16", "int32", "int64"):
        if vocabulary - 1 <= np.iinfo(name).max:
            return np.dtype(name)
    raise AssertionError(vocabulary)
