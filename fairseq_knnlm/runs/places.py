"""Where a run may write: in places of their own, apart from what is read."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from fairseq_knnlm.datastore import MANIFEST, check_new
from fairseq_knnlm.datastore.making import MAKING
from fairseq_knnlm.datastore.writer import is_empty
from fairseq_knnlm.errors import BusyError, OutputError
from fairseq_knnlm.files import check_outputs

#: What files in a datastore's folder are called that are its own.
OF_INDEX = "knn."
PARTS: tuple[str, ...] = (
    *("manifest.", "keys.", "values.", "projection.", "weights.", OF_INDEX, "ngram.", "blocks"),
    *("piece-", "documents.", "calibration.json", "calibration.npz"),
)


#: Tenths of a second that are waited for processes that try the same place.
PATIENCE = 20


def exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no file can have
        return False


def check_new_datastore(
    flag: str, path: Path, others: Mapping[str, Path | str | None], *, goes_on: bool = False
) -> None:
    """Refuses a place for a new datastore that is taken, or is part of something else.

    Args:
        flag: that names it.
        path: its folder.
        others: what else the run writes, by flag.
        goes_on: whether a datastore in the making is welcome, to go on with.

    Raises:
        DatastoreError: where ``path`` exists.
        OutputError: where it lies within a datastore, or another output within it.
    """
    if ":" in str(path):
        raise OutputError(
            f"{flag} holds a colon, which separates the datastores of --dstore-filename",
            expected="a path without one, so that the datastore can be read again",
            found=path,
        )
    if exists(path) and not (goes_on and _is_begun(path)):
        check_new(path)
    place = Path(os.path.realpath(path))
    around = [parent for parent in place.parents if exists(parent / MANIFEST)]
    within = [other for other, name in others.items() if name and place in _with_parents(name)]
    if around or within:
        raise OutputError(
            f"{flag} names no place of its own",
            expected="a new folder, outside other datastores, with no other file in it",
            found=f"{path}, which lies in the datastore {around[0]}"
            if around
            else f"{path}, in which {within[0]} would lie",
            do="choose another path",
        )


def check_datastore_output(flag: str, path: Path) -> None:
    """Tries the folder of a datastore that will be made, or gone on with.

    Processes that share out the work begin at the same moment, so each waits a little for others
    that try the same.

    Raises:
        BusyError: where another process goes on writing it.
        DatastoreError: where another process was faster.
        OutputError: where it cannot be written.
    """
    for waited in range(PATIENCE):
        if _is_begun(path):
            if os.access(path, os.W_OK | os.X_OK):
                return
            raise OutputError(
                f"{flag} cannot be written",
                expected="a folder that can be written to",
                found=f"{path}, where that is not allowed",
                do="check whose it is",
            )
        try:
            check_outputs({flag: path})
            return
        except BusyError:
            if waited == PATIENCE - 1:
                raise
            time.sleep(0.1)
        except OutputError:
            if exists(path):
                check_new(path)  # another process may just have published it
            raise


def _is_begun(path: Path) -> bool:
    """Whether a datastore is in the making there, or a process has just about begun it."""
    if exists(path / MAKING) or exists(path / f".{MAKING}.lock"):
        return True
    return exists(path) and is_empty(path)


def _with_parents(name: Path | str) -> list[Path]:
    place = Path(os.path.realpath(name))
    return [place, *place.parents]


def check_apart(
    outputs: Mapping[str, Path | str | None],
    inputs: Mapping[str, Iterable[Path]],
    *,
    allowed: str = "",
) -> None:
    """Refuses to write over what is read, or over a part of any datastore.

    Args:
        outputs: by the flag that names it; None where the flag is not given.
        inputs: files that are read, by what names them.
        allowed: what the name of a part begins with that may be written; empty for none.

    Raises:
        OutputError: naming both.
    """
    parts = tuple(part for part in PARTS if part != allowed)
    read = {os.path.realpath(file): name for name, files in inputs.items() for file in files}
    for flag, name in outputs.items():
        if name is None:
            continue
        place = Path(os.path.realpath(name))
        other = read.get(str(place))
        if exists(place.parent / MANIFEST) and place.name.startswith(parts):
            other = f"a part of the datastore {place.parent}"
        if other is not None:
            raise OutputError(
                f"{flag} would write over what is read",
                expected="a file of its own",
                found=f"{name}: {other}",
                do="name another file",
            )
