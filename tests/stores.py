"""Small datastores and questions for the tests of single modules, and ways to spoil a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from fairseq_knnlm import files
from fairseq_knnlm.datastore import (
    Compression,
    Datastore,
    DatastoreWriter,
    Manifest,
    Origin,
    Stretch,
    Sums,
    open_datastore,
    outline,
    read_manifest,
)
from fairseq_knnlm.datastore.manifest import write_manifest
from fairseq_knnlm.errors import KnnlmError
from fairseq_knnlm.experts.contract import Expert
from fairseq_knnlm.experts.knn import vote
from fairseq_knnlm.index.build import BuildOptions, build
from fairseq_knnlm.index.card import IndexCard
from fairseq_knnlm.index.recipes import choose
from fairseq_knnlm.lm.contexts import CONTEXT, Contexts
from fairseq_knnlm.retrieval.neighbours import Neighbours


def origin(vocabulary: int = 50) -> Origin:
    return Origin("a" * 64, "b" * 64, vocabulary, "last_ffn_input", split="train")


def random_entries(rows: int, width: int, vocabulary: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """(rows, width) float32 keys and (rows,) token ids, always the same."""
    rng = np.random.default_rng(rows + width)
    keys = rng.normal(size=(rows, width)).astype(np.float32)
    return keys, rng.integers(0, vocabulary, size=rows)


def clustered(rows: int = 3000, width: int = 8) -> np.ndarray:
    """200 clusters: a few lists hold all that is near."""
    rng = np.random.default_rng(1)
    centres = 10 * rng.normal(size=(200, width))
    return (centres[rng.integers(200, size=rows)] + rng.normal(size=(rows, width))).astype("f4")


def write_store(
    path: Path,
    keys: np.ndarray,
    values: np.ndarray,
    vocabulary: int = 50,
    dtype: str | None = "float32",
) -> Datastore:
    """Writes a datastore in one go and opens it."""
    writer = DatastoreWriter(path, *keys.shape, origin(vocabulary), dtype)
    writer.write(np.arange(len(keys)), keys, values)
    return open_datastore(writer.publish())


def write_blocks(
    path: Path,
    keys: np.ndarray,
    values: np.ndarray,
    cuts: Sequence[int],
    forgotten: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> Datastore:
    """Writes a datastore in blocks, cut before these rows, and opens it.

    ``forgotten`` are rows of each block, as (first, behind the last). Blocks that are there stay.
    """
    bounds = [0, *cuts, len(keys)]
    stretches = []
    for number, (start, stop) in enumerate(pairwise(bounds)):
        folder = path / "blocks" / f"{number:06d}"
        if not folder.exists():
            write_store(folder, keys[start:stop], values[start:stop])
        gone = forgotten[number] if forgotten else ()
        seal = outline(folder).fingerprint
        breaks = [] if number else [0]
        stretches.append(Stretch(folder.name, stop - start, seal, breaks, gone))
    rows = sum(stop - start for stretch in stretches for start, stop in stretch.kept)
    manifest = Manifest(rows, keys.shape[1], "float32", "uint16", origin(), blocks=stretches)
    write_manifest(path / "manifest.json", manifest)
    return open_datastore(path)


Ranges = Sequence[tuple[int, int]]
CUTS = [0, 40, 41, 100]


def write_cut(
    path: Path,
    cuts: Sequence[int] = CUTS,
    forgotten: Sequence[Ranges] = ((), (), ()),
    *,
    breaks: Sequence[int] = (0,),
    values: np.ndarray | None = None,
    key_dtype: str | None = "float16",
) -> Datastore:
    """A datastore of entries that are cut at these rows; some of each block are forgotten.

    Args:
        path: its folder.
        cuts: from 0 to the number of entries.
        forgotten: for each block, rows of its own.
        breaks: rows at which a text begins.
        values: other tokens than ``random_entries`` gives.
        key_dtype: of the keys; None to keep none.
    """
    keys, tokens = random_entries(cuts[-1], 6)
    values = tokens if values is None else values
    stretches = []
    for number, (start, stop) in enumerate(pairwise(cuts)):
        part = write_store(
            *(path / "blocks" / f"{number:06d}", keys[start:stop], values[start:stop]),
            dtype=key_dtype,
        )
        here = [row - start for row in breaks if start <= row < stop]
        stretches.append(
            Stretch(part.path.name, len(part), part.fingerprint, here, forgotten[number])
        )
    rows = sum(stop - start for stretch in stretches for start, stop in stretch.kept)
    manifest = Manifest(rows, 6, key_dtype, "uint16", origin(), blocks=stretches)
    write_manifest(path / "manifest.json", manifest)
    return open_datastore(path)


def kept(forgotten: Sequence[Ranges], cuts: Sequence[int] = CUTS) -> np.ndarray:
    """The entries that are left of those of ``write_cut``."""
    gone = {
        first + row
        for first, ranges in zip(cuts, forgotten, strict=False)
        for start, stop in ranges
        for row in range(start, stop)
    }
    return np.array([row for row in range(cuts[-1]) if row not in gone])


def texts_left(
    forgotten: Sequence[Ranges], cuts: Sequence[int] = CUTS, breaks: Sequence[int] = (0,)
) -> list[list[int]]:
    """The same entries as texts: a new one begins where one did, and behind what is left out."""
    texts: list[list[int]] = []
    for row in kept(forgotten, cuts).tolist():
        if not texts or row in breaks or texts[-1][-1] != row - 1:
            texts.append([])
        texts[-1].append(row)
    return texts


def write_compressed(path: Path) -> Datastore:
    """100 entries that stand for 250, of width 6 where the model's is 9."""
    keys, values = random_entries(100, 6)
    rng = np.random.default_rng(6)
    writer = DatastoreWriter(
        path,
        *keys.shape,
        origin(),
        compressions=[Compression("d" * 64, rows=250, width=9, pca=6, merge=4, seed=1)],
        projection=rng.normal(size=(9, 6)).astype(np.float32),
        weights=np.array([1, 4] * 50, np.int32),
    )
    writer.write(np.arange(100), keys, values)
    return open_datastore(writer.publish())


def build_index(
    keys: np.ndarray, recipe: str, *, queries: int = 0, **options: Any
) -> tuple[Any, IndexCard]:
    """Builds an index of a recipe by name; recall is not measured unless asked."""
    chosen = choose(recipe, *keys.shape, metric=options.get("metric", "l2"))
    return build(keys, chosen, BuildOptions(queries=queries, **options), progress=False)


def brute_force(xb: np.ndarray, xq: np.ndarray, k: int, metric: str) -> tuple[np.ndarray, ...]:
    """(distances, ids) of the k nearest, in float64, best first."""
    xb, xq = xb.astype(np.float64), xq.astype(np.float64)
    scores = xq @ xb.T if metric == "ip" else -((xq[:, None] - xb[None]) ** 2).sum(axis=2)
    ids = np.argsort(-scores, axis=1)[:, :k]
    best = np.take_along_axis(scores, ids, axis=1)
    return (best if metric == "ip" else -best), ids


def contexts(tokens: list[int], seen: int = CONTEXT) -> Tensor:
    """(N, CONTEXT), of each of N tokens the ``seen`` before it, the nearest first, else -1."""
    rows = [tokens[max(place - seen, 0) : place][::-1] for place in range(len(tokens))]
    return torch.tensor([row + [-1] * (CONTEXT - len(row)) for row in rows])


@dataclass(frozen=True)
class Question:
    """Contexts, and what came after them."""

    contexts: Contexts
    targets: Tensor

    def __getitem__(self, places: Tensor | slice) -> Question:
        return Question(self.contexts[places], self.targets[places])


def asking(
    keys: Tensor, targets: Tensor, before: Tensor | None = None, rows: Tensor | None = None
) -> Question:
    """Contexts whose keys are their features too; the first of the text unless told."""
    size = len(targets)
    if before is None:
        before = torch.full((size, CONTEXT), -1)
    rows = torch.arange(size) if rows is None else rows
    return Question(Contexts(keys, keys, before, rows), targets)


@dataclass(frozen=True)
class Answer:
    """What an expert said: of the targets (N, S), and its features."""

    log_probs: Tensor
    features: dict[str, Tensor]


def ask(expert: Expert, asked: Question) -> Answer:
    """An expert's prediction, asked for what came; then it is told."""
    prediction = expert.predict(asked.contexts)
    found = Answer(prediction.log_prob(asked.targets), dict(prediction.features))
    expert.observe(asked.targets)
    return found


def knn_log_probs(
    distances: Tensor,
    matches: Tensor,
    valid: Tensor,
    temperatures: Sequence[float],
    log_weights: Tensor | None = None,
) -> Tensor:
    """(N, M) log p of the token that ``matches`` says neighbours have, by a sparse prediction."""
    ids = torch.zeros_like(matches, dtype=torch.int64)
    near = Neighbours(
        ids, distances.masked_fill(~valid, torch.inf), matches.long(), valid, log_weights
    )
    return vote(near, temperatures).log_prob(torch.ones(len(distances)).long())


def joined(parts: Sequence[Answer]) -> Answer:
    """Answers of consecutive contexts, as one."""
    names = parts[0].features
    return Answer(
        torch.cat([part.log_probs for part in parts]),
        {name: torch.cat([part.features[name] for part in parts]) for name in names},
    )


def share(found: np.ndarray, true: np.ndarray) -> float:
    pairs = zip(found.tolist(), true.tolist(), strict=True)
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in pairs]))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def alter(file: Path) -> None:
    """Changes one bit in the middle of the file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def assert_helps(caught: pytest.ExceptionInfo[KnnlmError], *words: str) -> None:
    """The message says what was expected, what was found and what to do, and the words given."""
    message = str(caught.value)
    for word in ("expected: ", "found:    ", "to do:    ", *words):
        assert word in message, message


def plant(store: Datastore, block: int, name: str, change: Callable[[np.ndarray], object]) -> None:
    """Changes an array of a block, or of a flat datastore; checksums and seals are made anew.

    Args:
        store: in blocks, or flat.
        block: the number of one.
        name: of the file.
        change: is given the array to write to.
    """
    folder = store.blocks[block].path if store.blocks else store.path
    array = np.load(folder / name)
    change(array)
    np.save(folder / name, array)
    part, _ = read_manifest(folder)
    chunks = files.checksums(folder / name)
    sums = {**part.files, name: Sums((folder / name).stat().st_size, chunks)}
    seal = write_manifest(folder / "manifest.json", replace(part, files=sums))
    if store.blocks:
        stretches = list(store.manifest.blocks)
        stretches[block] = replace(stretches[block], fingerprint=seal)
        write_manifest(store.path / "manifest.json", replace(store.manifest, blocks=stretches))
