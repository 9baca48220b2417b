"""The text that tokens are of: its words and bytes, over which figures of any vocabulary compare.

A perplexity a token says how the tokens were cut, too. A word or a byte of the text itself is the
same for everybody: lm-evaluation-harness divides by these.
"""

from __future__ import annotations

import html
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fairseq_knnlm.errors import ConfigError

#: Lines of a raw text that are compared with the split's, evenly spread.
COMPARED = 2000
#: Letters that stand side by side, of which a line is made up where it is compared.
SIDE_BY_SIDE = 4
#: Share of these that a raw text has in common with the split at least. Of two texts of one
#: language it is a tenth; of one text, cut or cleaned in several ways, nearly all.
LEAST = 0.5
#: The largest mean loss, in nats, whose exponential a float holds.
MOST_NATS = 709.0


@dataclass(frozen=True)
class RawText:
    """What figures a word and a byte are taken over.

    Attributes:
        source: ``"raw text"``, that of ``--raw-text``, or ``"pieces of words, joined"``.
        words: what white space separates.
        bytes: in UTF-8, line ends included.
        unknown: tokens that the dictionary does not have. Their probability is that of being
            unknown, not of the word that stands in the text.
        agreement: share of the letters of a raw text that the split has too.
    """

    source: str
    words: int
    bytes: int
    unknown: int
    agreement: float | None = None


def spelled_lines(tokens: np.ndarray, eos: int, write: Callable[[Iterable[int]], str]) -> list[str]:
    """The lines of a text.

    Args:
        tokens: (N,) of the whole text.
        eos: the id that ends a line.
        write: the tokens of a line as text.
    """
    lines = np.split(tokens, np.flatnonzero(tokens == eos) + 1)
    lines = lines if len(lines[-1]) else lines[:-1]
    return [write(line[line != eos].tolist()).rstrip() for line in lines]


def joined_text(lines: Sequence[str], unknown: int) -> RawText:
    """Of lines that were put together of pieces of words."""
    words = sum(len(line.split()) for line in lines)
    size = sum(len(line.encode()) + 1 for line in lines)
    return RawText("pieces of words, joined", words, size, unknown)


def raw_text(path: Path, split: str, lines: Sequence[str], unknown: int) -> RawText:
    """Of a file that holds the text before it was cut into tokens.

    Args:
        path: the file.
        split: name of the split that is evaluated.
        lines: of the split, put together of its tokens.
        unknown: of its tokens, those that the dictionary does not have.

    Raises:
        ConfigError: where it cannot be read, or is another text: of more or fewer lines, or of
            other letters.
    """
    raw = read_lines(path)
    if len(raw) != len(lines):
        raise another_text(path, split, f"{len(lines):,} lines", f"{len(raw):,}")
    agreement = agree(raw, lines)
    if agreement < LEAST:
        raise another_text(
            path, split, "the same letters, line by line", f"{agreement:.0%} of them in common"
        )
    words = sum(len(line.split()) for line in raw)
    return RawText("raw text", words, path.stat().st_size, unknown, agreement)


def check_raw_text(path: Path) -> None:
    """Refuses what is no text, before anything is opened.

    Raises:
        ConfigError: where there is no file.
    """
    if not path.is_file():
        raise ConfigError(
            f"--raw-text {path} cannot be read",
            expected="the text of the split before it was cut into tokens",
            found="a folder" if path.is_dir() else "no such file",
            do="check the path",
        )


def read_lines(path: Path) -> list[str]:
    """The lines of a text.

    Raises:
        ConfigError: where there is none, or it is not in UTF-8.
    """
    check_raw_text(path)
    try:
        with path.open(encoding="utf-8") as file:  # \r\n ends a line too, as for fairseq
            return file.read().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--raw-text {path} cannot be read",
            expected="text in UTF-8",
            found=f"{error.reason} at byte {error.start:,}",
            do="name the text that fairseq-preprocess read, or what that was made of",
        ) from None


def another_text(path: Path, split: str, expected: str, found: str) -> ConfigError:
    """What a user is told of a text of another split."""
    return ConfigError(
        f"--raw-text {path} is not the text of {split}",
        expected=f"{expected}, as in the split",
        found=found,
        do="name the text that the split was made of, with the same lines",
    )


def agree(raw: Sequence[str], lines: Sequence[str]) -> float:
    """The share of letters side by side that two texts of as many lines have in common, by lines.

    Spaces, punctuation, case and how words were cut do not count.
    """
    numbers = [number for number, line in enumerate(raw) if line.strip() or lines[number].strip()]
    chosen = np.linspace(0, len(numbers) - 1, min(COMPARED, len(numbers))).astype(np.int64)
    common = whole = 0
    for place in chosen.tolist():
        ours, theirs = (_grams(some[numbers[place]]) for some in (raw, lines))
        common += (ours & theirs).total()
        whole += max(ours.total(), theirs.total())
    return common / whole if whole else 1.0


def _grams(line: str) -> Counter[str]:
    letters = [x for x in unicodedata.normalize("NFKC", html.unescape(line)) if x.isalnum()]
    text = "".join(letters).casefold()
    places = range(max(1, len(text) - SIDE_BY_SIDE + 1)) if text else ()
    return Counter(text[place : place + SIDE_BY_SIDE] for place in places)


def text_figures(
    text: RawText | None, base_log_prob: float, log_prob: float, *, whole: bool = True
) -> dict[str, Any]:
    """Figures over the text itself; none where it is not known.

    Args:
        text: what they are taken over.
        base_log_prob, log_prob: sums over all its tokens, natural log.
        whole: False of a share of the text, whose figures are not told.
    """
    if text is None:
        return {}
    found: dict[str, Any] = {"text": asdict(text)}
    for prefix, total in (("base_", base_log_prob), ("", log_prob)):
        words, size = (_mean(total, over) if whole else None for over in (text.words, text.bytes))
        found[f"{prefix}word_perplexity"] = _exp(words)
        found[f"{prefix}byte_perplexity"] = _exp(size)
        found[f"{prefix}bits_per_byte"] = None if size is None else size / math.log(2)
    return found


def _mean(total: float, over: int) -> float | None:
    return -total / over if over and math.isfinite(total) else None


def _exp(nats: float | None) -> float | None:
    return None if nats is None or nats > MOST_NATS else math.exp(nats)
