"""Measures the plugin against the stock scorer, the published search and the paper's index.

    python benchmarks/bench.py --shared ../shared

On WikiText-2 with the language model found under --shared, or else on the demo's text with the
demo's language model. Rivals are timed in turn, once their results are known to agree. The table
at the end is also in OUT/results.json; all that is made on the way is kept in OUT/work, and the
next run goes on from there.
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

# Also from a checkout that is not installed; and the demo, whose material and runner are used.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import faiss
import torch
from common.commands import RunError, clock
from figures import FIGURES, Bench, Repeats
from material import ROOT, Choice, Material, find_source
from measure import default_threads, keep, machine, show_entries
from shell import Shell
from writers import Texts

from fairseq_knnlm.errors import KnnlmError


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="example: python benchmarks/bench.py --only base_over_stock saving_over_forward",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    shared = ROOT.parent / "shared"
    option("--shared", type=Path, default=shared, help="has data/wikitext-2 and ckpt/wt2-small.pt")
    option("--demo", type=Path, default=ROOT / "demo", help="the demo's folder, used without them")
    option("--out", type=Path, default=ROOT / "bench", help="folder of all that is made")
    option("--only", nargs="+", choices=FIGURES, default=list(FIGURES), metavar="FIGURE")
    option("--fresh", action="store_true", help="make everything anew")
    option("--full", action="store_true", help="time commands on the entire test split")
    option("--lines", type=int, default=1500, help="lines of test that commands are timed on")
    option("--first", type=int, default=0, help="use so many lines of every split; 0 for all")
    option("--queries", type=int, default=8192, help="sampled tokens of valid, and of test")
    option("--k", type=int, default=1024, help="neighbours a token")
    option("--rounds", type=int, default=3, help="timed runs of each command")
    option("--searches", type=int, default=7, help="timed runs of each search")
    option("--builds", type=int, default=2, help="timed builds of each index")
    option("--prompts", type=int, default=64, help="texts that are written, to time that")
    option("--calibrated", help="datastore whose mixture writes, too; '' for not even the demo's")
    option("--seed", type=int, default=0, help="of the samples")
    option("--threads", type=int, default=default_threads(), help="of everything")
    return parser.parse_args()


def run(args: argparse.Namespace) -> bool:
    """Measures what was asked for; True where all of it could be."""
    out, work = args.out.resolve(), args.out.resolve() / "work"
    if args.fresh:
        shutil.rmtree(work, ignore_errors=True)
    about = {"machine": machine(args.threads)}  # before there is any load of ours
    faiss.omp_set_num_threads(args.threads)
    torch.set_num_threads(args.threads)
    shell = Shell(work / "logs", args.threads)
    lines = 0 if args.full else args.lines
    choice = Choice(args.k, args.queries, args.seed, lines, args.first)
    source = find_source(args.shared, args.demo)
    material = Material(source, choice, work, shell)
    about["setting"] = material.describe()
    calibrated = source.calibrated if args.calibrated is None else args.calibrated
    texts = Texts(args.prompts, str(calibrated or ""))
    bench = Bench(material, Repeats(args.rounds, args.searches, args.builds), texts)

    everything: dict[str, Any] = {}

    def done(entries: dict[str, Any]) -> None:
        everything.update(keep(out / "results.json", entries, **about))

    whole = bench.measure(args.only, done)
    print()
    show_entries({name: everything[name] for name in FIGURES if name in everything})
    print(f"\nRates, perplexities and the machine are in {out / 'results.json'}")
    return whole


def main() -> int:
    started, args = time.monotonic(), arguments()
    os.chdir(ROOT)  # the demo's commands are relative to it
    try:
        whole = run(args)
    except (KnnlmError, RunError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; what was made is kept", file=sys.stderr)
        return 130
    print(f"{clock(time.monotonic() - started)} in all")
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
