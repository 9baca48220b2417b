"""Files that appear whole or not at all, and checksums that tell when one was altered.

A checksum covers a chunk of 64 MiB, so that opening a small file checks every byte of it, while
opening a huge one checks an evenly spaced sample and leaves the rest to ``fairseq-knnlm verify``.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")

CHUNK_BYTES = 64 * 2**20
#: Chunks checked when a file is opened: all of a file up to 2 GiB.
CHUNKS_ON_OPEN = 32


@contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on success it takes the name ``path``.

    On an exception the temporary file is removed and ``path`` is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        flush_to_disk(temporary)
        temporary.chmod(0o644)  # mkstemp makes files private; results are to be shared
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Asks the system to put the file's bytes on the disk before a rename makes them visible."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(path: Path, content: dict[str, Any] | list[Any]) -> None:
    """Writes ``content`` as indented JSON, atomically."""
    with publish(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_sealed(path: Path, kind: str, version: int, content: dict[str, Any]) -> str:
    """Writes a JSON object that tells its kind and version and shows any later change.

    Returns:
        The seal: a fingerprint over kind, version and content.
    """
    sealed = {"format": kind, "version": version, **content}
    seal = fingerprint(sealed)
    write_json(path, {**sealed, "fingerprint": seal})
    return seal


def read_sealed(path: Path, kind: str, version: int, make: Callable[..., T]) -> tuple[T, str]:
    """Reads what ``write_sealed`` wrote.

    Args:
        path: the file.
        kind: its format.
        version: the newest version that can be read.
        make: makes an object of the content, given as keyword arguments.

    Returns:
        The object and the seal.

    Raises:
        ValueError: saying what was found, where it is no JSON object of that kind, of a newer
            version, altered, or with other fields.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"no JSON ({error})") from None
    if not isinstance(content, dict) or content.get("format") != kind:
        raise ValueError("JSON of another kind")
    if not isinstance(content.get("version"), int) or content["version"] > version:
        raise ValueError(f"version {content.get('version')}, written by a newer fairseq-knnlm")
    seal = content.pop("fingerprint", None)
    if seal != fingerprint(content):
        raise ValueError("an altered file (its fingerprint differs)")
    fields = {key: content[key] for key in content if key not in ("format", "version")}
    try:
        return make(**fields), seal
    except TypeError as error:
        raise ValueError(f"other fields ({error})") from None


def fingerprint(content: dict[str, Any]) -> str:
    """SHA-256 (hex) of a JSON object, whatever the order of its keys."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def checksums(path: Path, chunks: Sequence[int] | None = None) -> list[str]:
    """SHA-256 (first 16 hex digits) of the file's chunks of 64 MiB, read in parallel.

    Args:
        path: the file.
        chunks: which chunks, by number; all of them where left out.
    """
    if chunks is None:
        chunks = range(chunk_count(path))

    def digest(chunk: int) -> str:
        with path.open("rb") as file:
            file.seek(chunk * CHUNK_BYTES)
            return hashlib.sha256(file.read(CHUNK_BYTES)).hexdigest()[:16]

    # hashlib lets go of the interpreter lock, so threads are enough; four bound the memory.
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        digests = pool.map(digest, chunks)
        label = f"checking {path.name}"
        # Shown only where it takes long enough to wonder.
        return list(tqdm(digests, total=len(chunks), desc=label, unit=" chunks", delay=2))


def altered(path: Path, expected: Sequence[str], *, everything: bool = False) -> bool:
    """True where the file's bytes are not those that ``expected`` was taken from.

    Checks at most ``CHUNKS_ON_OPEN`` evenly spaced chunks (the first and last among them) unless
    ``everything`` is asked for.
    """
    chosen = range(len(expected)) if everything else sampled_chunks(len(expected))
    return checksums(path, chosen) != [expected[chunk] for chunk in chosen]


def sampled_chunks(total: int) -> Sequence[int]:
    """At most ``CHUNKS_ON_OPEN`` of ``total`` chunks, evenly spaced, first and last among them."""
    if total <= CHUNKS_ON_OPEN:
        return range(total)
    step = (total - 1) / (CHUNKS_ON_OPEN - 1)
    return sorted({round(i * step) for i in range(CHUNKS_ON_OPEN)})


def chunk_count(path: Path) -> int:
    """Chunks of a file, the last one possibly short."""
    return -(-path.stat().st_size // CHUNK_BYTES)


def human_bytes(count: float) -> str:
    """``1536`` -> ``"1.5 KiB"``."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
