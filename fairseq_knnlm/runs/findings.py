"""What ``fairseq-knnlm verify`` finds of one thing, and how it looks at arrays and other files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fairseq_knnlm.datastore import Datastore, check_numbers, open_array
from fairseq_knnlm.errors import DatastoreError, KnnlmError
from fairseq_knnlm.files.arrays import kind_of

WRONG = "not as it should be"
#: What names of temporary files hold, and what is said of them.
LEFT = (".partial-", ".building", ".lock")
LEFT_OVER = "of a run that has not ended, or did not end well; the next one removes it"


@dataclass(frozen=True)
class Finding:
    """What was found of one thing.

    Attributes:
        path: the thing.
        summary: what was found, in a line.
        errors: what is wrong with it.
    """

    path: Path
    summary: str
    errors: tuple[KnnlmError, ...] = ()


def judged(path: Path, look: Callable[[], str]) -> Finding:
    """What ``look`` says of a file, or what it cannot be believed for."""
    try:
        if (kind := kind_of(path)) != "a file":
            raise DatastoreError(
                f"{path} is damaged",
                expected="a file",
                found=kind,
                do="remove it, and make it again",
            )
        return Finding(path, look())
    except KnnlmError as error:
        return Finding(path, WRONG, (error,))
    except OSError as error:
        return Finding(path, WRONG, (unread(path, error),))


def unread(path: Path, error: OSError) -> DatastoreError:
    """What is said of what the system does not let read."""
    return DatastoreError(
        f"{path} cannot be read", found=error.strerror, do="check whose it is, and the disk"
    )


def check_arrays(store: Datastore) -> tuple[dict[str, np.ndarray], list[KnnlmError]]:
    """Reads every byte and every number of the arrays in a datastore's own folder.

    Args:
        store: its outline.

    Returns:
        The arrays that are as they were written, by name, and all that is wrong.
    """
    manifest = store.manifest
    arrays: dict[str, np.ndarray] = {}
    errors: list[KnnlmError] = []
    for name in manifest.arrays():
        try:
            arrays[name] = open_array(store.path, name, manifest, everything=True)
        except DatastoreError as error:
            errors.append(error)
            continue
        except OSError as error:
            errors.append(unread(store.path / name, error))
            continue
        faults = check_numbers(name, arrays[name], manifest.origin.vocabulary)
        errors += [unsound(store.path / name, fault) for fault in faults]
    return arrays, errors


def unsound(file: Path, fault: str) -> DatastoreError:
    """What is said of numbers that no language model makes."""
    return DatastoreError(
        f"{file} holds what no language model has written",
        expected="finite keys, values of the vocabulary, weights of 1 or more",
        found=fault,
        do="save the datastore again, with a checkpoint whose losses are finite",
    )


def strangers(folder: Path, known: Callable[[Path], bool] | Collection[str]) -> Iterator[Finding]:
    """What lies in a folder and is not known there: temporary, or of somebody else."""
    is_known = known if callable(known) else lambda path: path.name in known
    for path in sorted(folder.iterdir()):
        if is_known(path):
            continue
        if path.name.startswith(".") and any(part in path.name for part in LEFT):
            yield Finding(path, LEFT_OVER)
        else:
            yield Finding(path, f"{kind_of(path)} that fairseq-knnlm does not know")
