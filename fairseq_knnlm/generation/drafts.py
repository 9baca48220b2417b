"""What a text may go on with, guessed without the language model.

Two sources know how a text may go on: the text itself, where its last tokens stood before, and the
neighbours that were found for its last token, of which some have that very token and more text
behind it. Each proposes ways to go on; how far either is to be trusted is learned while it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.mixture.model import MixturePrediction
from fairseq_knnlm.retrieval.neighbours import Neighbours

#: Tokens of a draft at most.
LONGEST = 8
#: A token is worth trying where it and all before it are right with this probability: so much less
#: than a forward pass does a further token of one cost.
WORTH = 0.2
#: Last tokens of a text that must have stood in it before, and how far back they are looked for.
SUFFIX, BACK = 2, 1024
#: Ways to go on that the text's past is asked for; neighbours that are looked at, and followed.
PAST, NEAREST, FOLLOWED = 3, 64, 8
#: Tokens before a neighbour that are compared with the text's last ones, and how much more a
#: neighbour counts for each that is the same.
SHARED, MORE = 4, 3.0


#: How a text may go on: who says so, what comes next, and how much it counts among that source's.
Way = tuple[str, Sequence[int], float]


@dataclass
class Draft:
    """What is tried.

    Attributes:
        tokens: of the draft.
        shares: for each of them, how much of each source was for it, 0 to 1.
    """

    tokens: list[int] = field(default_factory=list)
    shares: list[dict[str, float]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def cut(self, most: int) -> Draft:
        """The same, of so many tokens at most."""
        return Draft(self.tokens[:most], self.shares[:most])


@dataclass
class Trust:
    """How often a token of a source was right, where all of the draft before it was.

    Attributes:
        tried: tokens, by the source's share in them.
        right: of these.
    """

    tried: float
    right: float

    @property
    def rate(self) -> float:
        """0 to 1."""
        return self.right / self.tried


@dataclass
class Drafts:
    """Drafts of texts, from their own past and from the neighbours.

    Attributes:
        stores: by the expert's name, the datastore that it searches, whose entries are in the order
            of their text; empty to go by the texts alone.
        trust: by the source, how far it goes; learned.
    """

    stores: Mapping[str, Datastore] = field(default_factory=dict)
    trust: dict[str, Trust] = field(
        default_factory=lambda: {"past": Trust(20.0, 10.0), "near": Trust(20.0, 4.0)}
    )

    def of(
        self,
        prediction: MixturePrediction,
        rows: Sequence[int],
        texts: Sequence[Sequence[int]],
    ) -> list[Draft]:
        """What B texts may go on with.

        Args:
            prediction: of contexts, with the neighbours that were found for them.
            rows: (B,) the context that the last token of each text followed.
            texts: the tokens of each.
        """
        near = [
            (self.stores[name], {int(row): place for place, row in enumerate(places)}, found)
            for name, (places, found) in prediction.near().items()
            if name in self.stores
        ]
        drafts = []
        for row, text in zip(rows, texts, strict=True):
            ways = list(past(text))
            for store, places, found in near:
                if row in places:
                    ways += behind(text, store, found, places[row])
            drafts.append(self._agreed(ways))
        return drafts

    def learn(self, draft: Draft, kept: int) -> None:
        """Tells how many of a draft's tokens were right, from the first on."""
        for place, shares in enumerate(draft.shares[: kept + 1]):
            for source, share in shares.items():
                self.trust[source].tried += share
                self.trust[source].right += share * (place < kept)

    def _agreed(self, ways: Sequence[Way]) -> Draft:
        """The tokens that are likeliest right, as long as trying them is worth its while."""
        draft, sure = Draft(), 1.0
        while len(draft) < LONGEST:
            votes = _votes(ways, len(draft))
            chances = {token: self._chance(shares) for token, shares in votes.items()}
            best = max(chances, key=chances.__getitem__, default=None)
            if best is None or sure * chances[best] < WORTH:
                break
            sure *= chances[best]
            ways = [way for way in ways if way[1][len(draft) : len(draft) + 1] == [best]]
            draft.tokens.append(best)
            draft.shares.append(votes[best])
        return draft

    def _chance(self, shares: Mapping[str, float]) -> float:
        """That a token is right for which each source has a share: at least one of them is."""
        wrong = 1.0
        for source, share in shares.items():
            wrong *= 1 - share * self.trust[source].rate
        return 1 - wrong


def past(text: Sequence[int]) -> Iterator[Way]:
    """How the text went on where its last tokens stood before, the latest first."""
    last, found = list(text[-SUFFIX:]), 0
    for start in range(len(text) - SUFFIX - 1, max(-1, len(text) - BACK), -1):
        if list(text[start : start + SUFFIX]) == last:
            begin = start + SUFFIX
            yield "past", list(text[begin : begin + LONGEST]), 1.0
            found += 1
            if found == PAST:
                return


def behind(text: Sequence[int], store: Datastore, near: Neighbours, place: int) -> list[Way]:
    """What stands behind those neighbours of a context that have the token that was chosen.

    Args:
        text: its tokens, the chosen one is the last.
        store: the datastore, in the order of its text.
        near: neighbours of several contexts.
        place: of the context among them.
    """
    right = (near.values[place] == text[-1]) & near.valid[place]
    rows = near.ids[place][right].cpu().numpy()
    if not len(rows):
        return []
    rows = rows[near.distances[place][right].cpu().numpy().argsort(kind="stable")[:NEAREST]]
    values, (starts, stops) = store.values, store.texts_of(rows)
    same = np.ones(len(rows), dtype=bool)
    weights = np.ones(len(rows))
    for step in range(1, min(SHARED, len(text) - 1) + 1):
        earlier = np.maximum(rows - step, starts)
        same &= (rows - step >= starts) & (values[earlier] == text[-1 - step])
        weights[same] *= MORE
    # Of the nearest with the most in common: others say little that is right.
    best = weights.argsort(kind="stable")[::-1][:FOLLOWED]
    return [
        ("near", values[row + 1 : min(row + 1 + LONGEST, stop)].tolist(), float(weight))
        for row, stop, weight in zip(rows[best], stops[best], weights[best], strict=True)
    ]


def _votes(ways: Sequence[Way], place: int) -> dict[int, dict[str, float]]:
    """By the token at a place of the ways, the share of each source that is for it."""
    totals: dict[str, float] = {}
    votes: dict[int, dict[str, float]] = {}
    for source, tokens, weight in ways:
        if place < len(tokens):
            totals[source] = totals.get(source, 0.0) + weight
            shares = votes.setdefault(tokens[place], {})
            shares[source] = shares.get(source, 0.0) + weight
    return {
        token: {source: weight / totals[source] for source, weight in shares.items()}
        for token, shares in votes.items()
    }
