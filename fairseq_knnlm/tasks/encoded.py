"""Data that `encode` wrote, as a task meets it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fairseq_knnlm.lm.fingerprints import dictionary_fingerprint
from fairseq_knnlm.runs.encoded import NAME, Encoded, boundary_of, read_encoded
from fairseq_knnlm.runs.options import Options
from fairseq_knnlm.tasks.stock import folder


def encoded_in(data: str | None, symbols: Sequence[str]) -> Encoded | None:
    """What `encode` left beside the data; None where that is another's work.

    Args:
        data: folder, as typed.
        symbols: of its dictionary.

    Raises:
        ConfigError: where it is damaged, or of another dictionary.
    """
    if not data:
        return None
    return read_encoded(Path(folder(data)) / NAME, dictionary_fingerprint(symbols))


def with_documents(options: Options, encoded: Encoded | None) -> Options:
    """What is asked for, with documents that begin where those of the data do.

    Where a text was not cut line by line, what ends a line elsewhere ends a document.

    Args:
        options: as they were typed.
        encoded: what `encode` left beside the data.

    Raises:
        ConfigError: where they are to begin elsewhere.
    """
    saving = options.saving
    if not saving.save_knnlm_dstore:
        return options
    boundary = boundary_of(saving.document_boundary, encoded)
    return replace(options, saving=replace(saving, document_boundary=boundary))
