"""A datastore of several blocks in the making: by one process or many, stopped and gone on with.

Its folder holds ``making.json``, which says what is being made, and the blocks that are there. What
is missing can be made by anybody, in any order. Who finds all of them there joins them: the
manifest is written, and the folder is a datastore.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec.structs import replace

from fairseq_knnlm.datastore.blocks import check_alike
from fairseq_knnlm.datastore.manifest import (
    BLOCKS,
    MANIFEST,
    Known,
    Manifest,
    Origin,
    Row,
    Stretch,
    Width,
    damaged,
    read_manifest,
    value_dtype,
    write_manifest,
)
from fairseq_knnlm.datastore.reader import Datastore, open_blocks, open_datastore
from fairseq_knnlm.datastore.writer import (
    DatastoreWriter,
    check_new,
    check_room,
    datastore_bytes,
    tidy_all,
)
from fairseq_knnlm.errors import BusyError, DatastoreError
from fairseq_knnlm.files import Claim, fingerprint, flush_to_disk, read_sealed, write_sealed

logger = logging.getLogger(__name__)

FORMAT = "fairseq-knnlm datastore in the making"
VERSION = 1
MAKING = "making.json"


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is being made.

    Attributes:
        width: dimensions of a key, D.
        key_dtype: ``"float16"`` or ``"float32"``; None to keep no keys.
        origin: what makes it, with the versions of libraries.
        starts: the first row of each block, ascending from 0, and behind the last one the number
            of all rows.
        boundary: what the first line of a document matches; None where documents begin after empty
            lines.
        recipe: of the index that keys go into where they are not kept.
        number: that of the first block; others are in the datastore already.
        onto: fingerprint of the datastore that the blocks are added to; empty for a new one.
    """

    width: Width
    key_dtype: Annotated[str, msgspec.Meta(pattern="^float(16|32)$")] | None
    origin: Origin
    starts: Sequence[Row]
    boundary: Annotated[str, msgspec.Meta(min_length=1, max_length=1000)] | None = None
    recipe: str | None = None
    number: Annotated[int, msgspec.Meta(ge=0, le=10**9)] = 0
    onto: Known = ""

    @property
    def fingerprint(self) -> str:
        """Of all of it, whichever processor makes it."""
        return fingerprint(msgspec.to_builtins(replace(self, origin=self.origin.anywhere)))

    @property
    def blocks(self) -> range:
        """The numbers of the blocks."""
        return range(self.number, self.number + len(self.starts) - 1)

    def rows(self, block: int) -> range:
        """The rows of the text that a block holds."""
        place = block - self.number
        return range(self.starts[place], self.starts[place + 1])


class Making:
    """A datastore in the making.

    Args:
        path: its folder.
        plan: what is being made.

    Raises:
        DatastoreError: where something else is there, or is being made there, or the disk cannot
            hold what is missing.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path = path
        self.plan = plan
        _begin(path, plan)
        check_same(path, read_plan(path), plan)
        missing = sum(len(plan.rows(block)) for block in self.missing())
        check_room(
            path, datastore_bytes(missing, plan.width, plan.key_dtype, plan.origin.vocabulary)
        )

    def folder(self, block: int) -> Path:
        """Where a block lies once it is made."""
        return made_at(self.path, block)

    def there(self) -> list[int]:
        """The numbers of the blocks that were made."""
        return there(self.path, self.plan)

    def missing(self) -> list[int]:
        """The numbers of those that were not."""
        made = set(self.there())
        return [block for block in self.plan.blocks if block not in made]

    def writer(self, block: int) -> DatastoreWriter:
        """Writes a block; its rows count from 0."""
        plan = self.plan
        rows = len(plan.rows(block))
        return DatastoreWriter(self.folder(block), rows, plan.width, plan.origin, plan.key_dtype)

    def check(
        self, blocks: Sequence[int], is_sound: Callable[[Path], bool] | None = None
    ) -> list[int]:
        """Reads every byte of blocks that are there, and removes those that are damaged.

        Args:
            blocks: their numbers.
            is_sound: tells whether what else is in the folder of one is as it was written.

        Returns:
            Those that are sound.

        Raises:
            DatastoreError: where one is of another making.
        """
        sound = []
        for block in blocks:
            folder = self.folder(block)
            try:
                found = open_datastore(folder, verify=True)
            except DatastoreError as error:
                logger.warning("making %s again: %s", folder, " ".join(str(error).split()))
            else:
                check_made(self.plan, folder, found.manifest, block)
                if is_sound is None or is_sound(folder):
                    sound.append(block)
                    continue
            with Claim(folder):
                shutil.rmtree(folder)
        return sound

    def join(self, finish: Callable[[Datastore], object] | None = None) -> Path:
        """Makes a datastore of the blocks, once all of them are there.

        Args:
            finish: does what is left to do to the blocks, given the datastore to be.

        Raises:
            BusyError: where another process is joining them.
            DatastoreError: where blocks are missing, or are of another making.
        """
        with Claim(self.path / MANIFEST):
            if not (self.path / MAKING).exists():
                return self.path  # another process was faster
            if missing := self.missing():
                raise DatastoreError(
                    f"the datastore {self.path} is not complete",
                    expected=f"{len(self.plan.blocks)} blocks",
                    found=f"{len(missing)} missing, the first is {self.folder(missing[0]).name}",
                    do="run what saves it again: it makes what is missing",
                )
            if not is_joined(self.path, self.plan):
                manifest = self._joined()
                if finish is not None:
                    finish(open_blocks(self.path, manifest, ""))
                flush_to_disk(self.path / BLOCKS)
                write_manifest(self.path / MANIFEST, manifest)
            _end(self.path)
            tidy_all(self.path)
        return self.path

    def _joined(self) -> Manifest:
        """The manifest of all blocks, with those that were there before."""
        stretches = []
        for block in self.plan.blocks:
            folder = self.folder(block)
            found, seal = read_manifest(folder)
            check_made(self.plan, folder, found, block)
            breaks = [0] if block == self.plan.number else []
            stretches.append(Stretch(folder.name, found.rows, seal, breaks))
        new = planned(self.plan, stretches)
        if not self.plan.onto:
            return new
        whole, seal = read_manifest(self.path)
        return replace(
            whole,
            rows=whole.rows + new.rows,
            blocks=[*whole.blocks, *stretches],
            before=[*whole.before, seal],
        )


def made_at(path: Path, block: int) -> Path:
    """Where a block of the datastore in ``path`` lies once it is made."""
    return path / BLOCKS / f"{block:06d}"


def there(path: Path, plan: Plan) -> list[int]:
    """The numbers of the blocks of a plan that were made in ``path``."""
    return [block for block in plan.blocks if made_at(path, block).exists()]


def planned(plan: Plan, blocks: Sequence[Stretch] = ()) -> Manifest:
    """The manifest of the new blocks alone; each says for itself which processor made it."""
    return Manifest(
        rows=sum(block.rows for block in blocks) or 1,
        width=plan.width,
        key_dtype=plan.key_dtype,
        value_dtype=str(value_dtype(plan.origin.vocabulary)),
        origin=plan.origin.anywhere,
        blocks=blocks,
    )


def check_made(plan: Plan, folder: Path, found: Manifest, block: int) -> None:
    """Refuses a block that is another than is being made.

    Args:
        plan: what is being made.
        folder: of the block.
        found: its own manifest.
        block: its number.

    Raises:
        DatastoreError: naming the first difference.
    """
    check_alike(folder, found, planned(plan))
    rows = len(plan.rows(block))
    ours, theirs = plan.origin.anywhere, found.origin.anywhere
    if found.rows != rows or theirs != ours:
        raise another_making(
            folder,
            {"rows": rows, **msgspec.to_builtins(ours)},
            {"rows": found.rows, **msgspec.to_builtins(theirs)},
        )


def _begin(path: Path, plan: Plan) -> None:
    """Says at ``path`` what is being made, unless that is said; several processes may begin."""
    while not is_in_the_making(path):
        try:
            with Claim(path / MAKING):
                if not plan.onto and any(path.glob("[!.]*")):
                    check_new(path)
                write_sealed(path / MAKING, FORMAT, VERSION, msgspec.to_builtins(plan))
        except BusyError:
            time.sleep(0.05)


def is_in_the_making(path: Path) -> bool:
    """Whether a datastore is being made at ``path``, or blocks for one that is there."""
    return (path / MAKING).is_file()


def is_only_in_the_making(path: Path) -> bool:
    """Whether there is no datastore at ``path`` yet, but one is being made."""
    return is_in_the_making(path) and not (path / MANIFEST).exists()


def is_joined(path: Path, plan: Plan) -> bool:
    """Whether the blocks of a plan are part of the datastore at ``path``.

    So it is where the process that joined them was killed before it could say that they are no
    longer in the making.
    """
    if not (path / MANIFEST).exists():
        return False
    there = {stretch.name for stretch in read_manifest(path)[0].blocks}
    return any(made_at(path, block).name in there for block in plan.blocks)


def settle(path: Path) -> None:
    """Says that blocks are no longer in the making which are part of the datastore.

    For who holds the claim to change it, before it changes what tells that they are.
    """
    if is_in_the_making(path) and is_joined(path, read_plan(path)):
        _end(path)


def _end(path: Path) -> None:
    (path / MAKING).unlink(missing_ok=True)
    flush_to_disk(path)  # it must not come back, where the blocks may be forgotten later


def read_plan(path: Path) -> Plan:
    """What is being made at ``path``.

    Raises:
        DatastoreError: where nothing is, or what says so is damaged.
    """
    file = path / MAKING
    try:
        plan, _ = read_sealed(file, FORMAT, VERSION, Plan)
        if len(plan.starts) < 2 or any(a >= b for a, b in pairwise([-1, *plan.starts])):
            raise ValueError("rows that do not ascend - at `$.starts`")
        if plan.starts[0] != 0:
            raise ValueError("a first block that does not begin with row 0 - at `$.starts`")
        return plan
    except ValueError as error:
        raise damaged(file, "what is being made", str(error)) from None


def check_same(path: Path, there: Plan, asked: Plan) -> None:
    """Refuses to go on with a datastore of another making.

    Raises:
        DatastoreError: naming the first difference; another processor is none.
    """
    there, asked = (replace(plan, origin=plan.origin.anywhere) for plan in (there, asked))
    if there != asked:
        raise another_making(path, msgspec.to_builtins(there), msgspec.to_builtins(asked))


def another_making(path: Path, there: dict[str, Any], asked: dict[str, Any]) -> DatastoreError:
    """What a user is told whose model, text or flags are not those of what is there."""
    name, ours, theirs = next(_differences(there, asked))
    return DatastoreError(
        f"{path} is in the making, and of another making than this",
        expected=f"{name} {ours}",
        found=f"{name} {theirs}",
        do="go on with the checkpoint, text, flags and versions that it was begun with, or remove "
        "it and start anew",
    )


def _differences(ours: Any, theirs: Any, name: str = "") -> Any:
    """Names, and both values, of what differs between two objects of JSON."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted({*ours, *theirs}):
            yield from _differences(ours.get(key), theirs.get(key), f"{name}.{key}".lstrip("."))
    elif ours != theirs:
        yield name, _short(ours), _short(theirs)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
