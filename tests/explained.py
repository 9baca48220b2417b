"""A small record, by hand."""

from __future__ import annotations

import math

from fairseq_knnlm.explanation.record import (
    Explained,
    Guess,
    Memory,
    Run,
    Source,
    Token,
    Voice,
)

RUN = Run("m" * 64, "knn: lambda 0.5", [Memory("knn", "store", "d" * 64, 400, "Flat")], {"a": "1"})


def token(word: str, lm: float, mixture: float, source: Source | None = None) -> Token:
    """With probabilities of the two; the neighbours moved it from one to the other."""
    bits = math.log2(mixture / lm)
    knn = 2 * mixture - lm
    return Token(
        text=word,
        symbol=word.strip(),
        lm=math.log(lm),
        mixture=math.log(mixture),
        voices=[
            Voice("lm", 0.5, math.log(lm), 0.0),
            Voice("knn", 0.5, math.log(knn) if knn > 0 else None, bits),
        ],
        lm_guesses=[Guess(word, lm), Guess(" other", lm / 2)],
        mixture_guesses=[Guess(word, mixture), Guess(" other", mixture / 2)],
        sources=[source] if source is not None else [],
        agreement=[0.5],
        place=(0.0, 1.0) if source is not None else None,
    )


def text(name: str, given: int = 3) -> Explained:
    """Three tokens: one gained 2 bits, one lost 1 since the neighbours did not know it."""
    source = Source(
        *(0, 7, 1.5, 0.75, " cat", True, " saw the", " sit", 1, "The cats", 0, (1.0, -1.0))
    )
    tokens = [token("the", 0.5, 0.5), token(" cat", 0.1, 0.4, source), token(" sat", 0.25, 0.125)]
    return Explained(name, given, tokens)
