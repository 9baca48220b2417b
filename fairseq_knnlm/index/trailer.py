"""A card behind the bytes that it describes, in the same file: written and found again.

Whoever reads the bytes, FAISS or NumPy, reads from the front and does not see it. So both are one
file, and no moment leaves one without the other.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fairseq_knnlm.files import MOST_JSON, seal

#: The end of a file that holds a card: the length of the card (8 bytes, little-endian) and this.
MAGIC = b"kNNcard1"
TAIL_BYTES = 8 + len(MAGIC)


def trailing(kind: str, version: int, content: dict[str, Any]) -> bytes:
    """What follows the bytes in their file: a sealed JSON object, its length, and ``MAGIC``."""
    text = json.dumps(seal(kind, version, content), allow_nan=False).encode()
    return text + len(text).to_bytes(8, "little") + MAGIC


def text_behind(path: Path) -> tuple[str, int] | None:
    """The card that a file ends with, as JSON text, and the bytes before it.

    Returns:
        None where the file ends otherwise.

    Raises:
        ValueError: where its length does not fit the file, or it is no text.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        tail = file.read()
        if not tail.endswith(MAGIC) or len(tail) < TAIL_BYTES:
            return None
        length = int.from_bytes(tail[:8], "little")
        if length > min(MOST_JSON, size - TAIL_BYTES):
            raise ValueError(f"one of {length:,} bytes, in a file of {size:,}")
        file.seek(size - TAIL_BYTES - length)
        try:
            return file.read(length).decode(), size - TAIL_BYTES - length
        except UnicodeDecodeError:
            raise ValueError("bytes that are no text") from None
