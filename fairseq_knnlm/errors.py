"""Exceptions that a user meets. Each says what was expected, what was found, and what to do."""

from __future__ import annotations


class KnnlmError(Exception):
    """Bad input that the user can mend.

    Args:
        problem: one sentence, what is wrong.
        expected: what the program needs.
        found: what it got.
        do: the way out, as a thing to type where there is one.
    """

    def __init__(
        self,
        problem: str,
        *,
        expected: object = None,
        found: object = None,
        do: str | None = None,
    ) -> None:
        rows = (("expected", expected), ("found", found), ("to do", do))
        details = [f"  {name + ':':<10}{text}" for name, text in rows if text is not None]
        super().__init__("\n".join([problem, *details]))


class ConfigError(KnnlmError):
    """Flags that cannot be used, alone or together."""


class DatastoreError(KnnlmError):
    """A datastore that is missing, damaged, or of another model or dictionary."""


class IndexFileError(KnnlmError):
    """An index that is missing, damaged, or of another datastore, or a recipe FAISS refuses."""


class ModelError(KnnlmError):
    """A language model that cannot be used as asked."""


class TableError(KnnlmError):
    """A score table or calibration that is missing, damaged, or of another run."""


class NGramError(KnnlmError):
    """N-gram counts that are missing, damaged, or of another datastore or dictionary."""
