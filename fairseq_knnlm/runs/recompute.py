"""Whether a datastore is what a checkpoint makes of a text: some of its blocks, computed again.

Checksums tell that bytes are as they were written, and not that what was written was right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from fairseq_knnlm.datastore import PROCESSOR, Block, Datastore, Origin, Stretch, open_datastore
from fairseq_knnlm.errors import DatastoreError
from fairseq_knnlm.index.pieces import open_piece, piece_path
from fairseq_knnlm.index.streaming import PieceStream
from fairseq_knnlm.runs.differences import Computed, Difference
from fairseq_knnlm.runs.findings import WRONG, Finding
from fairseq_knnlm.runs.verify_blocks import training_at

#: Values of a block by which it is looked for in a text.
LOOKED_AT = 64
#: Versions that the last digits of keys depend on.
COMPUTING = ("torch", "fairseq", "fairseq_knnlm", PROCESSOR)
#: What they depend on besides, which datastores of before do not tell.
READING = ("max_tokens", "batch_size", "precision")
#: Blocks that a line names at most.
NAMED = 5


class Text(Protocol):
    """A text, and the model that computes its keys.

    Attributes:
        origin: what a datastore that was saved of it now would say of itself.
        width: of the keys.
        edges: (B + 1,) int64, the row of the first token of each block of text, and the number of
            all rows.
    """

    @property
    def origin(self) -> Origin: ...
    @property
    def width(self) -> int: ...
    @property
    def edges(self) -> np.ndarray: ...

    def values(self, texts: range) -> np.ndarray:
        """The tokens (n,) of blocks of text."""
        ...

    def compute(self, texts: range, *, whole: bool) -> Iterator[Computed]:
        """The entries of blocks of text, in batches of their own; or as one reads all of it."""
        ...


#: Opens the text that a block was made of; None where it is not at hand.
OpenText = Callable[[Origin], Text | None]


def check_can_be_computed(store: Datastore) -> None:
    """Refuses a datastore of which nothing can be computed again.

    Args:
        store: its outline.

    Raises:
        DatastoreError: where it does not say how it was made, or was compressed.
    """
    manifest = store.manifest
    if manifest.compressions:
        step = manifest.compressions[-1].describe()
        raise _cannot(store.path, f"one that was compressed, {step}")
    origin = manifest.origin
    if not origin.split or "tokens_per_sample" not in origin.context:
        raise _cannot(store.path, "one that does not say of which text and blocks it was made")


def _cannot(path: Path, found: str) -> DatastoreError:
    return DatastoreError(
        f"the entries of {path} cannot be computed again",
        expected="a datastore as fairseq-knnlm saved it, whose manifest says how it was read",
        found=found,
        do="leave --recompute out",
    )


def recomputed(store: Datastore, open_text: OpenText, share: float, seed: int) -> Iterator[Finding]:
    """Computes a sample of blocks again, and compares.

    Args:
        store: the outline of a datastore; ``check_can_be_computed``.
        open_text: opens the text of a block.
        share: of the blocks, above 0, to 1; one at least.
        seed: of the sample.

    Yields:
        What was found, for each block that was computed, or could not be.

    Raises:
        DatastoreError: where none could, or the model or dictionary is another.
    """
    places = _places(store)
    wanted = max(1, round(share * len(places)))
    computed, elsewhere = 0, []
    for number in np.random.default_rng(seed).permutation(len(places)):
        if computed == wanted:
            break
        block, expected = places[number]
        if (found := _again(store, block, expected, open_text)) is None:
            elsewhere.append(block)
        else:
            computed += 1
            yield found
    if not computed:
        raise DatastoreError(
            f"nothing of {store.path} is of the text in --data",
            expected="the data that was saved, with the split that its manifest names",
            found="another text, or blocks that were written anew (fairseq-knnlm compact)",
            do="name the folder that was saved",
        )
    if elsewhere:
        yield _not_there(elsewhere)


def _not_there(blocks: Sequence[Block]) -> Finding:
    """What is said of blocks whose text is not at hand."""
    names = sorted(block.path.name for block in blocks)
    named = ", ".join([*names[:NAMED], *(["..."] if len(names) > NAMED else [])])
    return Finding(
        blocks[0].path.parent,
        f"{len(blocks):,} blocks that were drawn are not of the text in --data, or were written "
        f"anew without a part of it, and were not computed: {named}",
    )


def check_fits(store: Datastore, text: Text | None) -> None:
    """Refuses another model, or another dictionary, than made the datastore.

    Raises:
        DatastoreError: naming which.
    """
    if text is not None:
        ours = text.origin
        store.check_origin(
            dictionary=ours.dictionary, key_type=ours.key_type, width=text.width, model=ours.model
        )


def _places(store: Datastore) -> list[tuple[Block, int]]:
    """The blocks of a datastore, a flat one's itself, and with which row of the text each begins.

    Where blocks before it were left out or written anew, it begins elsewhere.
    """
    if not store.blocks:
        itself = Stretch("000000", len(store), store.fingerprint, [0])
        return [(Block(store.path, 0, itself), 0)]
    found, row = [], 0
    for block in store.blocks:
        row = 0 if 0 in block.stretch.breaks else row
        found.append((block, row))
        row += block.rows
    return found


def _again(store: Datastore, block: Block, expected: int, open_text: OpenText) -> Finding | None:
    """Computes one block, and says how it compares; None where its text is not at hand."""
    try:
        part = open_datastore(block.path)
    except DatastoreError as error:
        return Finding(block.path, WRONG, (error,))
    text = open_text(part.manifest.origin)
    if text is None:
        return None
    check_fits(store, text)
    texts = _find(text, np.asarray(part.values), expected)
    if texts is None:
        return None
    codes = _Codes.of(store, block) if part.keys is None else None
    # Read as one it was where it is the text, and not a block that was added.
    alone = not store.blocks or int(block.path.name) == 0
    whole = alone and len(texts) == len(text.edges) - 1
    difference = _compared(part, text, texts, codes, whole=whole)
    doubts = _doubts(part.manifest.origin, text.origin)
    what = part.manifest.key_dtype or ("values and codes" if codes else "values alone")
    return difference.finding(block.path, what, doubts)


def _find(text: Text, values: np.ndarray, expected: int) -> range | None:
    """The blocks of text that values (n,) are of; None where they are of none, or of which is open.

    Where they are expected, or wherever they are: half of them are the same there.
    """
    texts = _between(text.edges, expected, len(values))
    if texts is not None and _agree(text.values(texts), values):
        return texts
    tokens = text.values(range(len(text.edges) - 1))
    starts = text.edges[:-1][text.edges[:-1] + len(values) <= len(tokens)]
    looked_at = np.arange(min(LOOKED_AT, len(values)))
    same = (tokens[starts[:, None] + looked_at] == values[looked_at]).mean(axis=1)
    places = starts[same == same.max(initial=0.5)]
    if len(places) != 1:  # such as one of few entries, once those before it are gone
        return None
    texts = _between(text.edges, int(places[0]), len(values))
    return texts if texts is not None and _agree(text.values(texts), values) else None


def _between(edges: np.ndarray, start: int, rows: int) -> range | None:
    """The blocks of text that begin at a row and hold so many; None where none end there."""
    first, last = np.searchsorted(edges, [start, start + rows]).tolist()
    if last == len(edges) or [edges[first], edges[last]] != [start, start + rows]:
        return None
    return range(first, last)


def _agree(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return bool((ours == theirs).mean() >= 0.5)


class _Codes:
    """Compares a block's piece of the index with one that is made of computed keys.

    Args:
        index: trained and empty.
        stored: (rows, S) uint8, the piece.
    """

    def __init__(self, index: object, stored: np.ndarray) -> None:
        self._stored = stored
        self._stream = PieceStream(index)
        self._rows: list[np.ndarray] = []

    @classmethod
    def of(cls, store: Datastore, block: Block) -> _Codes | None:
        """That of a block; None where the index is in one file, or damaged, which is told."""
        training = training_at(store.index_path)
        if training is None or not piece_path(block, training.fingerprint).is_file():
            return None
        stored = open_piece(block, training.fingerprint, training.width)
        return cls(training.index, stored)

    def add(self, rows: np.ndarray, keys: np.ndarray) -> None:
        """Takes the keys (n, D) of rows (n,) of the block."""
        self._rows.append(rows)
        self._stream.add(keys)

    def compare(self, difference: Difference) -> None:
        """Tells ``difference`` of all codes, once all keys have come."""
        codes = np.empty_like(self._stored)
        codes[np.concatenate(self._rows)] = self._stream.codes()
        difference.add_codes(codes, self._stored)


def _compared(
    part: Datastore, text: Text, texts: range, codes: _Codes | None, *, whole: bool
) -> Difference:
    """Computes blocks of text, and compares them with a block's keys, values or codes."""
    first, difference = int(text.edges[texts.start]), Difference()
    with tqdm(total=len(part), unit=" entries", unit_scale=True, desc="computing", delay=2) as bar:
        for some in text.compute(texts, whole=whole):
            own = some.rows - first
            difference.add_values(own, some.values, part.values[own])
            if part.keys is not None:
                difference.add_keys(own, some.keys, part.keys[own])
            if codes is not None:
                codes.add(own, some.keys)
            bar.update(len(own))
    if codes is not None:
        codes.compare(difference)
    return difference


def _doubts(then: Origin, now: Origin) -> list[str]:
    """Why the last digits of keys may differ: what computes now, and computed then."""
    known = {name: then.versions.get(name, "unknown") for name in COMPUTING}
    found = [
        f"{name} {known[name]} then, {now.versions[name]} now"
        for name in COMPUTING
        if known[name] != now.versions[name]
    ]
    for name in READING:
        if name not in then.context:
            found.append(f"{name} unknown then")
        elif then.context[name] != now.context[name]:
            found.append(f"{name} {then.context[name]} then, {now.context[name]} now")
    return found
