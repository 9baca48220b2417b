"""Text to pieces: a sentencepiece vocabulary, and fairseq's dictionary for it.

    python examples/demo_pieces.py --text demo/text --out demo/pieces --learn-from docstrings

The vocabulary is learned from one domain's training text and used for all of them. Bytes are
pieces too, so that no text, of whatever domain, holds an unknown.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
from demo_corpus import SPLITS


def learn(text: Path, prefix: Path, vocabulary: int) -> sentencepiece.SentencePieceProcessor:
    """Learn a vocabulary from ``text``, a paragraph a line; writes ``prefix.model``."""
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(prefix),
        vocab_size=vocabulary,
        character_coverage=1.0,
        byte_fallback=True,
        max_sentence_length=1 << 20,
        num_threads=1,  # the sums come out the same every time
        minloglevel=1,
    )
    return sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")


def encode(model: sentencepiece.SentencePieceProcessor, text: Path) -> Iterator[list[str]]:
    """Yield the pieces of each line of ``text``."""
    for line in text.read_text(encoding="utf-8").splitlines():
        yield model.encode(line, out_type=str)


def write_dictionary(
    model: sentencepiece.SentencePieceProcessor, counts: Counter[str], path: Path
) -> None:
    """Write fairseq's ``dict.txt``: every piece, the frequent first, as adaptive layers need.

    Left to itself fairseq would list the pieces that it meets in training text, and a byte met
    later would be unknown.
    """
    numbers = range(model.get_piece_size())
    pieces = [
        model.id_to_piece(n)
        for n in numbers
        if not (model.is_control(n) or model.is_unknown(n))  # fairseq has its own
    ]
    pieces.sort(key=lambda piece: -counts[piece])
    path.write_text("".join(f"{piece} {counts[piece]}\n" for piece in pieces), encoding="utf-8")


def write_pieces(model: sentencepiece.SentencePieceProcessor, text: Path, folder: Path) -> int:
    """Write ``text`` as pieces, and return its number of tokens: the pieces and line ends."""
    lines = list(encode(model, text))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / text.name).write_text(
        "".join(" ".join(line) + "\n" for line in lines), encoding="utf-8"
    )
    return sum(len(line) + 1 for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Split text into pieces for fairseq-preprocess.",
        epilog="example: python examples/demo_pieces.py --text demo/text --out demo/pieces",
    )
    parser.add_argument("--text", type=Path, required=True, help="folder of DOMAIN/SPLIT.txt")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the same in")
    parser.add_argument(
        "--learn-from", default="docstrings", help="domain of the vocabulary (default: docstrings)"
    )
    parser.add_argument("--vocabulary", type=int, default=4000, help="pieces (default: 4000)")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    source = args.text / args.learn_from / "train.txt"
    model = learn(source, args.out / "sentencepiece", args.vocabulary)
    counts = Counter(piece for line in encode(model, source) for piece in line)
    write_dictionary(model, counts, args.out / "dict.txt")
    for domain in sorted(folder for folder in args.text.iterdir() if folder.is_dir()):
        sizes = {
            split: write_pieces(model, domain / f"{split}.txt", args.out / domain.name)
            for split in SPLITS
        }
        listed = ", ".join(f"{split} {size:,}" for split, size in sizes.items())
        print(f"{domain.name}: tokens in {listed}")


if __name__ == "__main__":
    main()
