"""Arrays of files that nobody vouches for: the header of an ``.npy``, the members of an ``.npz``.

NumPy reads both, and trusts what they say of themselves. Here a file is read only where its length,
its headers and its checksums agree, and every byte of it belongs to an array.
"""

from __future__ import annotations

import json
import math
import re
import stat
import struct
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

#: Bytes of a header that are looked at; NumPy's are padded to multiples of 64.
MOST_HEADER = 10_000
#: Bytes copied at a time.
STEP = 2**20
#: What follows the members of an archive: its directory, and at the very end this record.
END, END_BYTES = b"PK\x05\x06", 22
LOCAL, LOCAL_BYTES = b"PK\x03\x04", 30


def kind_of(path: Path) -> str:
    """What lies at ``path``, in words: a file, a folder, nothing, ..."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "a link that leads nowhere" if path.is_symlink() else "no such file"
    if stat.S_ISREG(mode):
        return "a file"
    return "a folder" if stat.S_ISDIR(mode) else "a device or pipe"


def check_file(path: Path) -> None:
    """Refuses what is no file, which reading could wait for, or never end with.

    Raises:
        ValueError: saying what it is.
    """
    if (kind := kind_of(path)) != "a file":
        raise ValueError(kind)


def read_header(file: IO[bytes], size: int) -> tuple[np.dtype, tuple[int, ...]]:
    """Type and shape of an ``.npy`` file, whose array must be all that follows.

    Args:
        file: open at its first byte; afterwards at the array's first.
        size: bytes of it, header included.

    Raises:
        ValueError: where the header is damaged or does not fit the length, or the array is none of
            plain numbers or text in C order.
    """
    try:
        version = np.lib.format.read_magic(file)
        assert version == (1, 0)
        header = np.lib.format.read_array_header_1_0(file, max_header_size=MOST_HEADER)
    except OSError:
        raise
    except Exception:  # its text is Python's, which can be wrong in a dozen ways
        raise ValueError("a damaged header") from None
    shape, fortran, dtype = header
    if fortran or dtype.hasobject or dtype.kind not in "iufbU":
        raise ValueError(f"an array of {dtype}{', column by column' if fortran else ''}")
    if any(length < 0 for length in shape):
        raise ValueError("a negative length")
    expected, found = math.prod(shape) * dtype.itemsize, size - file.tell()
    if expected != found:
        raise ValueError(f"{found:,} bytes for an array of {shape} {dtype}, {expected:,} bytes")
    return dtype, shape


class Archive:
    """An open ``.npz`` whose members lie side by side, uncompressed, from its first byte on.

    So nothing unpacks into more than the file's own bytes. ``opened`` makes one.
    """

    def __init__(self, archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo]) -> None:
        self._archive = archive
        self._members = members

    @property
    def names(self) -> Sequence[str]:
        """Of the arrays, in the order of the file."""
        return list(self._members)

    def read(self, name: str) -> np.ndarray:
        """An array, in memory of its own.

        Raises:
            ValueError: where it is missing or damaged.
        """
        if name not in self._members:
            raise ValueError(f"no {name} in it")
        member = self._members[name]
        with _named(name), self._archive.open(member) as file:
            dtype, shape = read_header(file, member.file_size)
            array = np.empty(shape, dtype)
            into = array.reshape(-1).view(np.uint8) if array.size else np.empty(0, np.uint8)
            for start in range(0, len(into), STEP):
                part = file.read(min(STEP, len(into) - start))
                into[start : start + len(part)] = np.frombuffer(part, np.uint8)
            if file.read():  # also the end, at which the checksum is compared
                raise ValueError("bytes behind its end")
        return array

    def column(self, name: str, dtypes: Sequence[str], rows: int, most: int = 0) -> np.ndarray:
        """An array of known type and length.

        Args:
            name: of the array.
            dtypes: one of these.
            rows: its length.
            most: where it may have a second dimension, the largest.

        Raises:
            ValueError: where it is missing, damaged, or another.
        """
        array = self.read(name)
        if str(array.dtype) not in dtypes:
            raise ValueError(f"{name}: {array.dtype} in the place of {' or '.join(dtypes)}")
        flat = array.ndim == 1 or (array.ndim == 2 and 1 <= array.shape[1] <= most)
        if not flat or len(array) != rows:
            raise ValueError(f"{name}: shape {array.shape}, of {rows:,} rows")
        return array

    def vector(self, name: str, dtype: str) -> np.ndarray:
        """An array of one dimension and any length.

        Raises:
            ValueError: where it is missing, damaged, or another.
        """
        array = self.read(name)
        if array.dtype != dtype or array.ndim != 1:
            raise ValueError(f"{name}: {array.shape} {array.dtype} in the place of (N,) {dtype}")
        return array

    def text(self, name: str) -> str:
        """The one string of an array, as a card is written.

        Raises:
            ValueError: where it is missing, damaged, or none.
        """
        array = self.read(name)
        if array.shape != (1,) or array.dtype.kind != "U":
            raise ValueError(f"{name}: {array.shape} {array.dtype} in the place of a text")
        try:
            return str(array[0])
        except ValueError:  # code points that there are not
            raise ValueError(f"{name}: no text") from None


@contextmanager
def opened(path: Path) -> Iterator[Archive]:
    """Opens an ``.npz``.

    Raises:
        ValueError: saying what is wrong with it, also of what is read from it.
        OSError: where the file cannot be read.
    """
    check_file(path)
    with _named(), zipfile.ZipFile(path) as archive:
        yield Archive(archive, _members(path, archive))


@contextmanager
def _named(name: str = "") -> Iterator[None]:
    """Turns the many ways in which zipfile says no into one."""
    before = f"{name}: " if name else ""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except ValueError as error:
        raise ValueError(f"{before}{error}") from None
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, struct.error) as error:
        raise ValueError(f"{before}{error or type(error).__name__}") from None


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The arrays by name, once it is known that they account for every byte of the file."""
    members: dict[str, zipfile.ZipInfo] = {}
    with path.open("rb") as file:
        end = 0
        for member in sorted(archive.infolist(), key=lambda one: one.header_offset):
            name = member.filename.removesuffix(".npy")
            if name == member.filename or not re.fullmatch(r"\w+", name, re.ASCII):
                raise ValueError(f"{member.filename[:80]!r}, which is no name of an array")
            if name in members:
                raise ValueError(f"{name} twice")
            packed = member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1
            if packed or member.file_size != member.compress_size:
                raise ValueError(f"{name}, compressed or encrypted")
            if member.header_offset != end:
                raise ValueError(f"bytes before {name} that belong to no array")
            file.seek(end)
            local = file.read(LOCAL_BYTES)
            if local[:4] != LOCAL:
                raise ValueError(f"no {name} where the archive has it")
            rest = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
            end += LOCAL_BYTES + rest + member.file_size
            members[name] = member
        file.seek(-END_BYTES, 2)
        last = file.read()
        if archive.start_dir != end or last[:4] != END or last[-2:] != b"\0\0":
            raise ValueError("bytes behind the last array that belong to none")
    return members


def write_card(content: dict[str, Any]) -> np.ndarray:
    """A JSON object as the array of one string that ``Archive.text`` reads.

    Raises:
        ValueError: where a number is NaN or infinite, which JSON does not have.
    """
    return np.array([json.dumps(content, allow_nan=False)])
