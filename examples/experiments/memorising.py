"""Can a model learn by heart what a datastore remembers? (Khandelwal et al., 2020, section 6.)

Goes on training a language model without dropout, until it knows its training text by heart, and
mixes it with the model as it was; beside that n-grams and nearest neighbours of the same text.
"""

import argparse
import sys
from pathlib import Path

from other_experts import report
from scores import command
from steps import Experiment, add_arguments, ended

EXAMPLE = """\
example: python examples/experiments/memorising.py data-bin --path checkpoint_best.pt
         --dstore DSTORE --out memorising --train-flags "$(cat flags)"

The flags are those the model was trained with, and how long to go on: --max-update 500.
"""
#: Nothing that keeps a model from learning its text by heart, and nothing of the run before.
BY_HEART = """
    --dropout 0 --attention-dropout 0 --activation-dropout 0 --weight-decay 0
    --disable-validation --no-epoch-checkpoints --finetune-from-model
""".split()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = command(__doc__, EXAMPLE)
    option = parser.add_argument
    option("data", type=Path, help="folder that fairseq-preprocess wrote")
    option("--path", type=Path, required=True, help="checkpoint of the language model")
    option("--dstore", type=Path, help="its datastore, with an index (default: made of train)")
    add_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    run = Experiment.of(args, steps=5 if args.dstore else 7)
    by_heart = run.train("by-heart", args.data, *BY_HEART, args.path, keep="last")
    known = {
        name: run.perplexity(f"known-{name}", args.data, checkpoint, "train")
        for name, checkpoint in (("as it was", args.path), ("by heart", by_heart))
    }
    store = args.dstore or run.datastore("train", args.data, args.path)
    experts = ["--experts", "knn,ngram,lm2", "--expert-lm", by_heart]
    scores = run.scores("scores", args.data, args.path, store, *experts)
    print("\nperplexity on train: " + ", ".join(f"{x:.2f} {name}" for name, x in known.items()))
    print()
    report(scores, args.out / "memorising.png")


if __name__ == "__main__":
    sys.exit(ended(main))
