"""Where the probabilities of a text come from: who is asked while it is scored, and what is kept.

The text is scored as ever; what is said of each token is looked at before the next ones are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.explanation.attribution import bits_moved
from fairseq_knnlm.explanation.record import Explained, Guess, Run, Token, Voice
from fairseq_knnlm.explanation.record_file import Record
from fairseq_knnlm.lm.contexts import Contexts
from fairseq_knnlm.mixture.model import MixturePrediction
from fairseq_knnlm.mixture.shares import Shares
from fairseq_knnlm.runs.experts import make_scorer
from fairseq_knnlm.runs.inputs import Inputs
from fairseq_knnlm.runs.mixing import describe
from fairseq_knnlm.runs.scorer import Blocks, KnnScorer
from fairseq_knnlm.runs.sources import BEFORE, Asked, Sources
from fairseq_knnlm.runs.token_spelling import AnySpelling
from fairseq_knnlm.versions import versions

#: Sources a token, unless told.
SOURCES = 8
#: The likeliest tokens that are named.
GUESSES = 5
#: Probabilities over the vocabulary that are held at a time, of all that is mixed.
PROBABILITIES_AT_A_TIME = 2**24
#: Contexts at a time at most.
CONTEXTS_AT_A_TIME = 256
#: Texts and tokens, padding included, that the language model reads at a time.
TEXTS_AT_A_TIME, TOKENS_AT_A_TIME = 64, 8192


@dataclass(frozen=True)
class Span:
    """Tokens of a text, of which some are explained.

    Attributes:
        tokens: ids, those explained and all that stand before these and are known.
        start: the row of the first of them.
        rows: that are explained.
    """

    tokens: Sequence[int]
    start: int
    rows: range

    def before(self, row: int) -> Sequence[int]:
        """The tokens before a row, the last ``BEFORE`` at most."""
        place = row - self.start
        return self.tokens[max(place - BEFORE, 0) : place]

    @property
    def explained(self) -> Sequence[int]:
        """The tokens that are explained."""
        return self.tokens[self.rows.start - self.start : self.rows.stop - self.start]


@dataclass(frozen=True)
class SplitRows:
    """Rows of a split, and what is read for their sake.

    Attributes:
        name: of the split and the rows.
        blocks: where the blocks of the split lie.
        batches: of fairseq's, in the order of the text.
        span: the rows.
    """

    name: str
    blocks: Blocks
    batches: Iterable[dict[str, Any]]
    span: Span


def explain_rows(
    inputs: Inputs, spelling: AnySpelling, rows: SplitRows, *, sources: int = SOURCES
) -> Record:
    """Explains rows of a split, with the probabilities that an evaluation of it gives them.

    Args:
        inputs: options, models, memory.
        spelling: of the tokens.
        rows: of the split.
        sources: a token, at most.

    Raises:
        KnnlmError: as ``make_scorer``; ``DatastoreError`` also where documents are damaged.
    """
    scorer = make_scorer(inputs, rows.blocks)
    watching = Watching(scorer, spelling, Sources(inputs.memory, spelling, sources))

    def texts() -> Iterator[Explained]:
        watching.begin([rows.span])
        for batch in rows.batches:
            scorer.generate(inputs.models, batch)
        yield watching.explained(0, rows.name, len(rows.span.rows))

    return Record(watching.run(inputs), texts())


def explain_texts(
    inputs: Inputs,
    spelling: AnySpelling,
    sequences: Sequence[Sequence[int]],
    given: Sequence[int] | None = None,
    *,
    names: Sequence[str] | None = None,
    sources: int = SOURCES,
) -> Record:
    """Explains texts, each by itself, with the probabilities of the hub interface's ``score``.

    Args:
        inputs: options, models, memory.
        spelling: of the tokens.
        sequences: token ids of each text, without what fairseq puts before it.
        given: how many tokens of each were given, not written; all where left out.
        names: of the texts; their numbers where left out, from 1 on.
        sources: a token, at most.

    Returns:
        The record; texts are scored a batch at a time when they are asked for.

    Raises:
        ConfigError: where a text is empty or longer than the model takes.
        KnnlmError: as ``make_scorer``; ``DatastoreError`` also where documents are damaged.
    """
    check_lengths(inputs, sequences)
    scorer = make_scorer(inputs)
    watching = Watching(scorer, spelling, Sources(inputs.memory, spelling, sources))
    device = next(inputs.models[0].parameters()).device

    def texts() -> Iterator[Explained]:
        for batch in _batches(sequences):
            read = [sequences[number] for number in batch]
            watching.begin([Span(tokens, 0, range(len(tokens))) for tokens in read])
            scorer.generate(inputs.models, _sample(inputs, read, device))
            for place, number in enumerate(batch):
                name = names[number] if names is not None else str(number + 1)
                count = len(sequences[number]) if given is None else given[number]
                yield watching.explained(place, name, count)

    return Record(watching.run(inputs), texts())


def check_lengths(inputs: Inputs, sequences: Sequence[Sequence[int]]) -> None:
    """Refuses texts that the model cannot read.

    Raises:
        ConfigError: where one is empty or longer than the model's positions.
    """
    most = min(model.max_positions() for model in [*inputs.models, *inputs.others.values()])
    for number, tokens in enumerate(sequences, start=1):
        if not 0 < len(tokens) <= most:
            one = "the text" if len(sequences) == 1 else f"text {number:,}"
            raise ConfigError(
                f"{one} is longer than the model reads" if len(tokens) else f"{one} is empty",
                expected=f"1 to {most:,} tokens, the model's positions",
                found=f"{len(tokens):,} tokens",
                do=f"leave out its first {len(tokens) - most:,} tokens, or binarise it with "
                "fairseq-preprocess and explain --rows of that, which may have any length"
                if len(tokens)
                else "give at least a word",
            )


def _batches(sequences: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Numbers of consecutive texts that are read together."""
    batch: list[int] = []
    longest = 0
    for number, tokens in enumerate(sequences):
        wide = max(longest, len(tokens))
        full = len(batch) == TEXTS_AT_A_TIME or wide * (len(batch) + 1) > TOKENS_AT_A_TIME
        if batch and full:
            yield batch
            batch, wide = [], len(tokens)
        batch.append(number)
        longest = wide
    if batch:
        yield batch


def _sample(
    inputs: Inputs, sequences: Sequence[Sequence[int]], device: torch.device
) -> dict[str, Any]:
    """A batch as fairseq makes it for its hub interface: each text after what begins one."""
    vocabulary = inputs.vocabulary
    first = vocabulary.eos if vocabulary.bos is None else vocabulary.bos
    size, width = len(sequences), max(map(len, sequences))
    source, target = (torch.full((size, width), vocabulary.pad) for _ in range(2))
    for row, tokens in enumerate(sequences):
        target[row, : len(tokens)] = torch.tensor(tokens)
        source[row, : len(tokens)] = torch.tensor([first, *tokens[:-1]])
    lengths = torch.tensor([len(tokens) for tokens in sequences])
    return {
        "id": torch.arange(size, device=device),
        "net_input": {"src_tokens": source.to(device), "src_lengths": lengths.to(device)},
        "target": target.to(device),
    }


@dataclass
class Watching:
    """Is shown what a scorer says of each token, and keeps a record of those that are wanted.

    Args:
        scorer: whose ``watch`` this becomes.
        spelling: of the tokens.
        sources: finds them.

    Attributes:
        at_a_time: contexts that it is shown at a time: it asks for the whole vocabulary of each.
    """

    scorer: KnnScorer
    spelling: AnySpelling
    sources: Sources
    _spans: Sequence[Span] = ()
    _pieces: Sequence[Sequence[str]] = ()
    _tokens: dict[tuple[int, int], Token] = field(default_factory=dict)

    def __post_init__(self) -> None:
        columns = 2 + len(self.scorer.mixture.mixer.components)
        held = columns * len(self.spelling.vocabulary.symbols)
        self.at_a_time = max(1, min(CONTEXTS_AT_A_TIME, PROBABILITIES_AT_A_TIME // held))
        self.scorer.watch = self

    def begin(self, spans: Sequence[Span]) -> None:
        """What will be read next: spans of one text each, or of the one that is read."""
        self._spans = spans
        self._pieces = [self.spelling.pieces(span.explained) for span in spans]
        self._tokens = {}

    def explained(self, text: int, name: str, given: int) -> Explained:
        """One of the texts that were read."""
        tokens = [self._tokens.pop((text, row)) for row in self._spans[text].rows]
        return Explained(name, given, tokens)

    def run(self, inputs: Inputs) -> Run:
        """What all texts have in common."""
        mixture = describe(self.scorer.mixture.mixer)
        if self.scorer.mixture_from:
            mixture = f"{mixture} ({self.scorer.mixture_from})"
        return Run(inputs.model, mixture, self.sources.memories, versions())

    def __call__(self, contexts: Contexts, tokens: Tensor, prediction: MixturePrediction) -> None:
        """Looks at N contexts and what came after them (N,)."""
        wanted = self._wanted(contexts)
        if not wanted:
            return
        places = list(wanted)
        targets = tokens.tolist()
        asked = {
            place: Asked(targets[place], self._spans[text].before(row), query)
            for (place, (text, row)), query in zip(
                wanted.items(), _queries(contexts, places), strict=True
            )
        }
        traced = self.sources.of(prediction.found(), asked)
        shares = prediction.shares(tokens)
        parts = _parts(shares)
        mixture_guesses = self._guesses(prediction.log_probs(), contexts)
        lm = self.scorer.mixture.lm.predict(contexts).log_probs(0)
        assert isinstance(lm, Tensor)
        lm_guesses = self._guesses(lm, contexts)
        for place, (text, row) in wanted.items():
            voices, mixed = parts[place]
            sources = traced[place]
            self._tokens[text, row] = Token(
                text=self._pieces[text][row - self._spans[text].rows.start],
                symbol=self.spelling.vocabulary.symbols[targets[place]],
                lm=voices[0].log_prob,
                mixture=mixed,
                voices=voices,
                lm_guesses=lm_guesses[place],
                mixture_guesses=mixture_guesses[place],
                sources=sources.sources,
                agreement=sources.agreement,
                place=sources.place,
            )

    def _wanted(self, contexts: Contexts) -> dict[int, tuple[int, int]]:
        """Of the contexts that are explained, by their place, text and row."""
        rows = contexts.rows.tolist()
        texts = [0] * len(rows) if contexts.texts is None else contexts.texts.tolist()
        pairs = enumerate(zip(texts, rows, strict=True))
        return {place: (text, row) for place, (text, row) in pairs if row in self._spans[text].rows}

    def _guesses(self, log_probs: Tensor, contexts: Contexts) -> list[list[Guess]]:
        """The likeliest tokens of each of N contexts, from (N, V)."""
        likeliest = log_probs.topk(min(GUESSES, log_probs.shape[1]), dim=1)
        rows = zip(
            contexts.before[:, 0].tolist(),
            likeliest.indices.tolist(),
            likeliest.values.exp().clamp(0, 1).tolist(),
            strict=True,
        )
        return [
            [
                Guess(self._after(before, token), probability)
                for token, probability in zip(tokens, probabilities, strict=True)
            ]
            for before, tokens, probabilities in rows
        ]

    def _after(self, before: int, token: int) -> str:
        """A token's text, after another one."""
        known = [before] if before >= 0 else []
        return self.spelling.pieces([*known, token])[-1]


def _queries(contexts: Contexts, places: Sequence[int]) -> Iterable[np.ndarray | None]:
    """(D,) float32 of each of these contexts."""
    if contexts.keys is None:
        return [None] * len(places)
    return list(contexts.keys[places].float().cpu().numpy())


def _parts(shares: Shares) -> list[tuple[list[Voice], float | None]]:
    """The experts' parts, and log p of the mixture, of each of N tokens."""
    weights, spoken = (part.cpu().double() for part in (shares.weights, shares.log_probs))
    quiet = spoken.masked_fill(spoken.isnan(), -torch.inf)
    mixed = (weights.log() + quiet).logsumexp(dim=1).tolist()
    moved = bits_moved(weights.numpy(), spoken.numpy()).tolist()
    return [
        (
            [
                Voice(name, min(weight, 1.0), _number(log_prob), bits)
                for name, weight, log_prob, bits in zip(shares.experts, *columns, strict=True)
            ],
            _number(log_prob),
        )
        for *columns, log_prob in zip(weights.tolist(), spoken.tolist(), moved, mixed, strict=True)
    ]


def _number(log_prob: float) -> float | None:
    """A log-probability as JSON has it; None where the probability is 0, or there is none."""
    return log_prob if math.isfinite(log_prob) else None
