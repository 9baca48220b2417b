"""What is known of each token of a text that was read or written: who predicted it, and why.

A record is data, and all its text may come from anywhere: whoever shows it must escape it. In files
it is JSON, one ``Explained`` a line behind a first line with the ``Run``, so that a long one can be
written and read piece by piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

FORMAT = "fairseq-knnlm explanation"
VERSION = 1

#: 0 to 1.
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1.0001)]
#: A number of something, or its place.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**48)]
#: log p, natural; None where the probability is 0, or somebody abstains.
LogProb = Annotated[float, msgspec.Meta(le=0.001)] | None
#: A point of a picture.
Place = tuple[float, float]


class Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A datastore that was asked.

    Attributes:
        expert: who asks it: ``knn``, ``knn2``, ...
        name: of its folder.
        fingerprint: of its content.
        rows: its entries.
        index: what answers, in words.
    """

    expert: str
    name: str
    fingerprint: str
    rows: Count
    index: str


class Run(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What all texts of a record have in common.

    Attributes:
        model: fingerprint of the language model.
        mixture: who is mixed and how, in words.
        memories: the datastores.
        versions: of libraries.
        format: ``FORMAT``.
        version: ``VERSION``.
    """

    model: str
    mixture: str
    memories: Sequence[Memory] = ()
    versions: dict[str, str] = {}
    format: str = FORMAT
    version: int = VERSION


class Voice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one expert had to do with a token. The language model's is the first of a token.

    Attributes:
        name: of the expert.
        weight: its part of the mixture, 0 to 1; those of a token add up to 1.
        log_prob: its own, of the token.
        bits: what it moved the token by, from the language model's log p to the mixture's: those of
            a token add up to the difference; 0 for the language model itself.
    """

    name: str
    weight: Fraction
    log_prob: LogProb
    bits: float


class Guess(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A token that might have come.

    Attributes:
        text: of it.
        probability: 0 to 1.
    """

    text: str
    probability: Fraction


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry of a datastore that spoke for a token, or for another one.

    Attributes:
        memory: which of the run's memories.
        row: of the entry there.
        distance: squared L2 from the query, or the negative inner product.
        share: of the neighbours' probability, 0 to 1.
        value: text of the entry's token.
        agrees: whether that is the token that came.
        before: text that stands before it; None where the datastore no longer knows.
        after: text that stands after it.
        matched: how many tokens at the end of ``before`` are those that stood before the token too.
        document: the name of the document that it is from: its first line.
        document_row: the row at which that begins.
        place: in the picture of the token.
    """

    memory: Count
    row: Count
    distance: float
    share: Fraction
    value: str
    agrees: bool
    before: str | None = None
    after: str | None = None
    matched: Count = 0
    document: str | None = None
    document_row: Count | None = None
    place: Place | None = None


class Token(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A token and what was known before it came.

    Attributes:
        text: of it, such that the texts of all tokens one after the other are the whole text.
        symbol: in the dictionary.
        lm: log p of the language model.
        mixture: log p of the mixture.
        voices: of all experts.
        lm_guesses: the likeliest tokens of the language model, the first first.
        mixture_guesses: those of the mixture.
        sources: entries behind it, that with the largest share first.
        agreement: how far the neighbours agree: the part of their probability that their likeliest
            token has, by the memories that were asked.
        place: of the query in the picture of it and its sources, their two principal components.
    """

    text: str
    symbol: str
    lm: LogProb
    mixture: LogProb
    voices: Sequence[Voice]
    lm_guesses: Sequence[Guess] = ()
    mixture_guesses: Sequence[Guess] = ()
    sources: Sequence[Source] = ()
    agreement: Sequence[Fraction | None] = ()
    place: Place | None = None


class Explained(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A text.

    Attributes:
        name: what it is: a split and its rows, or a prompt's number.
        given: how many of the tokens were given as a prompt; the others were written.
        tokens: in their order.
    """

    name: str
    given: Count
    tokens: Sequence[Token]
