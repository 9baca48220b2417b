"""The tiny world of the tests and of ``tools/faults.py``: a text in which there is something to
remember, and the commands that make a language model of it in seconds."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: The plugin, as people name it to fairseq.
PLUGIN = ("--user-dir", ROOT / "fairseq_knnlm", "--task", "knn_lm")
#: Blocks of 8 tokens after 8 of context, the same everywhere.
BLOCKS = ("--tokens-per-sample", "16", "--context-window", "8")
#: A decoder of two layers, 16 wide.
TINY = (
    *("--decoder-embed-dim", "16", "--decoder-input-dim", "16", "--decoder-output-dim", "16"),
    *("--decoder-ffn-embed-dim", "32", "--decoder-layers", "2", "--decoder-attention-heads", "2"),
)
#: Lines of the train split.
LINES = 300


def write_corpus(folder: Path, held_out: int = 40, test: int | None = None) -> dict[str, Path]:
    """Text in which the next word often follows from the last two: something to remember.

    Args:
        folder: to write ``train.txt``, ``valid.txt`` and ``test.txt`` in.
        held_out: lines of valid, and of test.
        test: lines of test, where they are not as many.

    Returns:
        The files by split.
    """
    rng = random.Random(7)
    words = [f"w{number}" for number in range(120)]
    follow = {(a, b): rng.choice(words) for a in words for b in words}
    sizes = {"train": LINES, "valid": held_out, "test": held_out if test is None else test}
    files = {split: folder / f"{split}.txt" for split in sizes}
    for split, lines in sizes.items():
        with files[split].open("w") as file:
            for _ in range(lines):
                line = rng.choices(words, weights=range(120, 0, -1), k=2)
                while len(line) < rng.randint(5, 15):
                    likely = follow[line[-2], line[-1]]
                    line.append(likely if rng.random() < 0.7 else rng.choice(words[:40]))
                file.write(" ".join(line) + "\n")
    return files


def preprocessing(files: Mapping[str, Path], data: Path) -> list[object]:
    """The command that binarises the splits."""
    text = [word for split, file in files.items() for word in (f"--{split}pref", file)]
    return ["fairseq-preprocess", "--only-source", *text, "--destdir", data]


def training(data: Path, folder: Path, *flags: object) -> list[object]:
    """The command that trains a language model into a folder.

    Args:
        data: what ``preprocessing`` made.
        folder: of ``checkpoint_last.pt``.
        flags: task, architecture, ``--max-update``.
    """
    return [
        *("fairseq-train", data, *flags, "--cpu", "--optimizer", "adam", "--lr", "0.01"),
        *("--tokens-per-sample", 16, "--sample-break-mode", "none", "--max-tokens", 512),
        *("--seed", 1, "--save-dir", folder, "--no-epoch-checkpoints"),
        *("--disable-validation", "--num-workers", 0),
    ]
