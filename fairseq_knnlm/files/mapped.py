"""Files that are mapped into memory: their room when written, their length when read.

Where either is missing, touching the map ends the process without a message.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

from fairseq_knnlm.errors import DatastoreError

#: Bytes of zeros written at a time, where the system cannot reserve room by itself.
ZEROS_AT_A_TIME = 64 * 2**20


def reserve(path: Path, size: int) -> None:
    """Makes a file of ``size`` bytes whose room on the disk is taken, so that it can be mapped.

    Writing through a map into room that is not there ends the process without a message.

    Raises:
        OSError: where the disk has no room; the file is left as far as it came.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, max(size, 1))
        else:  # macOS
            for start in range(0, size, ZEROS_AT_A_TIME):
                os.pwrite(handle, bytes(min(ZEROS_AT_A_TIME, size - start)), start)
        os.ftruncate(handle, size)
    finally:
        os.close(handle)


def check_mapped(array: Any, what: str) -> None:
    """Refuses to read an array whose file became shorter since it was mapped.

    One of several parts (``parts``) has as many files.

    Reading behind its end would end the process without a message.

    Raises:
        DatastoreError: naming ``what`` the array is.
    """
    for part in getattr(array, "parts", ()):
        check_mapped(part, what)
    owner: Any = array
    while owner is not None and not isinstance(owner, mmap.mmap):
        owner = getattr(owner, "base", None)
    if owner is not None and owner.size() < len(owner):
        raise DatastoreError(
            f"the {what} were cut off while they were read",
            expected=f"a file of {len(owner):,} bytes, as when it was opened",
            found=f"{owner.size():,} bytes",
            do="restore it, and let nobody write to a datastore that is in use",
        )
