"""A flat datastore, whose arrays lie in its own folder, becomes one of a single block.

So it can be changed by its manifest alone. The block is the datastore as it was, file by file: the
same bytes under another name, so neither time nor room is taken. Who reads it meanwhile finds the
one or the other, and what a process leaves that is killed on the way is either of them, whole.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from msgspec.structs import replace

from fairseq_knnlm.datastore.manifest import (
    BLOCKS,
    DOCUMENTS,
    KEYS,
    MANIFEST,
    VALUES,
    Manifest,
    Stretch,
    read_manifest,
    write_manifest,
)
from fairseq_knnlm.datastore.reader import Datastore, outline
from fairseq_knnlm.datastore.writer import tidy_all
from fairseq_knnlm.errors import DatastoreError
from fairseq_knnlm.files import Claim, flush_to_disk, partial_folder

#: What a block takes over.
MOVED = (KEYS, VALUES, DOCUMENTS)


def into_blocks(path: Path) -> Datastore:
    """Makes a datastore in blocks of a flat one; one in blocks stays as it is.

    What an earlier call left, which was killed, is removed.

    Args:
        path: its folder.

    Returns:
        Its outline.

    Raises:
        BusyError: where another process is changing it.
        DatastoreError: where there is none, or it was compressed.
    """
    with claimed(path):
        manifest, seal = read_manifest(path)
        check_uncompressed(path, manifest)
        if not manifest.blocks:
            folder = path / BLOCKS / f"{0:06d}"
            _move(path, folder)
            block = Stretch(folder.name, manifest.rows, seal, [0])
            whole = replace(manifest, files={}, blocks=[block], before=[seal])
            write_manifest(path / MANIFEST, whole)
        for name in MOVED:
            (path / name).unlink(missing_ok=True)
        return outline(path)


def claimed(path: Path) -> Claim:
    """Makes this process the only one that changes a datastore, which must be there.

    Raises:
        BusyError: where another process is changing it.
        DatastoreError: where there is none.
    """
    read_manifest(path)  # a claim makes the folder
    claim = Claim(path / MANIFEST)
    tidy_all(path)
    return claim


def check_uncompressed(path: Path, manifest: Manifest) -> None:
    """Refuses a datastore that cannot be one of several blocks.

    Raises:
        DatastoreError: where it was compressed.
    """
    if manifest.compressions:
        raise DatastoreError(
            f"the datastore {path} was compressed, and cannot be changed",
            expected="a datastore as it was saved",
            found=manifest.compressions[-1].describe(),
            do="change the one that it was made of, and compress that again",
        )


def _move(path: Path, folder: Path) -> None:
    """Puts the files of a flat datastore into a block's folder, too."""
    with Claim(folder):
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        with partial_folder(folder) as temporary:
            for name in (MANIFEST, *MOVED):
                if (path / name).exists():
                    _link(path / name, Path(temporary, name))
            Path(temporary).chmod(0o755)
            flush_to_disk(Path(temporary))
            Path(temporary).rename(folder)
        flush_to_disk(folder.parent)
        flush_to_disk(path)


def _link(file: Path, other: Path) -> None:
    """Gives a file another name, or copies it where its disk cannot."""
    try:
        os.link(file.resolve(), other)
    except OSError:
        shutil.copyfile(file, other)
        flush_to_disk(other)
