"""Opening a datastore by the name that a user typed: of ours, or of urvashik/knnlm."""

from __future__ import annotations

import logging
from pathlib import Path

from fairseq_knnlm.datastore import Datastore, open_datastore
from fairseq_knnlm.datastore.legacy import is_legacy, open_legacy
from fairseq_knnlm.errors import ConfigError

logger = logging.getLogger(__name__)


def open_store(
    path: Path,
    *,
    rows: int | None = None,
    fp16: bool = False,
    vocabulary: int | None = None,
    load_keys: bool = True,
    in_memory: bool = False,
) -> Datastore:
    """Opens a datastore of either kind.

    Args:
        path: its folder, or the prefix of the files of urvashik/knnlm.
        rows: ``--dstore-size``; our datastores say it themselves.
        fp16: ``--dstore-fp16``, of files of urvashik/knnlm.
        vocabulary: types of the dictionary, where known; likewise.
        load_keys: False leaves the keys unopened.
        in_memory: read keys and values into memory instead of mapping them.

    Raises:
        ConfigError: where ``rows`` contradicts the manifest.
        DatastoreError: where there is none, it is damaged, or its files do not fit ``rows``.
    """
    if is_legacy(path):
        return open_legacy(
            path,
            rows,
            fp16=fp16,
            vocabulary=vocabulary,
            load_keys=load_keys,
            in_memory=in_memory,
        )
    store = open_datastore(path, load_keys=load_keys, in_memory=in_memory)
    check_size(rows, len(store))
    return store


def check_size(dstore_size: int | None, rows: int) -> None:
    """Refuses a ``--dstore-size`` that contradicts the manifest.

    Raises:
        ConfigError: where it is given and wrong.
    """
    if dstore_size is not None and dstore_size != rows:
        raise ConfigError(
            "--dstore-size contradicts the datastore",
            expected=f"{rows:,}, as its manifest says",
            found=f"{dstore_size:,}",
            do="leave --dstore-size out; it is for files of urvashik/knnlm",
        )


def name_foreign(rows: int | None, fp16: bool) -> None:
    """Says that flags for files of urvashik/knnlm do nothing, where none of these are opened.

    Args:
        rows: ``--dstore-size``.
        fp16: ``--dstore-fp16``.
    """
    for flag, given in (("--dstore-size", rows is not None), ("--dstore-fp16", fp16)):
        if given:
            logger.warning(
                "%s does nothing: it is for files of urvashik/knnlm, and our datastores say it "
                "themselves",
                flag,
            )
