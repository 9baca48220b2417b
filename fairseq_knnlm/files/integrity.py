"""Checksums that tell when a file was altered.

A checksum covers a chunk of 64 MiB, so that opening a small file checks every byte of it, while
opening a huge one checks an evenly spaced sample and leaves the rest to ``Checking`` and to
``fairseq-knnlm verify``.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
from tqdm import tqdm

from fairseq_knnlm.errors import DatastoreError

CHUNK_BYTES = 64 * 2**20
#: Chunks checked when a file is opened: all of a file up to 2 GiB.
CHUNKS_ON_OPEN = 32
#: Of a chunk, as the type of a field.
Checksum = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]


def checksums(
    path: Path, chunks: Sequence[int] | None = None, size: int | None = None
) -> list[str]:
    """SHA-256 (first 16 hex digits) of the file's chunks of 64 MiB, read in parallel.

    Args:
        path: the file.
        chunks: which chunks, by number; all of them where left out.
        size: bytes that count, from the first on; all of them where left out.
    """
    size = path.stat().st_size if size is None else size
    if chunks is None:
        chunks = range(chunks_of(size))

    def digest(chunk: int) -> str:
        return _checksum(path, chunk, size)

    # hashlib lets go of the interpreter lock, so threads are enough; four bound the memory.
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        digests = pool.map(digest, chunks)
        label = f"checking {path.name}"
        # Shown only where it takes long enough to wonder.
        return list(tqdm(digests, total=len(chunks), desc=label, unit=" chunks", delay=2))


def _checksum(path: Path, chunk: int, size: int) -> str:
    """Of a chunk, as far as it lies within the first ``size`` bytes."""
    left = max(0, size - chunk * CHUNK_BYTES)
    with path.open("rb") as file:
        return _digest(file, chunk, min(CHUNK_BYTES, left))


def _digest(file: BinaryIO, chunk: int, count: int) -> str:
    """Of the first bytes of a chunk."""
    file.seek(chunk * CHUNK_BYTES)
    return hashlib.sha256(file.read(count)).hexdigest()[:16]


def altered(
    path: Path, expected: Sequence[str], *, everything: bool = False, size: int | None = None
) -> bool:
    """True where the file's bytes, the first ``size``, are not those ``expected`` was taken from.

    Checks at most ``CHUNKS_ON_OPEN`` evenly spaced chunks (the first and last among them) unless
    ``everything`` is asked for.
    """
    chosen = range(len(expected)) if everything else sampled_chunks(len(expected))
    return checksums(path, chosen, size) != [expected[chunk] for chunk in chosen]


def sampled_chunks(total: int) -> Sequence[int]:
    """At most ``CHUNKS_ON_OPEN`` of ``total`` chunks, evenly spaced, first and last among them."""
    if total <= CHUNKS_ON_OPEN:
        return range(total)
    step = (total - 1) / (CHUNKS_ON_OPEN - 1)
    return sorted({round(i * step) for i in range(CHUNKS_ON_OPEN)})


def chunk_count(path: Path) -> int:
    """Chunks of a file, the last one possibly short."""
    return chunks_of(path.stat().st_size)


def chunks_of(size: int) -> int:
    """Chunks of a file of so many bytes."""
    return -(-size // CHUNK_BYTES)


class Checking:
    """Compares the chunks of a file that opening left unread, in a thread, while it is in use.

    The file is open from now on, so that it may be removed meanwhile.

    Args:
        path: the file.
        expected: the checksums of all its chunks.

    Raises:
        OSError: where it cannot be opened, and is to be read.
    """

    def __init__(self, path: Path, expected: Sequence[str]) -> None:
        self.path = path
        self.checked = 0
        self._expected = expected
        self._left = sorted(set(range(len(expected))) - set(sampled_chunks(len(expected))))
        self._failure: DatastoreError | None = None
        file = path.open("rb") if self._left else io.BytesIO()
        self._thread = threading.Thread(target=self._run, args=(file,), daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Says so, if damage was found by now.

        Raises:
            DatastoreError: where it was.
        """
        if self._failure is not None:
            raise self._failure

    def wait(self) -> None:
        """Waits for the last chunk.

        Raises:
            DatastoreError: where the file is damaged.
        """
        self._thread.join()
        self.check()

    def _run(self, file: BinaryIO) -> None:
        try:
            with file:
                for chunk in self._left:
                    if _digest(file, chunk, CHUNK_BYTES) != self._expected[chunk]:
                        raise ValueError("other ones (checksums differ)")
                    self.checked += 1
        except (OSError, ValueError) as error:
            self._failure = DatastoreError(
                f"{self.path} is damaged",
                expected="the bytes that were written",
                found=error,
                do="restore it from a copy, or save the datastore again",
            )


class Checks:
    """``Checking`` of several files.

    Args:
        files: with the checksums of all chunks of each.

    Raises:
        OSError: where one cannot be opened, and is to be read.
    """

    def __init__(self, files: Mapping[Path, Sequence[str]]) -> None:
        self._of_files = [Checking(path, expected) for path, expected in files.items()]

    def check(self) -> None:
        """As ``Checking.check`` does, of every file."""
        for one in self._of_files:
            one.check()

    def wait(self) -> int:
        """Waits until every byte was compared.

        Returns:
            How many chunks were left for this when the files were opened.

        Raises:
            DatastoreError: where a file is damaged.
        """
        for one in self._of_files:
            one.wait()
        return sum(one.checked for one in self._of_files)
