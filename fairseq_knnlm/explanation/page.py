"""A record as one HTML file, which opens without a server and asks no network for anything.

The file holds a template, styles and scripts, all of them from ``template/``, and the record, which
the scripts draw. Only what has the hashes of these styles and scripts is run by a browser, and
nothing is fetched: the page forbids itself all else. The record is packed, as base64: nothing in it
can be markup, and 2,000 tokens with their sources take a tenth of their JSON.
"""

from __future__ import annotations

import zlib
from base64 import b64encode
from collections.abc import Iterable
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import msgspec

from fairseq_knnlm.errors import OutputError
from fairseq_knnlm.explanation.record import Explained, Run
from fairseq_knnlm.files import human_bytes, publish

#: Bytes of a page: more would be slow to open, and to pass on.
MOST_BYTES = 5 * 2**20
#: Bytes of them for the little that is put into the template beside the large parts.
SLACK = 2**10
#: Of the template's folder, in the order in which they are read by a browser.
SCRIPTS = ("elements", "record", "figures", "text", "picture", "sources", "details", "page")
#: Of a probability, a distance or a place.
DIGITS = 5
#: zlib's name for a stream in the format of gzip.
GZIP = 31


def write_page(path: Path, run: Run, texts: Iterable[Explained]) -> tuple[int, int]:
    """Writes a page whole, or leaves what was there.

    Texts are taken one at a time, and as many are shown as fit: where there are more the page
    says so. A first text that is too long by itself has fewer sources a token.

    Args:
        path: of the HTML file.
        run: what the texts have in common.
        texts: in the order in which they are shown.

    Returns:
        How many of the texts are shown, and how many did not fit.

    Raises:
        OutputError: where not even one text fits, or there is none.
        BusyError: where another process is writing ``path``.
    """
    template = Template(_part("page.html"))
    style = _part("page.css")
    script = "\n".join(_part(f"{name}.js") for name in SCRIPTS)
    around = len((style + script + template.template).encode()) + SLACK
    packing = _Packing(run, _packed(MOST_BYTES - around))
    shown, left_out = 0, 0
    for text in texts:
        if not left_out and packing.add(text, shorten=not shown):
            shown += 1
        else:
            left_out += 1
    if not shown:
        raise OutputError(
            "there is no text that a page can show",
            expected=f"at least one that takes less than {human_bytes(MOST_BYTES)}, packed",
            found="a text of too many tokens" if left_out else "none",
            do="explain fewer tokens",
        )
    page = template.substitute(
        script=script,
        script_hash=_hash(script),
        style=style,
        style_hash=_hash(style),
        record=b64encode(packing.finish()).decode(),
        left_out=left_out,
    )
    with publish(path) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")
    return shown, left_out


class _Packing:
    """The lines of a record, packed while they come, up to a number of bytes."""

    def __init__(self, run: Run, most: int) -> None:
        self._encoder = msgspec.json.Encoder()
        self._most = most
        self._stream = zlib.compressobj(wbits=GZIP)
        self._done = bytearray(self._stream.compress(self._line(run)))

    def add(self, text: Explained, shorten: bool) -> bool:
        """Adds a text where there is room for it; with ``shorten``, as much of it as there is."""
        sources = max((len(token.sources) for token in text.tokens), default=0)
        while True:
            # A copy of the stream says how much it would be.
            trial = self._stream.copy()
            more = trial.compress(self._line(text))
            if len(self._done) + len(more) + len(trial.copy().flush()) <= self._most:
                self._stream = trial
                self._done += more
                return True
            if not shorten or not sources:
                return False
            sources //= 2
            text = _with_sources(text, sources)

    def finish(self) -> bytes:
        return bytes(self._done) + self._stream.flush()

    def _line(self, part: Run | Explained) -> bytes:
        return self._encoder.encode(_rounded(msgspec.to_builtins(part))) + b"\n"


def _with_sources(text: Explained, most: int) -> Explained:
    """A text with the first sources of every token alone, which have the largest shares."""
    tokens = [msgspec.structs.replace(token, sources=token.sources[:most]) for token in text.tokens]
    return msgspec.structs.replace(text, tokens=tokens)


def _rounded(value: Any) -> Any:
    """Plain objects with as many digits of a number as anybody can see: half of the bytes."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    return value


def _packed(size: int) -> int:
    """Bytes that base64 makes at most ``size`` of."""
    return size // 4 * 3


def _part(name: str) -> str:
    return files(__package__).joinpath("template", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a policy names the only script or style that it allows."""
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"
