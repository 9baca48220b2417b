"""What a terminal shows of a record: its figures, the text in colours, tables of its tokens."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from fairseq_knnlm.cli.tables import show, show_prose
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.explanation.record import Explained, Run, Source, Token
from fairseq_knnlm.explanation.record_file import Record

#: Texts that are shown at most.
MOST_TEXTS = 20
#: Tokens that are named as those that gained or lost most.
NAMED = 5
#: Bits from which on a token has the next style, of who gains and of who loses. These differ on
#: every terminal, light or dark, of 16 colours or more.
STEPS = (0.25, 1.0, 2.0, 4.0)
GAINS = ("green", "bold green", "black on bright_green", "bold white on green")
LOSSES = ("red", "bold red", "black on bright_red", "bold white on red")


@dataclass
class Summary:
    """What all texts of a record come to.

    Attributes:
        first: the texts that are shown.
        texts: how many there are.
        tokens: that count: those written, or all where all were given.
        lm: sum of log p of the language model, natural.
        mixture: the same of the mixture.
        helped: number and token of those that gained most, and what they gained in bits.
        hurt: the same of those that lost most.
    """

    first: list[Explained] = field(default_factory=list)
    texts: int = 0
    tokens: int = 0
    lm: float = 0.0
    mixture: float = 0.0
    helped: list[tuple[float, int, Token]] = field(default_factory=list)
    hurt: list[tuple[float, int, Token]] = field(default_factory=list)

    @classmethod
    def of(cls, texts: Iterable[Explained]) -> Summary:
        """Reads them once, and keeps few of them."""
        found, number = cls(), 0
        for text in texts:
            found.texts += 1
            if found.texts <= MOST_TEXTS:
                found.first.append(text)
            written = text.given if text.given < len(text.tokens) else 0
            for place, token in enumerate(text.tokens):
                number += 1
                if place >= written:
                    found._count(number, token)
        return found

    def _count(self, number: int, token: Token) -> None:
        self.tokens += 1
        self.lm += -math.inf if token.lm is None else token.lm
        self.mixture += -math.inf if token.mixture is None else token.mixture
        bits = gain(token)
        one = (bits, number, token)
        if bits > 0:
            self.helped = sorted([*self.helped, one], key=lambda each: -each[0])[:NAMED]
        elif bits < 0:
            self.hurt = sorted([*self.hurt, one], key=lambda each: each[0])[:NAMED]


def gain(token: Token) -> float:
    """Bits that the experts moved a token by."""
    return sum(voice.bits for voice in token.voices)


def show_record(record: Record) -> None:
    """Figures, the first texts, and the tokens that gained and lost most."""
    summary = Summary.of(record.texts)
    _show_figures(record.run, summary)
    if sys.stdout.isatty():
        _show_coloured(summary.first)
    else:
        _show_plain(summary.first)
    if summary.texts > len(summary.first):
        print(f"{summary.texts - len(summary.first):,} more texts are not shown here")
    for title, tokens in (("helped most", summary.helped), ("hurt most", summary.hurt)):
        if tokens:
            header = ("token", title, "LM", "mixture", "bits", "by", "source")
            show(header, [_named(*one) for one in tokens], words=(1, 5, 6))


def _show_figures(run: Run, summary: Summary) -> None:
    alone, mixed = (_loss(total, summary.tokens) for total in (summary.lm, summary.mixture))
    show(
        ("", "tokens", "bits a token", "perplexity"),
        [
            ("language model alone", f"{summary.tokens:,}", *alone),
            ("with memory", f"{summary.tokens:,}", *mixed),
        ],
    )
    print(f"mixture: {visible(run.mixture)}")
    for memory in run.memories:
        name, index = visible(memory.name), visible(memory.index)
        print(f"{visible(memory.expert)}: {name}, {memory.rows:,} entries, {index}")


def _loss(log_prob: float, tokens: int) -> tuple[str, str]:
    bits = -log_prob / math.log(2) / max(tokens, 1)
    return f"{bits:.3f}", f"{2**bits:,.2f}" if bits < 1000 else "inf"


def _named(bits: float, number: int, token: Token) -> Sequence[str]:
    most = max(token.voices, key=lambda voice: abs(voice.bits))
    agreeing = (source for source in token.sources if source.agrees)
    source = next(agreeing, next(iter(token.sources), None))
    return (
        f"{number:,}",
        visible(token.text),
        _probability(token.lm),
        _probability(token.mixture),
        f"{bits:+.2f}",
        visible(most.name),
        _in_brackets(source) if source is not None else "",
    )


def _in_brackets(source: Source) -> str:
    """An entry in its text, where that is known."""
    value = source.value.strip() or source.value
    words = f"{source.before or ''} [{value}]{source.after or ''}"
    return visible(words).strip()


def _probability(log_prob: float | None) -> str:
    return "0" if log_prob is None else f"{math.exp(min(log_prob, 0)):.3g}"


def _show_plain(texts: Sequence[Explained]) -> None:
    """The tokens as a table: in a pipe there are no colours."""
    numbers = iter(range(1, sys.maxsize))
    for text in texts:
        print(f"{visible(text.name)}:")
        show(
            ("token", "text", "LM", "mixture", "bits"),
            [
                (
                    f"{next(numbers):,}",
                    visible(token.text),
                    _probability(token.lm),
                    _probability(token.mixture),
                    f"{gain(token):+.2f}",
                )
                for token in text.tokens
            ],
            words=(1,),
        )


def _show_coloured(texts: Sequence[Explained]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for text in texts:
        shown = Text()
        for place, token in enumerate(text.tokens):
            line = "underline" if place < text.given < len(text.tokens) else ""
            style = f"{colour(gain(token))} {line}".strip()
            words = visible(token.text)
            shown.append(f"{words}\n" if token.text == "\n" else words, style=style)
        console.print(Text(f"\n{visible(text.name)}:", style="bold"))
        console.print(shown, soft_wrap=False)
    legend = Text("\nbits gained and lost: ")
    for colours, sign in ((LOSSES, -1), (GAINS, 1)):
        pairs = list(zip(colours, STEPS, strict=True))
        for each, bits in pairs if sign > 0 else reversed(pairs):
            legend.append(f" {sign * bits:+g} ", style=each)
    console.print(legend)
    if any(text.given < len(text.tokens) for text in texts):
        console.print(Text("underlined: given, not written"))


def colour(bits: float) -> str:
    """A style of rich for a token that gained so much; of none where that is next to nothing."""
    step = sum(abs(bits) >= each for each in STEPS)
    return (GAINS if bits > 0 else LOSSES)[step - 1] if step else ""


def visible(text: str) -> str:
    """Text that does nothing to a terminal but stand there, in one line."""
    return "".join(
        "⏎" if each == "\n" else each if each.isprintable() else " " if each.isspace() else "\ufffd"
        for each in text
    )


def check_token(number: int | None, count: int) -> None:
    """Refuses a token that is not there.

    Raises:
        ConfigError: saying how many there are.
    """
    if number is not None and number > count:
        raise ConfigError(
            "--token names a token that is not there",
            expected=f"1 to {count:,}",
            found=f"{number:,}",
        )


def token_of(record: Record, number: int) -> Token:
    """A token by its number among those of all texts, which are read to their end; the first is 1.

    Raises:
        ConfigError: where there are fewer.
    """
    count, found = 0, None
    for text in record.texts:
        if count < number <= count + len(text.tokens):
            found = text.tokens[number - count - 1]
        count += len(text.tokens)
    check_token(number, count)
    assert found is not None
    return found


def show_token(run: Run, number: int, token: Token) -> None:
    """All that is known of one token."""
    lm, mixture = _probability(token.lm), _probability(token.mixture)
    word, symbol = (visible(each) for each in (token.text.strip(" "), token.symbol))
    print(f"token {number:,}: {word} ({symbol}), probability {lm} alone, {mixture} with memory")
    show(
        ("expert", "weight", "probability", "bits"),
        [
            (
                visible(voice.name),
                f"{voice.weight:.3f}",
                _probability(voice.log_prob),
                f"{voice.bits:+.2f}" if place else "",
            )
            for place, voice in enumerate(token.voices)
        ],
    )
    guesses = zip(token.lm_guesses, token.mixture_guesses, strict=False)
    show(
        ("alone", "probability", "with memory", "probability"),
        [
            (visible(a.text), f"{a.probability:.3g}", visible(b.text), f"{b.probability:.3g}")
            for a, b in guesses
        ],
        words=(0, 2),
    )
    for memory, agreement in zip(run.memories, token.agreement, strict=False):
        if agreement is not None:
            name, share = visible(memory.name), f"{agreement:.0%}"
            print(f"{name}: the neighbours give their likeliest token {share} of their probability")
    if token.sources:
        _show_sources(run, token.sources)


def _show_sources(run: Run, sources: Sequence[Source]) -> None:
    """Those that have the token in bold."""
    show_prose(
        ("share", "distance", "datastore", "row", "document", "text"),
        [
            (
                f"{source.share:.1%}",
                f"{source.distance:.4g}",
                visible(run.memories[source.memory].name),
                f"{source.row:,}",
                visible(source.document or ""),
                _in_brackets(source),
            )
            for source in sources
        ],
        ["bold" if source.agrees else "" for source in sources],
    )
