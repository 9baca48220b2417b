"""Files that a run will write, tried before its work starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from fairseq_knnlm.errors import OutputError
from fairseq_knnlm.files.claims import Claim

#: Bytes of a file's name, so that those of what is temporary beside it have room.
LONGEST_NAME = 200


def check_outputs(outputs: Mapping[str, Path | str | None]) -> None:
    """Tries every file that a run will write, before its work starts. No file of it is left.

    Args:
        outputs: by the flag that names it; None where the flag is not given.

    Raises:
        OutputError: naming the first flag whose file cannot be written, or two that are the same.
        BusyError: where another process is writing one.
    """
    taken: dict[Path, str] = {}
    for flag, name in outputs.items():
        if name is None:
            continue
        path = Path(name)
        check_output(flag, path)
        other = taken.setdefault(path.resolve(), flag)
        if other != flag:
            raise OutputError(
                f"{other} and {flag} name the same file",
                expected="a file for each",
                found=name,
                do="give one of them another name",
            )


def check_output(flag: str, path: Path) -> None:
    """Tries a file that will be written, as ``check_outputs`` does."""
    if (found := _obstacle(path)) is None:
        try:
            with Claim(path.resolve() if path.is_symlink() else path):
                return
        except OSError as error:
            found = f"{path}: {error.strerror}"
    raise OutputError(
        f"{flag} cannot be written",
        expected="the path of a file, new or to be replaced, in a folder that can be written to",
        found=found,
        do="name another file",
    )


def _obstacle(path: Path) -> str | None:
    """What there is that is no file; None where there is nothing or a file."""
    if not path.name or path.name in (".", ".."):
        return f"{str(path)!r}, which names no file"
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        return f"{path}, whose name is too long"
    try:
        if path.is_dir():
            return f"{path}, a folder"
        if path.is_symlink() and not path.exists():
            return f"{path}, a link that leads nowhere"
        if path.exists() and not path.is_file():
            return f"{path}, a device or pipe"
        if below := [parent for parent in path.parents if parent.is_file()]:
            return f"{path}, which lies below the file {below[0]}"
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None
