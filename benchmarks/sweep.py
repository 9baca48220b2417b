"""Compares recipes of an index: speed against the paper's, and the perplexity they lead to.

    python benchmarks/sweep.py auto IVF1024,PQ128x4fs --nprobe 4 8 16

On the material of ``bench.py``, which is made where it is missing. Prints a row for each recipe
and number of lists visited; distances are the index's own.
"""

import argparse
import os
import statistics
import sys
import time
from functools import cache, partial
from pathlib import Path

# Also from a checkout that is not installed; and the demo, whose material and runner are used.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import faiss
import torch
from material import EXAMINED, FROM_INDEX, ROOT, Choice, Material, find_source
from measure import Ratio, default_threads, interleaved
from msgspec.structs import replace
from perplexity import Perplexities
from rivals import UNEXAMINED, Search
from shell import Shell

from fairseq_knnlm.cli.tables import show
from fairseq_knnlm.index.search import SearchIndex
from fairseq_knnlm.retrieval.local import LocalRetriever

PAPER = "paper@32"
#: Queries of a timed batch, and batches.
BATCH, REPEATS = 2048, 5
HEADER = (
    *("recipe", "nprobe", "bytes a key", "queries/s", "over the paper's"),
    *("perplexity", "over exact"),
)


class Recipes:
    """Searches by names such as ``IVF1024,PQ64@16``: a recipe, and how many lists are visited."""

    def __init__(self, material: Material) -> None:
        self.material = material
        self.k = material.choice.k

    @cache  # noqa: B019  (there is one, and it lives as long as the program)
    def index(self, recipe: str) -> SearchIndex:
        return self.material.index(recipe, UNEXAMINED if recipe == "paper" else EXAMINED)

    def of(self, name: str) -> Search:
        recipe, _, nprobe = name.partition("@")
        built = self.index(recipe)
        # The last SearchIndex made of an index decides how many lists it visits.
        chosen = SearchIndex(built.index, replace(built.card, nprobe=int(nprobe)))
        return LocalRetriever(chosen, self.material.store, FROM_INDEX).search

    def ratio(self, name: str, queries: torch.Tensor) -> tuple[float, Ratio]:
        """Queries a second, and how many times that is the paper's index's."""

        def seconds(rival: str, _: int) -> float:
            search = self.of(rival)
            started = time.perf_counter()
            search(queries, self.k)
            return time.perf_counter() - started

        rivals = {rival: partial(seconds, rival) for rival in (name, PAPER)}
        for run in rivals.values():
            run(0)  # warms up
        found = interleaved(rivals, REPEATS, name)
        return len(queries) / statistics.median(found[name]), Ratio.of(found[PAPER], found[name])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="example: python benchmarks/sweep.py auto IVF2048,PQ128x4fs --nprobe 8 16",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("recipes", nargs="+", metavar="RECIPE", help="auto, paper or a FAISS factory string")
    option("--nprobe", type=int, nargs="+", default=[8, 16], help="lists visited")
    option("--shared", type=Path, default=ROOT.parent / "shared", help="as for bench.py")
    option("--demo", type=Path, default=ROOT / "demo", help="as for bench.py")
    option("--out", type=Path, default=ROOT / "bench", help="as for bench.py")
    option("--queries", type=int, default=8192, help="sampled tokens of valid, and of test")
    option("--k", type=int, default=1024, help="neighbours a token")
    option("--threads", type=int, default=default_threads(), help="of everything")
    args = parser.parse_args()
    os.chdir(ROOT)
    faiss.omp_set_num_threads(args.threads)
    torch.set_num_threads(args.threads)
    work = args.out.resolve() / "work"
    choice = Choice(args.k, args.queries, seed=0, lines=0, first=0)
    source = find_source(args.shared, args.demo)
    material = Material(source, choice, work, Shell(work / "logs", args.threads))
    recipes = Recipes(material)
    perplexities = Perplexities(material, recipes)
    queries = perplexities.samples["test"].keys[:BATCH]
    exact = perplexities.of("exact").test
    print(f"base {perplexities.base['test']:.2f}, exact search {exact:.2f}")
    rows = []
    try:
        for recipe in args.recipes:
            for nprobe in args.nprobe:
                name = f"{recipe}@{nprobe}"
                rate, ratio = recipes.ratio(name, queries)
                found = perplexities.of(name).test
                card = recipes.index(recipe).card
                rows.append(
                    [card.factory, nprobe, f"{card.bytes / card.rows:.0f}", f"{rate:,.0f}"]
                    + [f"{ratio.value:.1f}", f"{found:.2f}", f"{found / exact - 1:+.2%}"]
                )
    finally:  # also where the person watching has had enough
        show(HEADER, rows)


if __name__ == "__main__":
    main()
