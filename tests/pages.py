"""Records whose figures can be worked out by hand, as pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from fairseq_knnlm.explanation.page import write_page
from fairseq_knnlm.explanation.record import Explained, Guess, Memory, Run, Source, Token, Voice

RUN = Run(
    model="0123abcd",
    mixture="0.5 lm, 0.25 knn, 0.25 cache",
    memories=[
        Memory("knn", "animals", "aaaa", 12345, "Flat, exact"),
        Memory("knn2", "plants", "bbbb", 678, "IVF8,SQ8"),
    ],
    versions={"fairseq_knnlm": "0.2.0", "torch": "2.13.0"},
)
#: What a browser would run or draw, if text were markup.
HOSTILE = "<script>alert(1)</script></script><!-- <img src=x onerror=alert(2)> &amp; \u2028"


def source(row: int, value: str, agrees: bool, share: float, **fields: object) -> Source:
    known = {
        "memory": 0,
        "distance": float(row),
        "before": f"seen in row {row}: the cat",
        "after": " and so on",
        "matched": 2,
        "document": "Of cats",
        "document_row": 100,
        "place": (float(row), share),
    }
    return Source(row=row, value=value, agrees=agrees, share=share, **{**known, **fields})


def token(text: str, bits: float = 0.0, sources: Sequence[Source] = (), **fields: object) -> Token:
    """A token of 1/20 before, that knn moved by some bits and the cache by none."""
    lm = math.log(1 / 20)
    mixture = lm + bits * math.log(2)
    known = {
        "symbol": text.strip() or "</s>",
        "voices": [
            Voice("lm", 0.5, lm, 0.0),
            Voice("knn", 0.25, mixture if bits > 0 else None, bits),
            Voice("cache", 0.25, None, 0.0),
        ],
        "lm_guesses": [Guess(" dog", 0.5), Guess(text, 1 / 20)],
        "mixture_guesses": [Guess(text, math.exp(mixture)), Guess(" dog", 0.05)],
        "sources": list(sources),
        "agreement": [0.75, None] if sources else [None, None],
        "place": (0.0, 0.0) if sources else None,
    }
    return Token(text=text, lm=lm, mixture=mixture, **{**known, **fields})


def cats() -> Explained:
    """Nine tokens, the first two given; the others gained 3.5, -1.5, 3, 0, 0, 1.5, 0.7 bits."""
    sat = [
        source(7, " sat", True, 0.6),
        source(8, " ran", False, 0.4, document="Of dogs", document_row=200),
    ]
    mat = [
        source(7, " mat", True, 0.5),
        source(9, " mat", True, 0.3),
        source(5, " fern", False, 0.2, memory=1, document=None, document_row=None, place=None),
    ]
    dot = [source(11, ".", True, 1.0, before=None, after=None, matched=0)]
    return Explained(
        "prompt 1",
        2,
        [
            token("The"),
            token(" cat"),
            token(" sat", 3.5, sat),
            token(" on", -1.5),
            token(" mat", 3.0, mat),
            token(" and"),
            token(" mat"),
            token(".", 1.5, dot),
            token("\n", 0.7),
        ],
    )


def dogs() -> Explained:
    """Another text: of its two tokens one has an entry that helped in ``cats`` too."""
    return Explained(
        "prompt 2", 0, [token("Dogs"), token(" sat", 4.0, [source(7, " sat", True, 1.0)])]
    )


def hostile() -> Explained:
    """Markup wherever a record has text."""
    evil = source(1, HOSTILE, True, 1.0, before=HOSTILE, after=HOSTILE, document=HOSTILE)
    guesses = [Guess(HOSTILE, 0.5)]
    spoken = token(
        HOSTILE, 1.0, [evil], symbol=HOSTILE, lm_guesses=guesses, mixture_guesses=guesses
    )
    return Explained(HOSTILE, 0, [token("plain"), spoken])


def hostile_run() -> Run:
    memory = Memory(HOSTILE, HOSTILE, HOSTILE, 1, HOSTILE)
    return Run(HOSTILE, HOSTILE, [memory], {HOSTILE: HOSTILE})


def long_text(tokens: int = 2000, sources: int = 8) -> Explained:
    """Of a length that a page has to bear; each source with some thirty words that vary."""
    words = [
        f"{'bcdfghjklmnprstvw'[n % 17]}{'aeiou'[n % 5]}{n * 7919 % 100003}" for n in range(4096)
    ]

    def stretch(at: int, size: int) -> str:
        return "".join(f" {words[(at * 31 + n * n * 17) % 4096]}" for n in range(size))

    def one(at: int) -> Token:
        found = [
            source(
                at * 97 + n,
                stretch(at + n, 1),
                n % 3 == 0,
                1 / (n + 2) + (at % 13) / 1e4,
                before=stretch(at * 3 + n, 15),
                after=stretch(at * 5 + n, 15),
                document=stretch(n, 6),
                place=(math.sin(at * n + 1), math.cos(at + n)),
            )
            for n in range(sources)
        ]
        return token(stretch(at, 1), 3 * math.sin(at), found)

    return Explained("valid, rows 0 to 2,000", 0, [one(at) for at in range(tokens)])


def page(folder: Path, *texts: Explained, run: Run = RUN) -> Path:
    path = folder / "page.html"
    assert write_page(path, run, texts) == (len(texts), 0)
    return path
