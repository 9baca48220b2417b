"""Language models and texts that cannot be used, memory, and what must be warned of."""

from __future__ import annotations

import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fault_cases.stage import BadOutcome, Case, Stage, check_close, check_message
from fault_cases.world import BLOCKS, INDEX, K, knnlm

#: Bytes that a search may take beyond keys and results.
SPARE = 768 * 2**20
NAMED = "refused with a message that names it"


def cases() -> Iterator[Case]:
    """Models, texts, warnings, memory, real processes."""
    for name, done, must, play in (*MODELS, *TEXTS, *WARNINGS, *MEMORY):
        yield Case("models", name, done, must, play)
    for name, words, says in PROCESSES:
        play = partial(_process, words=words, says=says)
        must = NAMED if says else "works, the loss of the fork"
        yield Case("models", f"process: {name}", f"{name}, as a process", must, play)


# Models


def _altered(stage: Stage, change: Callable[[dict[str, Any]], None]) -> Path:
    """A checkpoint that was changed."""
    import torch

    state = torch.load(stage.world.checkpoint(), map_location="cpu", weights_only=False)
    change(state)
    path = stage.folder / "altered.pt"
    torch.save(state, path)
    return path


def _nan(state: dict[str, Any], value: float = float("nan")) -> None:
    name = next(name for name in state["model"] if name.endswith("fc1.weight"))
    state["model"][name][0, 0] = value


def _all_nan(state: dict[str, Any]) -> None:
    for tensor in state["model"].values():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))


def _infinite(state: dict[str, Any]) -> None:
    _nan(state, float("inf"))


SPOILT = {"one weight NaN": _nan, "all weights NaN": _all_nan, "one weight infinite": _infinite}


def _spoilt(stage: Stage, *, change: Callable[[dict[str, Any]], None], mode: str) -> str:
    path = _altered(stage, change)
    says = "NaN|finite|infinit|checkpoint"
    if mode == "save":
        save = ("--save-knnlm-dstore", "--dstore-mmap", "new")
        return stage.refused(stage.world.evaluate(*save, model=path, split="train"), says)
    if mode == "cache":
        return stage.refused(stage.world.evaluate("--experts", "cache", model=path), says)
    flags = ("--results-json", "r.json")
    return stage.refused(stage.world.evaluate(*flags, model=path), says)


def _garbage(stage: Stage, *, data: bytes, command: str) -> str:
    path = stage.folder / "garbage.pt"
    path.write_bytes(data)
    return _model(stage, path=path, command=command, says="garbage.pt|checkpoint")


def _model(stage: Stage, *, path: Path, command: str, says: str) -> str:
    if command == "save":
        words = knnlm("save", stage.world.data, "--path", path, "--dstore", "new", *BLOCKS)
    elif command == "tune":
        words = knnlm("tune", "--dstore", stage.store(), "--data", stage.world.data)
        words += ["--path", path, *K, *BLOCKS]
    elif command == "lm2":
        experts = ("--experts", "lm2", "--expert-lm", path, "--expert-lm-lmbda", "0.2")
        words = stage.world.evaluate(*experts)
    else:
        words = stage.world.evaluate("--knnlm", "--dstore-filename", stage.store(), *K, model=path)
    return stage.refused(words, says)


def _missing(stage: Stage, *, command: str) -> str:
    return _model(stage, path=Path("nowhere.pt"), command=command, says="nowhere.pt")


def _folder(stage: Stage, *, command: str) -> str:
    return _model(stage, path=stage.folder, command=command, says="checkpoint|folder|directory")


def _other_model(stage: Stage) -> str:
    words = ("--knnlm", "--dstore-filename", stage.store(), *K)
    return stage.refused(stage.world.evaluate(*words, model="other"), "another checkpoint")


def _trusting() -> None:
    """Lets torch open checkpoints of lightconv_lm, in which fairseq keeps a Namespace.

    It was trained here. What people do instead is ``fairseq-knnlm convert-checkpoint``.
    """
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"


def _stock(stage: Stage, *flags: object, model: str = "model") -> float:
    """What stock fairseq gives."""
    words = stage.world.evaluate(*flags, model=model)
    words[words.index("knn_lm")] = "language_modeling"
    loss = stage.works(words, before=_trusting).loss
    assert loss is not None
    return loss


def _light(stage: Stage) -> str:
    """A decoder that is no Transformer is scored as the stock scorer scores it."""
    stock = _stock(stage, model="light")
    stage.works(stage.world.evaluate(model="light"), loss=stock, before=_trusting)
    return f"the stock scorer's loss, {stock}"


def _light_untrusted(stage: Stage) -> str:
    """As it was trained: PyTorch does not open it."""
    return stage.refused(stage.world.evaluate(model="light"), "convert-checkpoint")


def _light_saved(stage: Stage) -> str:
    """The key of a Transformer, of a decoder that is none."""
    flags = ("--save-knnlm-dstore", "--dstore-mmap", "new")
    words = stage.world.evaluate(*flags, model="light")
    return stage.refused(words, "--knn-keytype decoder_output", before=_trusting)


def _light_cached(stage: Stage) -> str:
    """A cache needs no keys."""
    loss = stage.works(
        stage.world.evaluate("--experts", "cache", model="light"), before=_trusting
    ).loss
    assert loss is not None
    alone = _stock(stage, model="light")
    if loss == alone:
        raise BadOutcome(f"a loss of {loss}, with a cache and without")
    return f"{loss}, and {alone} without"


def _ensemble(stage: Stage) -> str:
    world = stage.world
    both = Path(f"{world.checkpoint()}:{world.checkpoint('other')}")
    words = world.evaluate("--save-knnlm-dstore", "--dstore-mmap", "new", model=both)
    return stage.refused(words, "checkpoint|model|--path")


def _base(stage: Stage) -> str:
    stage.works(stage.world.evaluate(), loss=_stock(stage))
    return "the stock scorer's loss"


MODELS: tuple[tuple[str, str, str, Callable[[Stage], str]], ...] = (
    *(
        (f"checkpoint: {name}, {mode}", f"a checkpoint with {name}; {mode}", NAMED, play)
        for name, change in SPOILT.items()
        for mode in ("evaluate", "save", "cache")
        for play in (partial(_spoilt, change=change, mode=mode),)
    ),
    *(
        (f"checkpoint: {name}, {command}", f"{name} as the checkpoint; {command}", NAMED, play)
        for command in ("save", "tune", "lm2", "evaluate")
        for name, play in (
            ("missing", partial(_missing, command=command)),
            ("a folder", partial(_folder, command=command)),
            ("garbage", partial(_garbage, data=b"garbage " * 999, command=command)),
            ("an empty file", partial(_garbage, data=b"", command=command)),
        )
    ),
    ("checkpoint: another", "a datastore of another checkpoint", NAMED, _other_model),
    ("checkpoint: two for saving", "--path a.pt:b.pt while saving", NAMED, _ensemble),
    ("lightconv_lm: base", "lightconv_lm, no experts", "the stock scorer's loss", _light),
    ("lightconv_lm: a Namespace in it", "its checkpoint, not trusted", NAMED, _light_untrusted),
    ("lightconv_lm: save", "a datastore of lightconv_lm", NAMED, _light_saved),
    ("lightconv_lm: cache", "a cache for lightconv_lm", "another loss", _light_cached),
    ("transformer_lm: base", "no experts", "the stock scorer's loss", _base),
)


# Texts


def _data(stage: Stage, *, says: str, change: Callable[[Path], object], split: str = "test") -> str:
    data = Path(shutil.copytree(stage.world.data, stage.folder / "bin"))
    change(data)
    words = stage.world.knn(stage.store(), split=split)
    words[1] = data
    return stage.refused(words, says)


def _empty_split(data: Path) -> None:
    for file in data.glob("test.*"):
        shutil.copy(file, data / file.name.replace("test", "old"))
    (data / "test.bin").write_bytes(b"")
    index = (data / "test.idx").read_bytes()
    (data / "test.idx").write_bytes(index[:18] + bytes(16))


def _left_out(stage: Stage) -> str:
    """complete_doc leaves out what does not fit into a block."""
    flags = ("--sample-break-mode", "complete_doc", "--max-target-positions", "12")
    ran = stage.works(stage.world.evaluate(*flags))
    scored = re.search(r"Evaluated ([\d,]+) tokens", ran.out)
    text = (stage.world.folder / "test.txt").read_text()
    tokens = len(text.replace("\n", " </s> ").split())
    missing = tokens - int(scored[1].replace(",", "")) if scored else tokens
    if missing and not re.search(rf"\b{missing:,}\b.*(token|left)", ran.out):
        raise BadOutcome(f"{missing} of {tokens} tokens left out without a word: {ran.last}")
    return f"{missing} of {tokens} left out, said so"


TEXTS: tuple[tuple[str, str, str, Callable[[Stage], str]], ...] = (
    (
        "text: folder missing",
        "no data folder",
        NAMED,
        partial(_data, says="bin", change=shutil.rmtree),
    ),
    (
        "text: split missing",
        "--gen-subset nowhere",
        NAMED,
        partial(_data, says="nowhere", change=lambda _: None, split="nowhere"),
    ),
    (
        "text: empty split",
        "a split of no tokens",
        NAMED,
        partial(_data, says="test|empty|tokens", change=_empty_split),
    ),
    (
        "text: no dictionary",
        "dict.txt removed",
        NAMED,
        partial(_data, says="dict", change=lambda data: (data / "dict.txt").unlink()),
    ),
    (
        "text: another dictionary",
        "dict.txt with two words exchanged",
        NAMED,
        partial(_data, says="dictionary", change=lambda data: _exchange(data / "dict.txt")),
    ),
    (
        "text: damaged index",
        "test.idx cut",
        NAMED,
        partial(_data, says="test", change=lambda data: (data / "test.idx").write_bytes(b"MM")),
    ),
    (
        "text: complete_doc",
        "documents longer than a block",
        "says how many tokens are left out",
        _left_out,
    ),
)


def _exchange(file: Path) -> None:
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")


# Warnings


def _evaluated_text(stage: Stage) -> str:
    """The split that the datastore was saved of."""
    words = stage.world.calibrated(stage.store(), split="train")
    stage.works(words, says=r"warn.*|(same|holds|saved of|contains).*(text|split)", patience=90)
    ran = stage.works(stage.world.knn(stage.world.store, split="train"))
    return _warns(ran.out, r"(datastore|neighbour).*(holds?|same|contains|saved|evaluated)")


def _evaluated_copy(stage: Stage) -> str:
    """The same text under another split's name."""
    store = stage.folder / "s"
    stage.works(stage.world.save(store, split="test"))
    stage.works(knnlm("build-index", "--dstore", store, "--recipe", "Flat"))
    data = Path(shutil.copytree(stage.world.data, stage.folder / "bin"))
    for file in data.glob("test.*"):
        shutil.copy(file, data / file.name.replace("test", "valid"))
    words = stage.world.knn(store, split="valid")
    words[1] = data
    ran = stage.works(words)
    return _warns(ran.out, r"(datastore|neighbour|distance).*(holds?|same|contains|0\b)")


def _warns(out: str, pattern: str) -> str:
    for line in out.splitlines():
        if "Namespace(" not in line and re.search(pattern, line, re.IGNORECASE):
            return f"warned: {line[-120:]}"
    raise BadOutcome(f"no warning: {' | '.join(out.splitlines()[-4:])}"[-300:])


def _impossible(stage: Stage) -> str:
    """All weight on neighbours that do not know every token."""
    flags = ("--knnlm", "--dstore-filename", stage.store(), "--k", "1", "--lmbda", "1")
    ran = stage.works(stage.world.evaluate(*flags, "--knn-temp", "1"))
    lines = [line for line in ran.out.splitlines() if line.strip()]
    if not any("probability 0" in line for line in lines[-3:]):
        raise BadOutcome(f"the last lines do not say so: {' | '.join(lines[-3:])}"[:300])
    return "said in the last lines"


def _two_stores(stage: Stage) -> str:
    """A calibration for A and B leaves that of A alone."""
    a, b = stage.store("a"), stage.folder / "b"
    stage.works(stage.world.save(b, split="valid"))
    stage.works(knnlm("build-index", "--dstore", b, "--recipe", "Flat"))
    table = stage.folder / "both.npz"
    both = f"{a}:{b}"
    words = stage.world.calibrated(both, "--mixer", "none", "--score-table", table)
    stage.works([*words, "--experts", "knn"], changes=["a/*", "b/*"])
    stage.works(knnlm("tune", "--dstore", a, "--score-table", table), changes=["a/*.png"])
    stage.works(stage.world.calibrated(a), loss=stage.world.losses["calibrated"])
    stage.works(stage.world.calibrated(both), says="calibrated")
    return "A alone and A:B each have theirs"


def _other_blocks(stage: Stage) -> str:
    """A calibration for blocks with a context, used without."""
    blocks = ("--context-window", "0", "--tokens-per-sample", "8")
    ran = stage.works(stage.world.calibrated(stage.store(), *blocks))
    return _warns(
        ran.out,
        r"(calibrat|fitted).*(context|tokens.per.sample|block)|context.window.*(calibrat|fitted)",
    )


def _huge_window(stage: Stage) -> str:
    """What a window needs is known before: refused, or said."""
    flags = ("--experts", "cache", "--cache-window", "3000000000")
    return stage.refused(stage.world.evaluate(*flags), "--cache-window|memory")


def _large_window(stage: Stage) -> str:
    """What a window needs is said, and not taken for a text of a hundred tokens."""
    flags = ("--experts", "cache", "--cache-lmbda", "0.2", "--cache-window", "3000000")
    ran = stage.run(stage.world.evaluate(*flags), patience=20)
    if ran.code:
        return check_message(ran, "--cache-window|memory")
    check_close(ran.loss, stage.world.losses["cache"])
    return _warns(ran.out, r"(cache|window).*(MiB|GiB|memory)")


def _unchanged(stage: Stage) -> str:
    """Everything in order gives the figures of before, twice."""
    store = stage.store()
    stage.works(stage.world.knn(store), loss=stage.world.losses["knn"])
    stage.works(stage.world.calibrated(store), loss=stage.world.losses["calibrated"])
    stage.works(knnlm("verify", "--dstore", store))
    return "verified, and the same figures"


def _threads(stage: Stage) -> str:
    """An index built with two threads is that of one, byte for byte."""
    files = []
    for threads in (1, 2):
        path = stage.folder / f"{threads}.index"

        def before(threads: int = threads) -> None:
            import faiss

            faiss.omp_set_num_threads(threads)

        words = knnlm("build-index", "--dstore", stage.world.store, *INDEX, "--indexfile", path)
        stage.works(words, before=before)
        files.append(stage.works(stage.world.knn(stage.world.store, "--indexfile", path)).loss)
    check_close(files[1], files[0] or 0.0)
    return "the same loss"


WARNINGS: tuple[tuple[str, str, str, Callable[[Stage], str]], ...] = (
    ("in order", "nothing planted", "the figures of before", _unchanged),
    (
        "datastore of the evaluated split",
        "train evaluated by its own datastore",
        "a warning",
        _evaluated_text,
    ),
    (
        "datastore of the evaluated text",
        "the same text as another split",
        "a warning",
        _evaluated_copy,
    ),
    (
        "tokens of probability 0",
        "--lmbda 1 --k 1",
        "said last, not drowned by a log call",
        _impossible,
    ),
    ("calibrations of A and of A:B", "tune for A:B where A has one", "A's stays", _two_stores),
    (
        "calibration of other blocks",
        "no context where it was fitted with",
        "a warning",
        _other_blocks,
    ),
    (
        "cache window of 3 billion",
        "--cache-window 3000000000",
        "refused, or memory named",
        _huge_window,
    ),
    (
        "cache window of 3 million",
        "--cache-window 3000000",
        "the memory that it may take is said, or refused",
        _large_window,
    ),
    ("threads of a build", "build-index with 1 and 2 threads", "the same loss", _threads),
)


# Memory


def _l2(stage: Stage, *, rows: int, width: int, k: int, queries: int) -> str:
    """The peak of one search with recomputed distances, in a process of its own."""
    output = stage.folder / "peak"

    def search() -> int:
        import torch

        from fairseq_knnlm.datastore import DatastoreWriter, Origin, open_datastore
        from fairseq_knnlm.index.build import BuildOptions, build
        from fairseq_knnlm.index.recipes import choose
        from fairseq_knnlm.index.search import SearchIndex
        from fairseq_knnlm.retrieval.local import LocalRetriever

        rng = np.random.default_rng(1)
        keys = rng.standard_normal((rows, width), np.float32).astype(np.float16)
        origin = Origin("a" * 64, "b" * 64, 50, "last_ffn_input")
        writer = DatastoreWriter(stage.folder / "wide", rows, width, origin, "float16")
        writer.write(np.arange(rows), keys, np.zeros(rows, np.int64))
        store = open_datastore(writer.publish())
        index, card = build(
            keys, choose("Flat", rows, width), BuildOptions(queries=0), progress=False
        )
        retriever = LocalRetriever(SearchIndex(index, card), store, "l2")
        asked = torch.from_numpy(rng.standard_normal((queries, width), np.float32))
        retriever.search(asked[:2], k)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        retriever.search(asked, k)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        output.write_text(str((after - before) * 1024))
        return 0

    stage.works(search)
    grown = int(output.read_text())
    # Results: distances and ids from the index, distances anew, values, validity.
    bound = SPARE + queries * k * (4 + 8 + 4 + 8 + 8)
    if grown > bound:
        raise BadOutcome(f"grew by {grown / 2**20:,.0f} MiB, above {bound / 2**20:,.0f}")
    return f"grew by {grown / 2**20:,.0f} MiB"


MEMORY: tuple[tuple[str, str, str, Callable[[Stage], str]], ...] = tuple(
    (
        f"l2 memory: k {k}, width {width}",
        f"{queries} queries, k {k}, width {width}, distances recomputed",
        "memory stays below results and 768 MiB",
        partial(_l2, rows=rows, width=width, k=k, queries=queries),
    )
    for rows, width, k, queries in (
        (2048, 1024, 1024, 600),
        (4096, 1024, 4096, 300),
        (21730, 64, 21730, 60),
    )
)


# The commands as processes


def _process(stage: Stage, *, words: Callable[[Stage], list[object]], says: str) -> str:
    typed = words(stage)
    if says:
        return stage.refused(typed, says, real=True)
    loss = stage.world.losses["knn"] if "--lmbda" in typed else None
    stage.works(typed, real=True, loss=loss)
    return "works"


PROCESSES: tuple[tuple[str, Callable[[Stage], list[object]], str], ...] = (
    ("eval-lm with neighbours", lambda stage: stage.world.knn(stage.store()), ""),
    ("info", lambda stage: knnlm("info", "--dstore", stage.store()), ""),
    ("verify", lambda stage: knnlm("verify", "--dstore", stage.store()), ""),
    ("save", lambda stage: stage.world.save("new"), ""),
    ("no datastore", lambda stage: stage.world.knn("nowhere"), "nowhere"),
    ("lambda 2", lambda stage: stage.world.knn(stage.store(), "--lmbda", "2"), "--lmbda"),
    ("no block left", lambda stage: stage.world.evaluate("--tokens-per-sample", "8"), "--tokens"),
    (
        "no checkpoint",
        lambda stage: stage.world.evaluate("--experts", "cache", model=Path("x.pt")),
        "x.pt",
    ),
    (
        "bad recipe",
        lambda s: knnlm("build-index", "--dstore", s.bare(), "--recipe", "HNSW0"),
        "HNSW0",
    ),
    ("no table", lambda s: knnlm("tune", "--dstore", s.store(), "--score-table", "x.npz"), "x.npz"),
    ("garbage index", lambda s: s.world.knn(_with_garbage(s)), "index"),
    ("flag nobody knows", lambda s: knnlm("info", "--dstore", s.store(), "--colour"), "--colour"),
)


def _with_garbage(stage: Stage) -> Path:
    store = stage.store()
    (store / "knn.index").write_bytes(b"IwFl" + b"\xff" * 999)
    return store
