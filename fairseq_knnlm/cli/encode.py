"""``fairseq-knnlm encode``: raw text as fairseq's binary files, by the tokenizer of a model."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fairseq_knnlm.bounds import check_range
from fairseq_knnlm.cli.dictionary import dictionary_file
from fairseq_knnlm.errors import ConfigError, OutputError
from fairseq_knnlm.files import check_outputs
from fairseq_knnlm.runs.text_files import BLANK, check_texts, named_splits

if TYPE_CHECKING:
    from fairseq_knnlm.runs.encoded import Split

HELP = "make fairseq's binary files of raw text, by sentencepiece or a tokenizer of transformers"
EXAMPLE = (
    "text/train.txt text/valid.txt text/test.txt --tokenizer sentencepiece.model --out data-bin "
    "--workers 4"
)
MOST_WORKERS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The text, what cuts it, and where to."""
    parser.add_argument(
        "texts",
        nargs="+",
        metavar="TEXT",
        help="text of a split, in a file that is called as the split (train.txt, valid.txt), or "
        "SPLIT=FILE; a folder is its files, each a document; several of a split follow each other",
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        type=Path,
        metavar="TOKENIZER",
        help="model of sentencepiece; or the folder of a model of transformers, or what `wrap` "
        "made of it",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DATA", help="folder to write")
    parser.add_argument(
        "--srcdict",
        type=Path,
        metavar="DICT",
        help="dictionary to use, such as that of a trained model, or the data with it (default: of "
        "all that the tokenizer has, the frequent first in train)",
    )
    parser.add_argument(
        "--document-separator",
        metavar="LINE",
        help=f"line that stands between two documents of a file; {BLANK} for empty ones (default: "
        f"{BLANK} with sentencepiece; else each file is a document)",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")


def check(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Refuses what can be refused before a library is loaded."""
    check_range("--workers", args.workers, 1, MOST_WORKERS, "counts processes")
    _check_tokenizer(args.tokenizer)
    splits = named_splits(args.texts)
    check_texts(splits)
    if args.srcdict is not None:
        _check_dictionary(args.srcdict)
    elif not args.tokenizer.is_dir() and "train" not in splits:
        raise ConfigError(
            "nothing tells which pieces are frequent, as a dictionary has them",
            expected="text of train, or --srcdict with the dictionary of a trained model",
            found=f"text of {', '.join(splits)}",
        )
    _check_out(args.out)


def _check_tokenizer(path: Path) -> None:
    if not path.is_file() and not path.is_dir():
        raise ConfigError(
            f"no tokenizer at {path}",
            expected="--tokenizer with a model of sentencepiece, or a folder of transformers",
            found="no such file",
            do="check the path",
        )


def _check_dictionary(path: Path) -> None:
    if not dictionary_file(path).is_file():
        raise ConfigError(
            f"no dictionary at {path}",
            expected="--srcdict with a dict.txt, or a folder with one",
            found="a folder without dict.txt" if path.is_dir() else "no such file",
            do="check the path",
        )


def _check_out(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        if any(path.iterdir()):
            raise OutputError(
                f"--out {path} is not empty",
                expected="a folder that is new, or empty",
                found=f"{sum(1 for _ in path.iterdir()):,} files or folders in it",
                do="name another folder, or remove what is there",
            )
    elif path.exists() or path.is_symlink():
        raise OutputError(
            f"--out {path} is no folder",
            expected="a folder that is new, or empty",
            found="a file or a link",
            do="name another folder",
        )
    else:
        check_outputs({"--out": path})


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Encodes the text, and says what it came to."""
    import fairseq_knnlm.tasks  # noqa: F401  before fairseq, of which it keeps noise off the screen
    from fairseq_knnlm.tasks.encoding import Asked, encode

    srcdict = dictionary_file(args.srcdict) if args.srcdict is not None else None
    splits = named_splits(args.texts)
    asked = Asked(splits, args.tokenizer, srcdict, args.document_separator, args.workers)
    encoding = encode(asked, args.out)
    _report(encoding.splits, "documents" if encoding.by_documents else "lines")
    print(f"written to {args.out}")


def _report(splits: Mapping[str, Split], items: str) -> None:
    for name, split in splits.items():
        print(
            f"{name}: {split.tokens:,} tokens of {split.words:,} words, {split.bytes:,} bytes, "
            f"in {split.items:,} {items}"
        )
        if split.unknown:
            print(f"  {split.unknown:,} tokens are not in the dictionary")
        if split.changed:
            print(
                f"  {split.changed:,} {items} come back as another text: the tokenizer alters what "
                "it reads"
            )
