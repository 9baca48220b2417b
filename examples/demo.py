"""A language model of Python's own documentation, and a memory for it, in minutes on a CPU.

Trains a small language model on the standard library's docstrings, then evaluates it with and
without nearest neighbours on two texts that it has not seen: other docstrings, with a datastore
of its own training text, and the language reference, with a datastore of that. In the second
the model adapts to another domain without any training, as in section 4.3 of Khandelwal et al. At
the end it goes on with lines of the language reference, with and without a memory of that, and
shows where each word came from.

Every command is shown as one would type it. The mixtures are fitted on valid.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

# Also from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.commands import RunError, Steps, clock, environment, threads

from fairseq_knnlm.cli.tables import show

ROOT = Path(__file__).resolve().parent.parent
TASK = ["--user-dir", "fairseq_knnlm", "--task", "knn_lm"]
NEIGHBOURS = 1024
EXPERTS = "knn,cache,ngram,suffix"

# What is tested -> how the table names it. The first is what the LM is trained on.
DOMAINS = {
    "docstrings": "docstrings of the standard library",
    "reference": "language reference",
}

# Of what the model writes about, and how much of a line it is given.
WRITING = "reference"
PROMPTS, GIVEN, LONG, NEW = 3, 6, 20, 48
# A document is a heading or a docstring's first sentence, with what follows it.
BOUNDARY = "[A-Z][^.:;=|]*[.:]?$"

# What a log says of a written text: all but what the loggers say.
WRITTEN = r"^(?![A-Z]+:|\d[\d,]* tokens in |sources: )."

# Baevski and Auli's model, small: adaptive input and softmax with tied weights.
MODEL = """
    --arch transformer_lm --decoder-layers 2 --decoder-attention-heads 4
    --decoder-embed-dim 256 --decoder-input-dim 256 --decoder-output-dim 256
    --decoder-ffn-embed-dim 1024 --dropout 0.05
    --adaptive-input --adaptive-input-cutoff 1000,2500 --adaptive-input-factor 2
    --adaptive-softmax-cutoff 1000,2500 --adaptive-softmax-factor 2
    --tie-adaptive-weights --tie-adaptive-proj
""".split()
TRAINING = """
    --criterion adaptive_loss --ddp-backend legacy_ddp
    --tokens-per-sample 256 --sample-break-mode none --batch-size 4
    --optimizer adam --adam-betas (0.9,0.98) --weight-decay 0.01 --clip-norm 1.0
    --lr 0.0015 --lr-scheduler cosine --warmup-updates 100 --seed 1 --cpu --num-workers 0
    --validate-interval 2 --save-interval 2 --no-epoch-checkpoints --no-last-checkpoints
    --log-format simple --log-interval 20
""".split()
# fairseq takes the context off the sample: 64 tokens are scored with 193 to 256 before them.
# A datastore is saved with 129 to 256 before each token, for half the work.
READING = "--tokens-per-sample 256 --sample-break-mode none --max-tokens 4096 --cpu".split()
SCORING = [*READING, "--context-window", 192]
SAVING = [*READING, "--context-window", 128]


class Demo:
    """The steps, from text to table.

    Args:
        out: folder of everything that is made.
        updates: training steps of the language model.
    """

    def __init__(self, out: Path, updates: int):
        self.out = out
        self.updates = updates
        for folder in ("logs", "scores", "datastores"):
            (out / folder).mkdir(parents=True)
        self.steps = Steps(3 + 7 * len(DOMAINS) + 3, out / "logs", environment())

    def run(self) -> list[dict[str, Any]]:
        """Do it all, and return a row for each domain."""
        self.prepare()
        self.train()
        rows = [self.evaluate(domain) for domain in DOMAINS]
        self.write()
        return rows

    def prepare(self) -> None:
        """Text, pieces, and fairseq's binary files, all with one dictionary."""
        text, pieces = self.out / "text", self.out / "pieces"
        self.steps.run(
            "Collect the text",
            ["python", "examples/demo_corpus.py", "--out", text],
            show="words in",
        )
        self.steps.run(
            "Learn a vocabulary and split the text into pieces",
            ["python", "examples/demo_pieces.py", "--text", text, "--out", pieces],
            show="tokens in",
        )
        for domain in DOMAINS:
            split = pieces / domain
            self.steps.run(
                f"Binarise the {domain}",
                ["fairseq-preprocess", "--only-source", "--srcdict", pieces / "dict.txt"]
                + ["--trainpref", split / "train.txt", "--validpref", split / "valid.txt"]
                + ["--testpref", split / "test.txt", "--destdir", self.data(domain)],
            )

    def train(self) -> None:
        """The base language model, with the stock command."""
        self.steps.run(
            "Train a language model on the docstrings",
            ["fairseq-train", self.data("docstrings"), *TASK, *MODEL, *TRAINING]
            + ["--max-update", self.updates, "--save-dir", self.out / "lm"],
            progress=r"num_updates=(\d+)",
            of=self.updates,
        )

    def evaluate(self, domain: str) -> dict[str, Any]:
        """Save a datastore of the domain's training text, calibrate on valid, score test."""
        store = self.out / "datastores" / domain
        table = self.out / "scores" / f"{domain}-valid.npz"
        found = {name: self.out / "scores" / f"{domain}-{name}.json" for name in ("knn", "best")}
        self.eval_lm(
            f"Save a datastore of the {domain}",
            domain,
            "train",
            ["--save-knnlm-dstore", "--dstore-mmap", store, "--document-boundary", BOUNDARY]
            + SAVING,
            show="saved",
        )
        self.steps.run(
            "Build its index",
            ["python", "examples/build_index.py", "--dstore", store],
            show=r"knn\.index: |bytes a key",
        )
        knn = ["--knnlm", "--dstore-filename", store, "--k", NEIGHBOURS, *SCORING]
        self.eval_lm(
            f"Score the valid text of the {domain}",
            domain,
            "valid",
            [*knn, "--experts", EXPERTS, "--mixer", "none", "--score-table", table],
        )
        self.steps.run(
            "Fit the mixtures on it",
            ["fairseq-knnlm", "tune", "--dstore", store, "--score-table", table],
            show="<- used|alone",
        )
        self.eval_lm(
            f"Score the test text of the {domain} with the neighbours, lambda and T fixed",
            domain,
            "test",
            [*knn, "--experts", "knn", "--mixer", "fixed", "--results-json", found["knn"]],
            show="perplexity [0-9.]+, loss",
        )
        self.eval_lm(
            f"Score the test text of the {domain} with what served valid best",
            domain,
            "test",
            [*knn, "--results-json", found["best"]],
            show="perplexity [0-9.]+, loss|calibrated on",
        )
        return row(domain, *(json.loads(file.read_text()) for file in found.values()))

    def write(self) -> None:
        """Go on with lines of test text, with and without a memory, and show the sources."""
        prompts, sources = self.out / "prompts.txt", self.out / "sources.jsonl"
        test = self.out / "text" / WRITING / "test.txt"
        prompts.write_text(beginnings(test.read_text(encoding="utf-8")), encoding="utf-8")
        generate = ["fairseq-knnlm", "generate", "--dstore", self.out / "datastores" / WRITING]
        generate += [self.data(WRITING), "--path", self.checkpoint, "--prompts", prompts]
        generate += ["--new-tokens", NEW, "--lines", "--sampling", "--sampling-topp", 0.8, "--cpu"]
        generate += ["--bpe", "sentencepiece"]
        generate += ["--sentencepiece-model", self.out / "pieces" / "sentencepiece.model"]
        self.steps.run(
            "Go on with lines of test text: the LM alone, since the memory has no weight",
            [*generate, "--experts", "knn", "--mixer", "fixed", "--lmbda", 0],
            show=WRITTEN,
        )
        self.steps.run(
            "Go on with the same lines by what served valid best, and keep the sources",
            [*generate, "--sources", sources],
            show=WRITTEN,
        )
        self.steps.run(
            "Show where each word came from",
            ["fairseq-knnlm", "explain", "--sources", sources, "--html", self.out / "explain.html"],
            show=r"alone|with memory|written to|(\|.*){8}",  # not the table of all tokens
        )

    def eval_lm(
        self, title: str, domain: str, split: str, options: list[object], show: str = ""
    ) -> None:
        """One run of ``fairseq-eval-lm`` over a split."""
        self.steps.run(
            title,
            ["fairseq-eval-lm", self.data(domain), *TASK]
            + ["--path", self.checkpoint, "--gen-subset", split, *options],
            show=show,
        )

    @property
    def checkpoint(self) -> Path:
        """The language model."""
        return self.out / "lm" / "checkpoint_best.pt"

    def data(self, domain: str) -> Path:
        """The folder that fairseq reads a domain from."""
        return self.out / "data" / domain


def beginnings(text: str) -> str:
    """Prompts, a line each: how the first long lines of a text begin."""
    lines = (line.split() for line in text.splitlines())
    long = [words[:GIVEN] for words in lines if len(words) >= LONG]
    return "".join(" ".join(words) + "\n" for words in long[:PROMPTS])


def row(domain: str, knn: dict[str, Any], best: dict[str, Any]) -> dict[str, Any]:
    """What ``results.json`` says of one domain."""
    _, neighbours = knn["weights"]  # the language model stands first
    return {
        "name": DOMAINS[domain],
        "tokens": knn["tokens"],
        "base_perplexity": knn["base_perplexity"],
        "knn_perplexity": knn["perplexity"],
        "lambda": neighbours["weight"],
        "temperature": neighbours["temperature"],
        "k": knn["k"],
        "best_perplexity": best["perplexity"],
        "best": f"{'+'.join(best['experts'])}, {best['mixer']}",
    }


def show_rows(rows: list[dict[str, Any]]) -> None:
    """Prints the rows for a person to read, and which mixture was best."""
    cells = []
    for found in rows:
        base, knn, best = (found[f"{name}_perplexity"] for name in ("base", "knn", "best"))
        cells.append(
            [found["name"], f"{found['tokens']:,}", f"{base:.2f}", f"{knn:.2f}"]
            + [f"{found['lambda']:.2f}", f"{found['temperature']:.3g}"]
            + [f"{best:.2f}", f"{best / base - 1:.1%}"]
        )
    show(["test text", "tokens", "base LM", "kNN-LM", "lambda", "T", "best", "change"], cells)
    print()
    for found in rows:
        print(f"best for the {found['name']}: {found['best']}")


def make_room(out: Path) -> None:
    """Empty ``out`` if an earlier run made it.

    Raises:
        RunError: where it holds something else.
    """
    mark = out / ".demo"
    if out.exists() and any(out.iterdir()):
        if not mark.exists():
            raise RunError(f"{out} is not empty, and not of this demo; name another with --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    mark.touch()


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Train a small LM on Python's docstrings and give it a datastore.",
        epilog="example: python examples/demo.py --out demo",
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "demo", help="folder of all that is made (default: demo)"
    )
    parser.add_argument(
        "--updates", type=int, default=1600, help="training steps of the LM (default: 1600)"
    )
    args = parser.parse_args()

    out = args.out.resolve()
    os.chdir(ROOT)  # commands are shown as they are typed there
    out = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out
    print(f"About 8 minutes on two cores; this run uses {threads()}. Everything is in {out}/.")
    try:
        make_room(out)
        demo = Demo(out, args.updates)
        rows = demo.run()
    except RunError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    (out / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    print("\nPerplexity a token of test text; all was fitted on valid.\n")
    show_rows(rows)
    print(f"\n{clock(demo.steps.elapsed)} in all; the table is in {out}/results.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
