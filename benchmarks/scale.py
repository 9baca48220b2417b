"""Measures how the default index grows: keys are streamed into it and never stored.

    python benchmarks/scale.py --sizes 1000000 4000000 10000000
    python benchmarks/scale.py --entries 103227021 --folder FOLDER

The second is a whole datastore in blocks, on the disk (large.py). Of the first, each size is
measured in a process of its own. The time of a query is compared at equal recall of fresh queries,
none of which is a key: that of the smallest index as it was built. The table at the end is also in
OUT/scale.json.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Also from a checkout that is not installed; and what the demo shares.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import faiss
import large
import numpy as np
import torch
from common.commands import RunError, answer
from measure import default_threads, machine, summary
from msgspec.structs import replace
from synthetic import Mixture
from tqdm import tqdm
from truth import Truth
from watch import Watch

from fairseq_knnlm.cli.tables import show
from fairseq_knnlm.files import write_json
from fairseq_knnlm.index.build import BuildOptions, IndexBuilder
from fairseq_knnlm.index.card import IndexCard
from fairseq_knnlm.index.recipes import choose
from fairseq_knnlm.index.search import SearchIndex
from fairseq_knnlm.index.storage import write_file

ROOT = Path(__file__).resolve().parent.parent
#: Timed runs of all queries.
REPEATS = 5


class Searcher:
    """One index with any number of lists visited.

    Args:
        index: FAISS's.
        card: its card.
        truth: queries, and who their neighbours are.
    """

    def __init__(self, index: Any, card: IndexCard, truth: Truth) -> None:
        self._index, self._card, self._truth = index, card, truth
        self._recalls: dict[int, float] = {}

    def search(self, nprobe: int) -> np.ndarray:
        """The ids found for each query, (Q, k)."""
        searcher = SearchIndex(self._index, replace(self._card, nprobe=nprobe))
        return searcher.search(torch.from_numpy(self._truth.queries), self._truth.k)[1].numpy()

    def recall(self, nprobe: int) -> float:
        if nprobe not in self._recalls:
            self._recalls[nprobe] = self._truth.recall(self.search(nprobe))
        return self._recalls[nprobe]

    def rates(self, nprobe: int) -> list[float]:
        """Queries a second, run by run."""
        rates = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            self.search(nprobe)
            rates.append(len(self._truth.queries) / (time.perf_counter() - started))
        return rates

    def at(self, nprobe: int) -> dict[str, Any]:
        """What is found with so many lists, and how fast."""
        recall = self.recall(nprobe)  # also warms up
        return {
            "nprobe": nprobe,
            "recall": recall,
            "queries_per_second": summary(self.rates(nprobe)),
        }


def fewest(recall: Callable[[int], float], goal: float, first: int, lists: int) -> int:
    """The fewest lists with which recall reaches a goal; all of them where it never does."""
    high, low = first, 0
    while recall(high) < goal:
        if high == lists:
            return lists
        low, high = high, min(2 * high, lists)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if recall(middle) >= goal else (middle, high)
    return high


def measure(args: argparse.Namespace, rows: int) -> dict[str, Any]:
    """Builds and searches an index of so many keys."""
    mixture, watch = Mixture(args.width, args.seed, args.threads), Watch()
    recipe = choose("auto", rows, args.width, lists=True)
    builder = IndexBuilder(recipe, args.width, rows, BuildOptions(k=args.k, seed=args.seed))
    truth = Truth(mixture.queries(args.queries), args.k)
    with watch.on("generating"):
        sample, places = mixture.sample(rows, builder.sample_rows)
    with watch.on("training"):
        builder.train(sample, places)
    trained_on = len(sample)
    del sample
    _stream(mixture, rows, builder, truth, watch)
    with watch.on("examining"):
        index, card = builder.finish()
    searcher = Searcher(index, card, truth)
    as_built = searcher.at(card.nprobe)
    wanted = as_built["recall"] if args.recall is None else args.recall
    lists = faiss.extract_index_ivf(index).nlist
    nprobe = fewest(searcher.recall, wanted, card.nprobe, lists)
    return {
        "rows": rows,
        "factory": card.factory,
        "coverage": card.coverage,
        "trained_on": trained_on,
        "seconds": watch.seconds,
        "added_per_second": rows / watch.seconds["adding"],
        "bytes_per_key": _file_bytes(index, args.out) / rows,
        "as_built": as_built,
        "recall_wanted": wanted,
        "at_equal_recall": as_built if nprobe == card.nprobe else searcher.at(nprobe),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def _stream(mixture: Mixture, rows: int, builder: IndexBuilder, truth: Truth, watch: Watch) -> None:
    """Makes all keys, shows them to those who look for true neighbours, and adds them."""
    chunks = mixture.chunks(range(rows))
    with tqdm(total=rows, desc=f"{rows:,} keys", unit=" keys", unit_scale=True) as bar:
        while True:
            with watch.on("generating"):
                chunk = next(chunks, None)
            if chunk is None:
                return
            with watch.on("looking for true neighbours"):
                builder.see(*chunk)
                truth.see(*chunk)
            with watch.on("adding"):
                builder.add(*chunk)
            bar.update(len(chunk[1]))


def _file_bytes(index: Any, folder: Path) -> int:
    """Length of an index's file."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary, "knn.index")
        write_file(index, path)
        return path.stat().st_size


def measure_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All sizes, the smallest first, each in a process of its own."""
    found: list[dict[str, Any]] = []
    for rows in sorted(args.sizes):
        goal = ["--recall", str(found[0]["recall_wanted"])] if found else []
        found.append(json.loads(answer(__file__, *sys.argv[1:], "--one", rows, *goal)))
    return found


def conclude(sizes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Growth from the smallest size to the largest, and the most memory."""
    last = sizes[-1]
    return {
        "growth_of_query_time": {
            "value": _growth(sizes, "at_equal_recall"),
            "recall_reached": last["at_equal_recall"]["recall"] >= last["recall_wanted"],
            "value_as_built": _growth(sizes, "as_built"),
        },
        "peak_memory_gib": {"value": max(size["peak_gib"] for size in sizes)},
    }


def _growth(sizes: Sequence[dict[str, Any]], where: str) -> float:
    """How many times as long the largest index takes for a query as the smallest."""
    first, last = (size[where]["queries_per_second"]["median"] for size in (sizes[0], sizes[-1]))
    return float(first / last)


def show_sizes(sizes: Sequence[dict[str, Any]]) -> None:
    """Prints the sizes; nprobe, recall and speed are those at equal recall."""
    rows = []
    for size in sizes:
        at = size["at_equal_recall"]
        rate = at["queries_per_second"]["median"]
        rows.append(
            [f"{size['rows']:,}", f"{size['seconds']['training']:.0f} s"]
            + [f"{size['added_per_second']:,.0f}", f"{size['bytes_per_key']:.1f}"]
            + [at["nprobe"], f"{at['recall']:.3f}", f"{rate:,.0f}", f"{size['peak_gib']:.1f} GiB"]
        )
    header = "keys, training, added/s, bytes/key, nprobe, recall, queries/s, memory"
    show(header.split(", "), rows)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="example: python benchmarks/scale.py --sizes 100000 400000 --width 256",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    sizes = [1_000_000, 4_000_000, 10_000_000]
    option("--sizes", type=int, nargs="+", default=sizes, metavar="N", help="keys of each index")
    option("--width", type=int, default=1024, help="dimensions of a key")
    option("--k", type=int, default=1024, help="neighbours a query")
    option("--queries", type=int, default=1024, help="fresh queries")
    option("--seed", type=int, default=0, help="of keys and queries")
    option("--threads", type=int, default=default_threads(), help="of everything")
    option("--out", type=Path, default=ROOT / "bench", help="folder of scale.json")
    option("--entries", type=int, metavar="N", help="build and search a datastore in blocks")
    option("--block-rows", type=int, default=2**20, help="with --entries: keys of a block")
    option("--folder", type=Path, help="with --entries: where it is made, or gone on with")
    option("--one", type=int, metavar="N", help="measure this size only, in this process")
    option("--recall", type=float, help="to compare at, where not that of the smallest index")
    option("--into", type=Path, metavar="FILE", help="with --one: JSON file to write")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    if bool(args.entries) != bool(args.folder):
        sys.exit("--entries and --folder go together")
    args.out.mkdir(parents=True, exist_ok=True)
    faiss.omp_set_num_threads(args.threads)
    torch.set_num_threads(args.threads)
    if args.entries:
        return large.run(args)
    if args.one:
        found = measure(args, args.one)
        if args.into:
            write_json(args.into, found)
        else:
            print(json.dumps(found, indent=2))
        return 0
    about = machine(args.threads)
    setting = {name: getattr(args, name) for name in ("width", "k", "queries", "seed")}
    try:
        sizes = measure_all(args)
    except RunError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    figures = conclude(sizes)
    write_json(
        args.out / "scale.json",
        {"machine": about, "setting": setting, "sizes": sizes, **figures},
    )
    print()
    show_sizes(sizes)
    print()
    for name, entry in figures.items():
        print(f"{name.replace('_', ' ')}: {entry['value']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
