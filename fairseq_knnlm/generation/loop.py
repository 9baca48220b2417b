"""Texts that go on: read, choose, draft, check.

With drafts a step reads several tokens at once and chooses a token at each. Those of the draft that
were chosen anyway are kept, with the first one that was not; the rest is taken back. A draft is one
sequence, not a distribution, so taking a drawn token only where it is the draft's is what
speculative sampling comes to (Leviathan et al., 2023): the text is distributed as without drafts,
and the same where the likeliest token is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fairseq_knnlm.generation.choosing import Decoding
from fairseq_knnlm.generation.drafts import Draft, Drafts
from fairseq_knnlm.generation.writer import Writer
from fairseq_knnlm.mixture.model import MixturePrediction


@dataclass(frozen=True)
class Length:
    """How far a text goes on.

    Attributes:
        most: new tokens.
        least: before it may end.
        end: the id that ends it; None where nothing does.
        closed: whether it ends with that id in any case, its last token otherwise.
    """

    most: int
    least: int = 0
    end: int | None = None
    closed: bool = False


@dataclass
class Text:
    """A text that goes on.

    Attributes:
        length: how far it goes on.
        tokens: so far.
        given: how many of them were given.
        log_probs: of each, natural log; those that were given are left out unless asked for.
        draws: what decides at each new place.
    """

    length: Length
    tokens: list[int]
    given: int
    draws: Sequence[float]
    log_probs: list[float] = field(default_factory=list)

    @property
    def new(self) -> int:
        """Tokens that were not given."""
        return len(self.tokens) - self.given

    @property
    def ended(self) -> bool:
        """Whether it goes on no more."""
        return self.new >= self.length.most or (self.new > 0 and self.tokens[-1] == self.length.end)


@dataclass
class Counts:
    """What it took.

    Attributes:
        tokens: that were written.
        steps: forward passes, of a text each, but for those that read prompts.
        drafted: tokens of drafts.
        kept: of these.
    """

    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    kept: int = 0

    def add(self, drafts: Sequence[Draft], kept: Sequence[int]) -> None:
        """A step: what was tried in each text, and how many tokens were written."""
        self.tokens += sum(kept)
        self.steps += len(kept)
        self.drafted += sum(map(len, drafts))
        self.kept += sum(kept) - len(kept)


def go_on(
    writer: Writer,
    prompts: Sequence[Sequence[int]],
    begin: int,
    lengths: Sequence[Length],
    decoding: Decoding,
    *,
    score_given: bool = False,
    speculation: Drafts | None = None,
    first: int = 0,
    counts: Counts | None = None,
    told: Callable[[int], object] = lambda _: None,
) -> list[Text]:
    """Continues B texts.

    Args:
        writer: one that ``reads_ahead``.
        prompts: ids of each, none or more.
        begin: the id that stands before every text.
        lengths: how far each goes on.
        decoding: how tokens are chosen.
        score_given: say how likely the prompts were, too.
        speculation: makes drafts; None for none.
        first: number of the first text, among all.
        counts: is added to.
        told: of how many tokens were written, at every step.
    """
    texts = [
        Text(length, list(prompt), len(prompt), decoding.draws(number, length.most))
        for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True), first)
    ]
    going = [text for text in texts if text.length.most]
    counts = counts if counts is not None else Counts()
    if not going:
        return texts
    prediction = _begun(writer, going, begin, score_given)
    drafts = [Draft() for _ in going]
    while True:
        chosen, log_probs = _chosen(prediction, going, drafts, decoding)
        kept = _kept(going, drafts, chosen, log_probs)
        counts.add(drafts, kept)
        told(sum(kept))
        if speculation is not None:
            for draft, count in zip(drafts, kept, strict=True):
                speculation.learn(draft, count - 1)
        lasts = _lasts(drafts, kept)
        alive = [place for place, text in enumerate(going) if not text.ended]
        if not alive:
            return texts
        back = [len(draft) + 1 - count for draft, count in zip(drafts, kept, strict=True)]
        writer.forget(torch.tensor(back, device=writer.device))
        if len(alive) < len(going):
            writer.keep(torch.tensor(alive, device=writer.device))
        going = [going[place] for place in alive]
        drafts = [Draft() for _ in going]
        if speculation is not None:
            rows = [lasts[place] for place in alive]
            tried = speculation.of(prediction, rows, [text.tokens for text in going])
            # The last token of all needs no draft: it is chosen anyway.
            drafts = [
                draft.cut(text.length.most - text.new - 1)
                for draft, text in zip(tried, going, strict=True)
            ]
        read = [[text.tokens[-1], *one.tokens] for text, one in zip(going, drafts, strict=True)]
        prediction = writer.mixture.predict(writer.read(padded(read, writer.device)))


def padded(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(B, n) int64, -1 behind the last token of each."""
    longest = max(map(len, sequences))
    rows = [[*one, *[-1] * (longest - len(one))] for one in sequences]
    return torch.tensor(rows, device=device)


def _begun(
    writer: Writer, texts: Sequence[Text], begin: int, score_given: bool
) -> MixturePrediction:
    """Reads the prompts, and predicts what comes next."""
    writer.begin(len(texts))
    contexts = writer.read(padded([[begin, *text.tokens] for text in texts], writer.device))
    lengths = torch.tensor([text.given for text in texts], device=writer.device)
    last = contexts.rows == lengths[contexts.texts]
    if score_given:
        given = [token for text in texts for token in text.tokens]
        scores = writer.mixture.score(contexts[~last], torch.tensor(given, device=writer.device))
        parts = scores.log_probs.split([text.given for text in texts])
        for text, part in zip(texts, parts, strict=True):
            text.log_probs += part.tolist()
    else:
        writer.mixture.read(contexts[~last])
    return writer.mixture.predict(contexts[last])


def _chosen(
    prediction: MixturePrediction,
    texts: Sequence[Text],
    drafts: Sequence[Draft],
    decoding: Decoding,
) -> tuple[list[int], list[float]]:
    """A token behind every token that was read last, and its log p."""
    log_probs = prediction.log_probs()
    places = [
        (text, text.new + step)
        for text, draft in zip(texts, drafts, strict=True)
        for step in range(len(draft) + 1)
    ]
    for place, (text, new) in enumerate(places):
        length = text.length
        if length.end is not None and new < length.least:
            log_probs[place, length.end] = -torch.inf
        if length.closed and new == length.most - 1:
            assert length.end is not None
            log_probs[place, : length.end] = -torch.inf
            log_probs[place, length.end + 1 :] = -torch.inf
    chosen = decoding.choose(log_probs, [text.draws[new] for text, new in places])
    said = log_probs.gather(1, chosen[:, None]).squeeze(1)
    return chosen.tolist(), said.tolist()


def _kept(
    texts: Sequence[Text],
    drafts: Sequence[Draft],
    chosen: Sequence[int],
    log_probs: Sequence[float],
) -> list[int]:
    """Writes what is to be kept; how many tokens that are of each text."""
    kept, start = [], 0
    for text, draft in zip(texts, drafts, strict=True):
        count = 0
        for place, tried in enumerate([*draft.tokens, -1], start):
            count += 1
            text.tokens.append(chosen[place])
            text.log_probs.append(log_probs[place])
            if chosen[place] != tried or text.ended:
                break
        kept.append(count)
        start += len(draft) + 1
    return kept


def _lasts(drafts: Sequence[Draft], kept: Sequence[int]) -> list[int]:
    """The context that the last kept token of each text followed, among all that were read."""
    lasts, start = [], 0
    for draft, count in zip(drafts, kept, strict=True):
        lasts.append(start + count - 1)
        start += len(draft) + 1
    return lasts
