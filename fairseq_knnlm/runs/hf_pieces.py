"""What the tokens of a tokenizer.json are as text, byte for byte.

A token may be part of a character, so tokens that are decoded one by one lose what they are; and
what is decoded together has no borders. The file says how its tokens are written: with a letter for
each byte, as in GPT-2, or with a mark for a space and names of bytes, as in sentencepiece.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fairseq_knnlm.runs.spelling import BYTE


@dataclass(frozen=True)
class Pieces:
    """The tokens of a tokenizer.

    Attributes:
        of: by id, its bytes.
        first: the same where it begins a text, of those that are written otherwise there.
    """

    of: Mapping[int, bytes]
    first: Mapping[int, bytes]


def read_pieces(tokenizer: str) -> Pieces | None:
    """What a tokenizer's tokens are as text; None where it writes them in a way of its own.

    Args:
        tokenizer: the content of tokenizer.json.
    """
    content = json.loads(tokenizer)
    steps = list(_steps(content["decoder"]))
    literal = {one["id"]: one["content"].encode() for one in content["added_tokens"]}
    tokens = {number: token for token, number in _vocabulary(content["model"])}
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        letters = byte_letters()
        found = {number: _of_letters(token, letters) for number, token in tokens.items()}
        return Pieces(found | literal, {})
    if not kinds or not kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return None
    found = {number: _of_steps(token, steps) for number, token in tokens.items()} | literal
    cut = sum(map(_cut, steps))
    first = {
        number: piece.removeprefix(b" " * cut)
        for number, piece in found.items()
        if cut and number not in literal and piece.startswith(b" ")
    }
    return Pieces(found, first)


def byte_letters() -> dict[str, int]:
    """The letter that GPT-2's tokenizer has for each byte: its own, or one after all of these."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


def _of_letters(token: str, letters: Mapping[str, int]) -> bytes:
    """A token of which every letter is a byte; one that was added otherwise is text."""
    if any(letter not in letters for letter in token):
        return token.encode()
    return bytes(letters[letter] for letter in token)


def _of_steps(token: str, steps: list[dict[str, Any]]) -> bytes:
    for step in steps:
        if step["type"] == "ByteFallback" and BYTE.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        if step["type"] == "Replace" and "String" in step["pattern"]:
            token = token.replace(step["pattern"]["String"], step["content"])
        if step["type"] == "Metaspace":
            token = token.replace(step["replacement"], " ")
    return token.encode()


def _cut(step: dict[str, Any]) -> int:
    """Spaces that a step takes away where a text begins."""
    if step["type"] == "Metaspace":
        return int(step.get("prepend_scheme", "always") != "never")
    return int(step["start"]) if step["type"] == "Strip" and step["content"] == " " else 0


def _steps(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The steps of a decoder, one after the other."""
    if decoder is not None and decoder["type"] == "Sequence":
        for one in decoder["decoders"]:
            yield from _steps(one)
    elif decoder is not None:
        yield decoder


def _vocabulary(model: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Tokens and their ids; of a unigram model a list, of others a table."""
    found = model["vocab"]
    if isinstance(found, dict):
        yield from found.items()
    else:
        yield from ((token, number) for number, (token, *_) in enumerate(found))
