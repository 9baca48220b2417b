"""The commands that are struck, and what several at once may come to."""

from __future__ import annotations

from dataclasses import dataclass

from chaos_steps.world import (
    DOCUMENTS,
    IN_BLOCKS,
    INDEX,
    MIX,
    OTHER_INDEX,
    OTHER_ROWS,
    SOME_ROWS,
    Words,
    World,
    knnlm,
)


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: for the tables.
        start: what lies there before it: a folder of ``World.start``.
        words: as they are typed.
    """

    name: str
    start: str
    words: Words


@dataclass(frozen=True)
class Pair:
    """Two commands at once, in one folder.

    Attributes:
        name: for the tables.
        start: what lies there before.
        first, second: as they are typed.
    """

    name: str
    start: str
    first: Words
    second: Words


def commands(world: World) -> list[Command]:
    """Every command that writes a datastore, or something beside it."""
    store = ("--dstore", "store")
    build = knnlm("build-index", *store, *INDEX)
    other = knnlm("build-index", *store, *OTHER_INDEX)
    streamed = ("--no-save-keys", *INDEX)
    find = knnlm("verify", *store, "--documents", *DOCUMENTS, "--data", world.data)
    joined = [("--results-json", "joined.json"), ("--score-table", "joined.npz")]
    report = [word for flag in joined for word in flag]
    shares = [f"share-{n}.{kind}" for n in (0, 1) for kind in ("json", "npz")]
    tune = knnlm("tune", *store, "--score-table", "table.npz")
    forget = knnlm("forget", "store", "--rows", SOME_ROWS)
    evaluate = world.evaluate("test", "--knnlm", "--dstore-filename", "store", *MIX, *report)
    return [
        Command("save, flat", "empty", world.save(*DOCUMENTS)),
        Command("save, blocks", "empty", world.save(*IN_BLOCKS, *DOCUMENTS)),
        Command("save, streamed flat", "empty", world.save(*streamed)),
        Command("save, streamed blocks", "empty", world.save(*IN_BLOCKS, *streamed)),
        Command("save, last share", "share 0", world.share(1)),
        Command("save --join", "unjoined", knnlm("save", "--join", "store")),
        Command("build-index, flat", "flat", build),
        Command("build-index, pieces", "blocks", build),
        Command("build-index, other pieces", "blocks, indexed", other),
        Command("append to flat", "flat, indexed", world.append()),
        Command("append to blocks", "blocks, indexed", world.append(*IN_BLOCKS)),
        Command("append, streamed", "streamed", world.append()),
        Command("forget of flat", "flat, indexed", forget),
        Command("forget of blocks", "blocks, indexed", forget),
        Command("compact", "forgotten", knnlm("compact", "store")),
        Command("verify --documents, flat", "flat, no documents", find),
        Command("verify --documents, blocks", "blocks, no documents", find),
        Command("tune", "table", tune),
        Command("evaluate, results and table", "blocks, indexed", evaluate),
        Command("report --join", "shares of results", knnlm("report", "--join", *shares, *report)),
    ]


def pairs(world: World) -> list[Pair]:
    """Commands that two processes may well run at once."""
    store = ("--dstore", "store")
    build = knnlm("build-index", *store, *INDEX)
    other = knnlm("build-index", *store, *OTHER_INDEX)
    forget = knnlm("forget", "store", "--rows", SOME_ROWS)
    forget_more = knnlm("forget", "store", "--rows", OTHER_ROWS)
    compact = knnlm("compact", "store")
    append = world.append(*IN_BLOCKS)
    save, flat = world.save(*IN_BLOCKS, *DOCUMENTS), world.save(*DOCUMENTS)
    streamed = world.save(*IN_BLOCKS, "--no-save-keys", *INDEX)
    return [
        Pair("save + save, flat", "empty", flat, flat),
        Pair("save + save, blocks", "empty", save, save),
        Pair("save + save, streamed", "empty", streamed, streamed),
        Pair("share + share", "empty", world.share(0), world.share(1)),
        Pair("build-index + build-index, flat", "flat", build, other),
        Pair("build-index + build-index, pieces", "blocks", build, other),
        Pair("append + append", "blocks, indexed", append, append),
        Pair("append + forget, flat", "flat, indexed", append, forget),
        Pair("append + forget", "blocks, indexed", append, forget),
        Pair("forget + append", "blocks, indexed", forget, append),
        Pair("build-index + append", "blocks, indexed", other, append),
        Pair("append + build-index", "blocks, indexed", append, other),
        Pair("compact + append", "forgotten", compact, append),
        Pair("append + compact", "forgotten", append, compact),
        Pair("forget + forget", "blocks, indexed", forget, forget_more),
        Pair("forget + build-index", "blocks, indexed", forget, other),
        Pair("build-index + forget", "flat, indexed", other, forget),
        Pair("compact + forget", "forgotten", compact, forget_more),
        Pair("compact + build-index", "forgotten", compact, other),
    ]
