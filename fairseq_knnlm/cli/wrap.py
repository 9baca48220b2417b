"""``fairseq-knnlm wrap``: a model of Hugging Face transformers as a checkpoint of fairseq's."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

HELP = "make a fairseq checkpoint of a language model of Hugging Face transformers"
EXAMPLE = "--hf gpt2 --out gpt2-wrapped"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Two folders, and how the model is read."""
    parser.add_argument(
        "--hf",
        required=True,
        type=Path,
        metavar="FOLDER",
        help="of the model and its tokenizer, as save_pretrained writes it",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="FOLDER",
        help="to write: checkpoint.pt, dict.txt and tokenizer.json",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="type of the weights (default: as they are)",
    )
    parser.add_argument(
        "--knn-module",
        metavar="NAME",
        help="module whose input is the key, such as model.layers.31.mlp (default: the last "
        "block's MLP, where the family is known)",
    )


def check(_: argparse.Namespace, __: Sequence[str]) -> None:
    """The folder is looked at before anything is loaded."""


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Says what was made, and what to type with it."""
    from fairseq_knnlm.runs.wrapping import wrap

    found = wrap(args.hf, args.out, args.dtype, args.knn_module)
    print(
        f"{args.out}/checkpoint.pt: {found['family']}, {found['parameters']:,} numbers in "
        f"{found['dtype']}, {found['vocabulary']:,} tokens, texts of up to {found['longest']:,}"
    )
    print(
        f"text: fairseq-knnlm encode train.txt valid.txt test.txt --tokenizer {args.out} --out DATA"
    )
    print(f"model: --path {args.out}/checkpoint.pt")
