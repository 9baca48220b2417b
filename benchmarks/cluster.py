"""Measures search in shards on Ray against the one index over all blocks, on equal cores.

    python benchmarks/cluster.py --shared ../shared

On WikiText-2 with the language model found under --shared, or else on the demo's text with the
demo's language model. Everything that takes part, Ray's processes included, is held to the same
cores. Rivals are timed in turn, once their results are known to agree: searches by neighbours and
distances, evaluations by their loss, saves by the fingerprint of what they made. The table at the
end is also in OUT/cluster.json; what is made on the way is kept in OUT/work.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# Also from a checkout that is not installed; and the demo, whose material and runner are used.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import faiss
import torch
from common.commands import RunError, clock, usable_cores
from material import READING, ROOT, Choice, Material, find_source
from measure import Figure, Rates, interleaved, keep, machine, show_entries
from shell import Shell
from torch import Tensor

from fairseq_knnlm.cluster.opening import open_sharded
from fairseq_knnlm.cluster.search import ShardedIndex
from fairseq_knnlm.datastore import Datastore, open_datastore
from fairseq_knnlm.errors import KnnlmError
from fairseq_knnlm.index.storage import load
from fairseq_knnlm.retrieval.local import Searches

FIGURES = {
    "sharded_over_whole": Figure("search", "shards", "whole", "queries/s"),
    "sharded_evaluation_over_local": Figure("evaluation", "shards", "local", "tokens/s"),
    "save_by_two_workers_over_one_process": Figure("save", "workers", "one", "entries/s"),
}
#: Lines of test that show, before anything is timed, that losses agree.
WARM_UP = 50
#: Of the fourth decimal of a loss, which is the last that fairseq prints: where several entries
#: are as near as the k-th neighbour, FAISS takes any of them.
DIGITS = 1e-3


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="example: python benchmarks/cluster.py --cores 1 --shards 4",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    shared = ROOT.parent / "shared"
    option("--shared", type=Path, default=shared, help="has data/wikitext-2 and ckpt/wt2-small.pt")
    option("--demo", type=Path, default=ROOT / "demo", help="the demo's folder, used without them")
    option("--out", type=Path, default=ROOT / "bench", help="folder of all that is made")
    option("--only", nargs="+", choices=FIGURES, default=list(FIGURES), metavar="FIGURE")
    option("--cores", type=int, default=usable_cores(), help="that everything is held to")
    option("--shards", type=int, default=4, help="parts of the index")
    option("--block-rows", type=int, default=2**18, help="entries of a block, about")
    option("--recipe", default="auto", help="of the index")
    option("--k", type=int, default=1024, help="neighbours a token")
    option("--queries", type=int, default=8192, help="sampled tokens of valid")
    option("--batch", type=int, default=2048, help="queries of a search")
    option("--lines", type=int, default=600, help="lines of test that evaluations are timed on")
    option("--first", type=int, default=0, help="use so many lines of every split; 0 for all")
    option("--searches", type=int, default=7, help="timed runs of each search")
    option("--rounds", type=int, default=3, help="timed runs of each evaluation")
    option("--saves", type=int, default=1, help="timed runs of each save, of the whole train split")
    option("--seed", type=int, default=0, help="of the sample")
    return parser.parse_args()


class Bench:
    """What is measured, on material that is made when it is asked for.

    Args:
        args: the command line.
        material: text, language model and datastores.
    """

    def __init__(self, args: argparse.Namespace, material: Material) -> None:
        self.args = args
        self.material = material
        self._losses: dict[int, float] = {}
        self._saved: str | None = None

    @property
    def store(self) -> Datastore:
        """The datastore of the train split, in blocks, with an index in pieces."""
        rows = self.args.block_rows
        path = self.material.saved(f"blocks-{rows}", "train", "--block-rows", rows)
        store = open_datastore(path)
        if not store.index_path.exists():
            build = ["fairseq-knnlm", "build-index", "--dstore", path, "--recipe", self.args.recipe]
            self.material.shell.prepare("index-in-blocks", build)
        return store

    def search(self) -> Rates:
        """Queries a second of the whole index and of shards, once they agree."""
        store, asked = self.store, self.material.asked("valid").keys
        whole = load(
            store.index_path,
            datastore=store.fingerprint,
            rows=len(store),
            width=store.manifest.width,
            blocks=store.blocks,
        )
        threads = max(1, self.args.cores // self.args.shards)
        shards = open_sharded(store, "local", shards=self.args.shards, threads=threads)
        self._rate(shards, asked, 0)  # it learns for how many to ask
        check_same(whole, shards, asked[: self.args.batch], self.args.k)
        before = shards.asked_again
        rivals: dict[str, Callable[[int], float]] = {
            "whole": partial(self._rate, whole, asked),
            "shards": partial(self._rate, shards, asked),
        }
        rates = interleaved(rivals, self.args.searches, "searches")
        share = (shards.asked_again - before) / len(asked) / self.args.searches / len(shards.shards)
        print(f"\nasked again: {share:.2%} of what shards were asked")
        return rates

    def _rate(self, index: Searches, asked: Tensor, _: int) -> float:
        started = time.perf_counter()
        for some in asked.split(self.args.batch):
            index.search(some, self.args.k)
        return len(asked) / (time.perf_counter() - started)

    def evaluation(self) -> Rates:
        """Tokens a second of evaluations, once their losses agree."""
        self._evaluate("local", WARM_UP, 0)
        self._evaluate("shards", WARM_UP, 0)
        lines = self.args.lines
        rivals = {name: partial(self._evaluate, name, lines) for name in ("local", "shards")}
        return interleaved(rivals, self.args.rounds, "evaluations")

    def _evaluate(self, name: str, lines: int, _: int) -> float:
        options: list[object] = ["--knnlm", "--dstore-filename", self.store.path, "--no-load-keys"]
        options += ["--k", self.args.k, "--lmbda", 0.25, "--knn-temp", 10]
        if name == "shards":
            options += ["--knn-ray", "local", "--knn-shards", self.args.shards]
        command = self.material.evaluation("test", *options, lines=lines)
        report = self.material.shell.evaluate(f"{name}-{lines}", command)
        loss = self._losses.setdefault(lines, float(report.loss))
        if abs(loss - float(report.loss)) > DIGITS:
            raise RunError(f"the evaluations differ: losses {loss} and {report.loss}")
        return report.rate

    def save(self) -> Rates:
        """Entries a second that one process saves, and two workers of Ray, on a core each."""
        on_ray = ["cluster", "save", "--ray", "local", "--workers", 2]
        names: dict[str, list[object]] = {"one": ["save"], "workers": on_ray}
        rivals = {name: partial(self._save, name, words) for name, words in names.items()}
        return interleaved(rivals, self.args.saves, "saves")

    def _save(self, name: str, words: Sequence[object], _: int) -> float:
        material, path = self.material, self.material.folder / f"saved-by-{name}"
        shutil.rmtree(path, ignore_errors=True)
        command = ["fairseq-knnlm", *words, material.data("train"), *READING]
        command += ["--path", material.source.checkpoint, "--dstore", path]
        command += ["--block-rows", self.args.block_rows]
        seconds = Shell(material.shell.logs, 1).seconds(f"save-by-{name}", command)
        store = open_datastore(path, load_keys=False)
        self._saved = self._saved or store.fingerprint
        if store.fingerprint != self._saved:
            raise RunError("what workers saved is not what one process saved")
        shutil.rmtree(path)
        return len(store) / seconds


def check_same(whole: Searches, shards: ShardedIndex, asked: Tensor, k: int) -> None:
    """Refuses shards that find others than the whole index.

    Raises:
        RunError: where distances differ, or neighbours but those as near as the k-th.
    """
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # with more FAISS cuts the queries, which shows in last digits
    (distances, ids), (ours, found) = whole.search(asked, k), shards.search(asked, k)
    faiss.omp_set_num_threads(threads)
    if not torch.equal(distances, ours):
        raise RunError("the distances of shards are not those of the whole index")
    for true, some, near in zip(ids, found, distances < distances[:, -1:], strict=True):
        if not set(true[near].tolist()) <= set(some.tolist()):
            raise RunError("shards miss neighbours that the whole index finds")


def run(args: argparse.Namespace) -> None:
    """Measures what was asked for."""
    about: dict[str, Any] = {"machine": machine(args.cores)}  # before there is any load of ours
    # Ray's processes and those of commands inherit it.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    os.environ["OMP_NUM_THREADS"] = str(args.cores)
    faiss.omp_set_num_threads(args.cores)
    torch.set_num_threads(args.cores)
    work = args.out.resolve() / "work"
    choice = Choice(args.k, args.queries, args.seed, args.lines, args.first)
    source = find_source(args.shared, args.demo)
    material = Material(source, choice, work, Shell(work / "logs", args.cores))
    bench = Bench(args, material)
    about["setting"] = {
        "data": source.name,
        "entries": len(bench.store),
        "blocks": len(bench.store.blocks),
        "shards": args.shards,
        "k": args.k,
        "batch": args.batch,
        "recipe": args.recipe,
    }
    entries = {}
    for name in args.only:
        figure = FIGURES[name]
        measure: dict[str, Callable[[], Rates]] = {
            "search": bench.search,
            "evaluation": bench.evaluation,
            "save": bench.save,
        }
        entries[name] = figure.entry(measure[figure.kind]())
        keep(args.out / "cluster.json", entries, **about)
    print()
    show_entries(entries)
    print(f"\nRates and the machine are in {args.out / 'cluster.json'}")


def main() -> int:
    started, args = time.monotonic(), arguments()
    os.chdir(ROOT)  # the demo's commands are relative to it
    try:
        run(args)
    except (KnnlmError, RunError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; what was made is kept", file=sys.stderr)
        return 130
    print(f"{clock(time.monotonic() - started)} in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
