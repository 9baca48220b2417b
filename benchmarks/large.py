"""Builds and searches a datastore of blocks as large as asked, of keys that are never stored.

    python benchmarks/scale.py --entries 103227021 --folder FOLDER

It can be stopped at any time, also killed: started again it goes on with the blocks that are there.
Each step has the process for itself, which starts over in between, so that memory can be told.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from measure import machine, summary
from synthetic import PART, Mixture
from truth import Truth
from watch import Memory, Watch

from fairseq_knnlm.cli.tables import show
from fairseq_knnlm.datastore import MANIFEST, Datastore, Origin, open_datastore
from fairseq_knnlm.datastore.making import Making, Plan
from fairseq_knnlm.files import tidy, write_json
from fairseq_knnlm.index.build import BuildOptions, IndexBuilder
from fairseq_knnlm.index.card import IndexCard, read_card
from fairseq_knnlm.index.codes import assemble
from fairseq_knnlm.index.pieces import pieces_of, training_in
from fairseq_knnlm.index.recipes import choose
from fairseq_knnlm.index.search import SearchIndex
from fairseq_knnlm.index.storage import read_trained
from fairseq_knnlm.retrieval.opening import open_retriever
from fairseq_knnlm.runs.streaming import Streaming
from fairseq_knnlm.versions import versions

#: Which processor FAISS's matrix products are for, where they are told: their last digits differ.
KERNELS = os.environ.get("OPENBLAS_CORETYPE", "")
#: Types of WikiText-103, so that a value takes four bytes.
VOCABULARY = 267_744
#: Groups of blocks that are searched one after the other.
SHARDS = 4
#: Of the fresh queries so many have their true neighbours looked for.
WITH_TRUTH = 100
#: Timed runs of all queries.
REPEATS = 5
#: Has glibc map what is larger, also after such memory was freed. FAISS makes room for lists in
#: powers of two, and only so is the room that they do not fill never taken.
MALLOC = "MALLOC_MMAP_THRESHOLD_"
VALUES = 2  # beside the seeds of keys and queries


class Large:
    """What is built, and where.

    Args:
        args: entries, width, k, queries, seed, threads, block_rows, folder.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.store = args.folder / "datastore"
        self.kept = args.folder / "figures"
        self.mixture = Mixture(args.width, args.seed, args.threads)
        self.memory = Memory()

    def figures(self, name: str) -> Path:
        """The file of what a step or block took."""
        return Path(self.kept, f"{name}.json")

    def truth_of(self, block: int) -> Path:
        """The file of the true neighbours among a block's keys."""
        return Path(self.kept, f"{block:06d}.npz")

    def queries(self) -> np.ndarray:
        """Fresh ones, (Q, D) float32."""
        return self.mixture.queries(self.args.queries)

    def truth(self) -> Truth:
        """Of the first queries, when nothing was seen."""
        return Truth(self.queries()[:WITH_TRUTH], self.args.k)

    def plan(self) -> Plan:
        """What is made: no keys, and so the recipe of the index that they go into."""
        args = self.args
        recipe = choose("auto", args.entries, args.width, lists=True)
        return Plan(
            width=args.width,
            key_dtype=None,
            origin=Origin(
                model="",
                dictionary="",
                vocabulary=VOCABULARY,
                key_type="last_ffn_input",
                split="synthetic",
                context={"seed": args.seed, "openblas_coretype": KERNELS},
                versions=versions(),
            ),
            starts=[*range(0, args.entries, args.block_rows), args.entries],
            recipe=recipe.factory,
        )


def build(large: Large) -> dict[str, Any]:
    """Trains the index unless it is, makes the blocks that are missing, and joins them."""
    if (large.store / MANIFEST).exists():
        return {}
    plan = large.plan()
    making = Making(large.store, plan)
    args, watch = large.args, Watch()
    recipe = choose("auto", args.entries, args.width, lists=True)
    options = BuildOptions(k=args.k, seed=args.seed)
    builder = IndexBuilder(recipe, args.width, args.entries, options)
    streaming = Streaming(large.store, plan.fingerprint, builder)
    if streaming.builder is not None:
        print(f"training {recipe.factory} on {builder.sample_rows:,} keys", flush=True)
        with watch.on("generating"):
            sample, rows = large.mixture.sample(args.entries, builder.sample_rows)
        with watch.on("training"):
            streaming.learn(rows, sample)
        about = {"trained_on": len(sample), "seconds": watch.seconds, **large.memory.gib()}
        write_json(large.figures("training"), about)
        start_over()
    _make_missing(large, making, streaming)
    making.join()
    return {}


def _make_missing(large: Large, making: Making, streaming: Streaming) -> None:
    """Makes one block after another, and says how far it is."""

    def is_sound(folder: Path) -> bool:
        return large.truth_of(int(folder.name)).is_file() and streaming.is_sound(folder)

    there = making.check(making.there(), is_sound)
    missing = [block for block in making.plan.blocks if block not in there]
    print(f"{len(there)} of {len(making.plan.blocks)} blocks are there", flush=True)
    left, done, started = sum(len(making.plan.rows(block)) for block in missing), 0, time.time()
    for block in missing:
        spent = time.process_time()
        watch = _make_block(large, making, streaming, block)
        spent = time.process_time() - spent
        rows = len(making.plan.rows(block))
        about = {
            "rows": rows,
            "seconds": watch.seconds,
            "cpu_seconds": spent,
            **large.memory.gib(),
        }
        write_json(large.figures(f"{block:06d}"), about)
        left, done = left - rows, done + rows
        hours = left / done * (time.time() - started) / 3600
        shares = ", ".join(f"{name} {each:.0f} s" for name, each in watch.seconds.items())
        rate = rows / sum(watch.seconds.values())
        print(f"block {block}: {rate:,.0f} keys/s ({shares}); {hours:.2f} hours left", flush=True)


def _make_block(large: Large, making: Making, streaming: Streaming, block: int) -> Watch:
    watch, truth, rows = Watch(), large.truth(), making.plan.rows(block)
    writer, piece = making.writer(block), streaming.piece()
    values = np.random.default_rng([large.args.seed, VALUES, block])
    chunks = large.mixture.chunks(rows)
    while True:
        with watch.on("generating"):
            chunk = next(chunks, None)
        if chunk is None:
            break
        keys, at = chunk
        with watch.on("true neighbours"):
            truth.see(keys, at)
        with watch.on("writing"):
            writer.write(at - rows.start, keys, values.integers(VOCABULARY, size=len(at)))
        with watch.on("encoding"):
            piece.add(keys)
    # First of all, since a block is not made again once it is published.
    truth.save(large.truth_of(block))
    with watch.on("writing"):
        writer.publish(piece.write)
    return watch


def search_whole(large: Large) -> dict[str, Any]:
    """Opens the datastore as an evaluation does, and searches its whole index."""
    watch, args = Watch(), large.args
    before = large.memory.gib()["own_gib"]
    with watch.on("opening the datastore"):
        store = open_datastore(large.store)
    with watch.on("opening the index"):
        retriever = open_retriever(store, args.k)
    with watch.on("of that, checking pieces"):
        _pieces(store, store.blocks)
    opened = {**large.memory.gib(), "before_gib": before}
    queries = torch.from_numpy(large.queries())
    found = retriever.search(queries, args.k)
    np.savez(large.kept / "found.npz", ids=found.ids, distances=found.distances)
    truth = large.truth()
    for block in large.plan().blocks:
        truth.add(large.truth_of(block))
    card = retriever.index.card
    return {
        "factory": card.factory,
        "nprobe": card.nprobe,
        "coverage": card.coverage,
        "seconds": watch.seconds,
        "opened": opened,
        "recall": truth.recall(found.ids[:WITH_TRUTH].numpy()),
        "queries_per_second": summary(_rates(partial(retriever.search, queries, args.k), queries)),
        **large.memory.gib(),
    }


def search_shards(large: Large) -> dict[str, Any]:
    """Searches groups of blocks one after the other, and merges what they find."""
    watch, args = Watch(), large.args
    store = open_datastore(large.store)
    groups = np.array_split(np.arange(len(store.blocks)), SHARDS)
    card = read_card(store.index_path)
    assert card is not None
    with watch.on("opening the shards"):
        shards = [
            _shard(store, card, store.blocks[group[0] : group[-1] + 1])
            for group in groups
            if len(group)
        ]
    queries = torch.from_numpy(large.queries())

    def search() -> tuple[np.ndarray, np.ndarray]:
        with watch.on("searching"):
            answers = [shard.search(queries, args.k) for shard in shards]
        with watch.on("merging"):
            distances, ids = (
                np.stack([part.numpy() for part in parts]) for parts in zip(*answers, strict=True)
            )
            merged: tuple[np.ndarray, np.ndarray] = faiss.merge_knn_results(distances, ids)
        return merged

    distances, ids = search()
    with np.load(large.kept / "found.npz", allow_pickle=False) as whole:
        same = bool(np.array_equal(np.sort(whole["distances"]), np.sort(distances)))
        pairs = zip(whole["ids"], ids, strict=True)
        alike = float(np.mean([np.isin(one, other).mean() for one, other in pairs]))
    return {
        "shards": len(shards),
        "same_distances": same,
        "same_neighbours": alike,
        "queries_per_second": summary(_rates(search, queries)),
        "seconds": watch.seconds,
        **large.memory.gib(),
    }


def _shard(store: Datastore, card: IndexCard, blocks: Sequence[Any]) -> SearchIndex:
    trained = read_trained(store.index_path)
    return SearchIndex(assemble(trained, _pieces(store, blocks)), card)


def _pieces(store: Datastore, blocks: Sequence[Any]) -> list[Any]:
    card = read_card(store.index_path)
    assert card is not None
    training = training_in(store.index_path, card.bytes)
    return list(pieces_of(blocks, training, card.piece_bytes))


def _rates(search: Any, queries: torch.Tensor) -> list[float]:
    """Queries a second, run by run."""
    rates = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        search()
        rates.append(len(queries) / (time.perf_counter() - started))
    return rates


STEPS: dict[str, Callable[[Large], dict[str, Any]]] = {
    "built": build,
    "whole": search_whole,
    "shards": search_shards,
}


def run(args: argparse.Namespace) -> int:
    """Does the first step that is not done, and starts over for the next."""
    args.folder.joinpath("figures").mkdir(parents=True, exist_ok=True)
    large = Large(args)
    _check_same(large)
    tidy(large.kept)
    for name, step in STEPS.items():
        if not large.figures(name).exists():
            if step is not build and MALLOC not in os.environ:
                os.environ[MALLOC] = str(2**16)
                start_over()
            write_json(large.figures(name), step(large))
            start_over()
    found = collect(large)
    write_json(args.folder / "scale.json", found)
    show_figures(found)
    return 0


def start_over() -> None:
    """Runs the program once more in this process, with memory as it was at the beginning."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.argv])


def _check_same(large: Large) -> None:
    """Refuses a folder in which something else is being made."""
    args, file = large.args, large.figures("setting")
    names = "entries", "width", "block_rows", "k", "queries", "seed"
    setting = {name: getattr(args, name) for name in names}
    if args.block_rows % PART:
        sys.exit(f"--block-rows must be a multiple of {PART}")
    if file.exists() and (there := json.loads(file.read_text())) != setting:
        sys.exit(f"{args.folder} holds another run: {there}, not {setting}")
    write_json(file, setting)


def collect(large: Large) -> dict[str, Any]:
    """All figures."""
    args = large.args
    steps = {name: json.loads(large.figures(name).read_text()) for name in ("setting", *STEPS)}
    blocks = [json.loads(file.read_text()) for file in sorted(large.kept.glob("[0-9]*.json"))]
    training = large.figures("training")
    seconds: dict[str, float] = {}
    for block in blocks:
        for name, spent in block["seconds"].items():
            seconds[name] = seconds.get(name, 0.0) + spent
    rows = sum(block["rows"] for block in blocks)
    held = {
        name: sum(file.stat().st_size for file in large.store.glob(pattern)) / args.entries
        for name, pattern in (("values", "blocks/*/values.npy"), ("pieces", "blocks/*/piece-*"))
    }
    steps["built"] = {
        "blocks": len(blocks),
        "rows": rows,
        "seconds": seconds,
        "keys_per_second": rows / sum(seconds.values()),
        "cpu_seconds": sum(block["cpu_seconds"] for block in blocks),
        "encoded_per_second": rows / seconds["encoding"],
        "bytes_per_key": held,
        "peak_gib": max(block["peak_gib"] for block in blocks),
        "peak_own_gib": max(block["peak_own_gib"] for block in blocks),
    }
    steps["training"] = json.loads(training.read_text()) if training.exists() else None
    return {"machine": machine(args.threads), "openblas_coretype": KERNELS, **steps}


def show_figures(found: dict[str, Any]) -> None:
    """Prints what counts as a table."""
    built, whole, shards = found["built"], found["whole"], found["shards"]
    entries = found["setting"]["entries"]
    total = sum(built["seconds"].values())
    rows = [["keys", f"{entries:,}"], ["index", f"{whole['factory']}, nprobe {whole['nprobe']}"]]
    if training := found["training"]:
        rows.append(["training", f"{training['seconds']['training']:,.0f} s"])
    rows.append(["blocks built", f"{built['keys_per_second']:,.0f} keys/s, {total / 3600:.2f} h"])
    rows += [[f"  {name}", f"{spent / total:.0%}"] for name, spent in built["seconds"].items()]
    rows.append(["bytes a key on disk", f"{sum(built['bytes_per_key'].values()):.1f}"])
    opened = whole["opened"]
    held = (opened["own_gib"] - opened["before_gib"]) * 2**30 / entries
    rows.append(["bytes a key in memory", f"{held:.1f}"])
    rows += [[name, f"{spent:.1f} s"] for name, spent in whole["seconds"].items()]
    k = found["setting"]["k"]
    rows.append([f"recall@{k}", f"{whole['recall']:.3f}"])
    for name, part in (("whole index", whole), (f"{shards['shards']} shards", shards)):
        rate = part["queries_per_second"]["median"]
        rows.append([f"queries/s, {name}", f"{rate:,.0f}"])
    for name in ("training", "built", "whole", "shards"):
        if part := found[name]:
            peak = f"{part['peak_own_gib']:.2f} GiB, {part['peak_gib']:.2f} with mapped files"
            rows.append([f"memory, {name}", peak])
    show(["", ""], rows)
