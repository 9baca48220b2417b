"""Whether the blocks of a datastore are as they were written, and what else lies among them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fairseq_knnlm.datastore import (
    BLOCKS,
    DOCUMENTS,
    KEYS,
    MANIFEST,
    VALUES,
    Block,
    Manifest,
    Stretch,
    outline,
    outlined,
    read_documents,
    read_manifest,
)
from fairseq_knnlm.datastore.blocks import check_block
from fairseq_knnlm.datastore.making import Plan, check_made, made_at
from fairseq_knnlm.errors import IndexFileError, KnnlmError
from fairseq_knnlm.index.card import damaged, read_card
from fairseq_knnlm.index.codes import check_lists
from fairseq_knnlm.index.pieces import open_piece, piece_path, training_in
from fairseq_knnlm.index.trained import read_trained
from fairseq_knnlm.runs.findings import WRONG, Finding, check_arrays, judged, strangers, unread

#: What a block may hold, besides its piece of the index.
KNOWN = {MANIFEST, KEYS, VALUES, DOCUMENTS}
#: Refuses a block's own manifest, of this fingerprint, that does not belong where it is.
Check = Callable[[Block, Manifest, str], None]


@dataclass(frozen=True)
class Training:
    """The trained part of an index in pieces.

    Attributes:
        fingerprint: its own.
        width: bytes of an entry in the pieces.
        index: FAISS's, empty.
    """

    fingerprint: str
    width: int
    index: Any


def training_at(path: Path) -> Training | None:
    """That of the index at ``path``; None where none is in pieces, or it is damaged."""
    try:
        card = read_card(path)
        index = read_trained(path, everything=True)
        if card is None or index is None:
            return None
        return Training(training_in(path, card.bytes), card.piece_bytes, index)
    except (IndexFileError, OSError):
        return None


class CheckedBlocks:
    """Reads every byte of blocks: arrays and their numbers, documents, pieces of the index.

    Args:
        folder: of the datastore, or of what is being made.
        blocks: that are there, or have to be.
        check: compares a block's own manifest with what it has to be.
        training: of the index whose pieces must be there; None where it is in one file or missing.

    Attributes:
        values: once all was read, (N,) those of all blocks that were not forgotten; None where some
            are not as they should be.
    """

    def __init__(
        self, folder: Path, blocks: Sequence[Block], check: Check, training: Training | None
    ) -> None:
        self.values: np.ndarray | None = None
        self._folder = folder
        self._blocks = blocks
        self._check = check
        self._training = training

    def findings(self) -> Iterator[Finding]:
        """One for each block that is not as it should be, and one for all others together."""
        values: list[np.ndarray | None] = []
        names: dict[str, None] = {}
        sound = []
        for block in tqdm(self._blocks, desc="reading blocks", unit=" blocks", delay=2):
            errors, there, found = self._read(block)
            values += [None] if found is None else [found[a:b] for a, b in block.kept]
            if errors:
                yield Finding(block.path, WRONG, tuple(errors))
            else:
                sound.append(block)
                names |= dict.fromkeys(there)
        if sound:
            rows = sum(block.stop - block.first for block in sound)
            what = f"{rows:,} entries, every byte as it was written ({', '.join(names)})"
            number = f"{len(sound):,}" + ("" if len(sound) == len(self._blocks) else " other")
            yield Finding(self._folder / BLOCKS, f"{number} blocks, {what}")
        if values and all(some is not None for some in values):
            self.values = np.concatenate([some for some in values if some is not None])
        for block in self._blocks:
            if block.path.is_dir():
                yield from self._others(block)

    def _read(self, block: Block) -> tuple[list[KnnlmError], list[str], np.ndarray | None]:
        """What is wrong with a block, what was looked at, and its values."""
        try:
            found, seal = read_manifest(block.path)
            self._check(block, found, seal)
        except KnnlmError as error:
            return [error], [], None
        except OSError as error:
            return [unread(block.path, error)], [], None
        store = outlined(block.path, found, seal)
        arrays, errors = check_arrays(store)
        names = list(arrays)
        path = store.documents_path
        if path.exists() or path.is_symlink():
            errors += judged(path, lambda: str(read_documents(store))).errors
            names.append(path.name)
        if (training := self._training) is not None:
            path = piece_path(block, training.fingerprint)
            errors += _wrong_with_piece(block, training)
            names.append(path.name)
        return errors, names, arrays.get(VALUES)

    def _others(self, block: Block) -> Iterator[Finding]:
        known = set(KNOWN)
        if self._training is not None:
            known.add(piece_path(block, self._training.fingerprint).name)
        for finding in strangers(block.path, known):
            if finding.path.match("piece-*.npy"):
                yield Finding(finding.path, "of another index; building one removes it")
            else:
                yield finding


def _wrong_with_piece(block: Block, training: Training) -> list[KnnlmError]:
    """That it is missing, or what is wrong with it; nothing where it is as it was written."""
    path = piece_path(block, training.fingerprint)
    try:
        codes = open_piece(block, training.fingerprint, training.width, everything=True)
        check_lists(training.index, codes)
    except ValueError as error:
        return [damaged(path, "codes that fit the index", str(error))]
    except KnnlmError as error:
        return [error]
    except OSError as error:
        return [unread(path, error)]
    return []


def of_datastore(whole: Manifest) -> Check:
    """Compares blocks with what the datastore's manifest says of them."""

    def check(block: Block, found: Manifest, seal: str) -> None:
        check_block(block, found, seal, whole)

    return check


def of_plan(plan: Plan) -> Check:
    """Compares blocks with what is being made."""

    def check(block: Block, found: Manifest, _: str) -> None:
        check_made(plan, block.path, found, int(block.path.name))

    return check


def blocks_made(path: Path, plan: Plan) -> list[Block]:
    """Those that are there of a datastore in the making, or being added to one."""
    found = []
    for number in plan.blocks:
        folder, rows = made_at(path, number), plan.rows(number)
        if folder.exists():
            seal = _seal(folder)
            found.append(Block(folder, rows.start, Stretch(folder.name, len(rows), seal)))
    return found


def _seal(folder: Path) -> str:
    """The fingerprint of a block; empty where its manifest cannot be read, which is told later."""
    try:
        return outline(folder).fingerprint
    except (KnnlmError, OSError):
        return ""


def unlisted(folder: Path, listed: Collection[str]) -> Iterator[Finding]:
    """What lies among the blocks and is none of them.

    Args:
        folder: of the datastore.
        listed: the names of its blocks, and of those that are being made.
    """
    if not (folder / BLOCKS).is_dir():
        return
    for finding in strangers(folder / BLOCKS, listed):
        if (finding.path / MANIFEST).exists() and finding.path.name.isdecimal():
            yield Finding(
                finding.path,
                "a block that is no part of the datastore, of a run that did not end well; "
                "`fairseq-knnlm compact` removes it",
            )
        else:
            yield finding
