"""From probabilities that others published to a score table, which ``tune`` and ``report`` take.

The first column stands where the language model stands. To the others come the experts that need
the text alone: the text read so far, which fades, and n-grams of a training text; and features that
need only the past.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fairseq_knnlm.calibration.past import past_features
from fairseq_knnlm.calibration.settings import COMPLETE
from fairseq_knnlm.calibration.writer import ScoreTableWriter
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.experts import history
from fairseq_knnlm.experts.kneser_ney import NGramModel
from fairseq_knnlm.files import check_outputs, fingerprint
from fairseq_knnlm.mixture.components import searches
from fairseq_knnlm.runs.column_files import ColumnFile, read_column, read_words
from fairseq_knnlm.runs.places import check_apart
from fairseq_knnlm.versions import versions

#: Tokens of the longest n-grams.
ORDER = 5
NGRAM = "ngram"
#: Columns of a score table that are no expert's.
TAKEN = ("row", "token", "context", "card")
#: The half-life at which it is told how the text read so far did: the middle one.
HALF_LIFE = history.HALF_LIVES[len(history.HALF_LIVES) // 2]


@dataclass(frozen=True)
class ColumnsOptions:
    """What a score table of columns is made of.

    Attributes:
        words: a tokenised text, N words.
        columns: the files, the first of which stands where the language model stands.
        out: the score table to write.
        training_text: to count n-grams in; None for none.
        suffixes: ask the expert of suffixes, too.
        line_end: a word at the end of every line that the texts leave out; empty for none.
        base: of the columns' logarithms.
    """

    words: Path
    columns: Sequence[ColumnFile]
    out: Path
    training_text: Path | None = None
    suffixes: bool = False
    line_end: str = ""
    base: float = math.e


@dataclass(frozen=True)
class Scored:
    """An expert, and all that it said of the text.

    Attributes:
        log_probs: (N, S) float32, natural log.
        settings: S of them.
        described: what it is, for the card.
        features: by name, (N, M) float32.
        judged: (N, J) of the columns, those whose past is a feature.
    """

    log_probs: np.ndarray
    settings: list[dict[str, Any]]
    described: dict[str, Any]
    features: dict[str, np.ndarray]
    judged: np.ndarray


def check_options(options: ColumnsOptions) -> None:
    """Refuses names that no column can have, and to write over what is read.

    Raises:
        ConfigError: naming the column.
        OutputError: where ``out`` cannot be written, or is read.
    """
    names = [one.name for one in options.columns]
    for name in names:
        if not re.fullmatch(r"[a-z][a-z0-9]{0,31}", name):
            raise ConfigError(
                f"--column cannot be named {name!r}",
                expected="small letters and digits, a letter first, as in moe2=FILE",
                found=name,
            )
        if name in (*COMPLETE, *TAKEN) or searches(name):
            raise ConfigError(
                f"--column cannot be named {name!r}, which a score table has for something else",
                expected="another name",
                found=name,
            )
        if names.count(name) > 1:
            raise ConfigError(
                f"two columns are named {name!r}",
                expected="a name for each",
                found=", ".join(names),
            )
    read = {"WORDS": [options.words], "--column": [one.path for one in options.columns]}
    if options.training_text is not None:
        read["--training-text"] = [options.training_text]
    check_apart({"--out": options.out}, read)
    check_outputs({"--out": options.out})


def make_table(options: ColumnsOptions) -> dict[str, float]:
    """Writes the score table.

    Returns:
        The perplexity of each column, by its name.

    Raises:
        TableError: where a column is none of the text.
    """
    words = read_words(options.words, options.line_end)
    columns = {one.name: read_column(one, words, options.base) for one in options.columns}
    training = options.training_text
    trained = read_words(training, options.line_end) if training is not None else []
    known: dict[str, int] = {}
    counted, tokens = (
        np.array([known.setdefault(word, len(known)) for word in text], np.int64)
        for text in (trained, words)
    )
    (base, lm), *others = columns.items()
    experts = {name: _column(name, column) for name, column in others}
    experts[history.NAME] = _history(tokens)
    if options.suffixes:
        experts["suffix"] = _suffixes(tokens)
    if trained:
        experts[NGRAM] = _ngrams(counted, tokens)
    _write(options, tokens, base, lm, experts)
    return {name: math.exp(-column.mean(dtype=np.float64)) for name, column in columns.items()}


def _column(name: str, column: np.ndarray) -> Scored:
    alone = column[:, None]
    return Scored(alone, [{}], {"column": name}, {}, alone)


def _history(tokens: np.ndarray) -> Scored:
    found = history.history(tokens)
    judged = [setting["half_life"] == HALF_LIFE for setting in found.settings]
    return Scored(found.log_probs, found.settings, {}, found.features, found.log_probs[:, judged])


def _suffixes(tokens: np.ndarray) -> Scored:
    """What followed the longest suffixes of the text read so far. It needs torch."""
    import torch

    from fairseq_knnlm.experts.suffix import HALF_LIVES, WINDOW, SuffixSetting, read_through

    settings = [SuffixSetting(half_life) for half_life in HALF_LIVES]
    log_probs, features = read_through(torch.from_numpy(tokens), settings, window=WINDOW)
    found = {name: feature.numpy().reshape(len(tokens), -1) for name, feature in features.items()}
    column = log_probs.numpy()
    described = {"window": WINDOW, "reset": False}
    return Scored(column, [asdict(one) for one in settings], described, found, column[:, :1])


def _ngrams(counted: np.ndarray, tokens: np.ndarray) -> Scored:
    """A Kneser-Ney model of the training text. What stands in that nowhere it gives nothing."""
    types = int(counted.max()) + 1
    model = NGramModel.count(counted, types, ORDER)
    inside = np.where(tokens < types, tokens, -1)
    padded = np.concatenate([np.full(ORDER - 1, -1), inside[:-1]])
    after = model.after(np.lib.stride_tricks.sliding_window_view(padded, ORDER - 1))
    log_probs = np.where(inside < 0, -np.inf, after.log_prob(inside.clip(0))).astype(np.float32)
    features = {
        f"{NGRAM}_{name}": feature.astype(np.float32)[:, None]
        for name, feature in (
            ("length", after.lengths),
            ("count", after.counts),
            ("types", after.types),
        )
    }
    alone = log_probs[:, None]
    described = {"order": ORDER, "tokens": len(counted)}
    return Scored(alone, [{"order": ORDER}], described, features, alone)


def _write(
    options: ColumnsOptions,
    tokens: np.ndarray,
    base: str,
    lm: np.ndarray,
    experts: dict[str, Scored],
) -> None:
    judged = {name: expert.judged for name, expert in experts.items()}
    features = past_features(tokens, lm, judged)
    for expert in experts.values():
        features |= expert.features
    ids = tokens.astype(np.int32)
    writer = ScoreTableWriter(options.out)
    writer.write(
        {
            "row": np.arange(len(lm)),
            "token": ids,
            "context": np.concatenate([np.array([-1], np.int32), ids[:-1]]),
            "lm": lm,
            **{name: expert.log_probs for name, expert in experts.items()},
            **features,
        }
    )
    loss = -float(lm.mean(dtype=np.float64))
    writer.publish(
        {
            "split": options.words.name,
            "model": fingerprint({"column": base}),
            "experts": {name: expert.settings for name, expert in experts.items()},
            "described": {
                "lm": {"column": base},
                **{name: expert.described for name, expert in experts.items()},
            },
            "features": list(features),
            "tokens": len(lm),
            "base_loss": loss / math.log(2),
            "base_perplexity": math.exp(loss),
            "versions": versions(),
        }
    )
