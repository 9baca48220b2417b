"""What ``fairseq-knnlm info`` says of blocks: of a datastore, or of one in the making."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from fairseq_knnlm.datastore import MANIFEST, PROCESSOR, Datastore, Origin, outline
from fairseq_knnlm.datastore.making import is_in_the_making, read_plan, there
from fairseq_knnlm.errors import KnnlmError
from fairseq_knnlm.files import human_bytes
from fairseq_knnlm.index.card import IndexCard
from fairseq_knnlm.runs.origins import making_command


def describe_split(origin: Origin) -> str:
    """``"train, tokens_per_sample 128, context_window 128, ..."``."""
    known = [f"{name} {value}" for name, value in origin.context.items() if value is not None]
    return ", ".join([origin.split or "unknown", *known])


def print_blocks(store: Datastore) -> None:
    """How many there are, what was forgotten, what they take on disk, and what became of them."""
    held = sum(block.rows for block in store.blocks)
    gone = held - len(store)
    forgotten = f"; {gone:,} of {held:,} entries are forgotten" if gone else ""
    print(f"  blocks       {len(store.blocks):,}{forgotten}")
    if before := store.manifest.before:
        changed = time.localtime((store.path / MANIFEST).stat().st_mtime)
        times = "once" if len(before) == 1 else f"{len(before):,} times"
        last = time.strftime("%Y-%m-%d %H:%M", changed)
        print(f"  changed      {times}, last at {last}; it was {before[-1][:12]}... before")
    print(f"  processor    {', '.join(_processors(store)) or 'unknown'}")
    print(f"  on disk      {human_bytes(sum(_bytes(block.path) for block in store.blocks))}")
    if is_in_the_making(store.path):
        _print_progress(store.path)


def _processors(store: Datastore) -> list[str]:
    """Those that made the blocks, as far as these can be read."""
    found = set()
    for block in store.blocks:
        with suppress(KnnlmError, OSError):  # which the arrays' line tells
            found.add(outline(block.path).manifest.origin.versions.get(PROCESSOR, "unknown"))
    return sorted(found)


def _bytes(block: Path) -> int:
    """Bytes of a block's files; those that are gone have none."""
    return sum(file.stat().st_size for file in block.glob("*") if file.is_file())


def describe_pieces(store: Datastore, card: IndexCard) -> str:
    """``"its entries are in the blocks, 5 of 6 have theirs"``."""
    from fairseq_knnlm.index.pieces import piece_path, training_in  # which loads FAISS

    training = training_in(store.index_path, card.bytes)
    there = sum(piece_path(block, training).is_file() for block in store.blocks)
    if there == len(store.blocks):
        return f"its entries are in the blocks, all {there:,} have theirs"
    return (
        f"its entries are in the blocks, {there:,} of {len(store.blocks):,} have theirs: "
        "`fairseq-knnlm build-index` makes those that are missing"
    )


def print_making(path: Path) -> None:
    """What is being made, how much of it is there, and what goes on with it.

    Raises:
        DatastoreError: where what says so is damaged.
    """
    plan = read_plan(path)
    origin = plan.origin
    print(f"{path}: in the making, {plan.starts[-1]:,} entries of width {plan.width}")
    print(f"  keys         {plan.key_dtype or 'in the index only'}, {origin.key_type}")
    print(f"  split        {describe_split(origin)}")
    print(f"  model        {origin.model or 'unknown'}")
    print(f"  dictionary   {origin.dictionary or 'unknown'}")
    _print_progress(path)


def _print_progress(path: Path) -> None:
    try:
        plan = read_plan(path)
    except KnnlmError as error:
        print(f"  in making    {'; '.join(line.strip() for line in str(error).splitlines()[:3])}")
        return
    made = there(path, plan)
    rows = sum(len(plan.rows(block)) for block in made)
    what = "blocks to be added" if plan.onto else "blocks"
    count = f"{len(made):,} of {len(plan.blocks):,} {what} are there"
    print(f"  in making    {count}, {rows:,} of {plan.starts[-1]:,} entries")
    if len(made) == len(plan.blocks):
        print(f"  go on with   fairseq-knnlm save --join {path}")
    else:
        print(f"  go on with   {making_command(path, plan)}")
