"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fairseq_knnlm.files.claims import Claim, partial_prefix
from fairseq_knnlm.files.folders import flush_to_disk
from fairseq_knnlm.signals import undisturbed


@contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on success it takes the name ``path``.

    On an exception the temporary file is removed and ``path`` is left as it was. Where ``path`` is
    a link, what it leads to is replaced.

    Raises:
        BusyError: where another process is writing ``path``.
    """
    path = path.resolve() if path.is_symlink() else path
    with Claim(path), ExitStack() as cleaning:
        with undisturbed():
            handle, name = tempfile.mkstemp(prefix=partial_prefix(path), dir=path.parent)
            temporary = Path(name)
            cleaning.callback(temporary.unlink, missing_ok=True)
        os.close(handle)
        yield temporary
        flush_to_disk(temporary)
        temporary.chmod(0o644)  # mkstemp makes files private; results are to be shared
        temporary.replace(path)
        flush_to_disk(path.parent)
