"""Exceptions that a user meets. Each says what was expected, what was found, and what to do."""

from __future__ import annotations

import errno
import os


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


class RecordError(KnnlmError):
    """A record of where tokens came from that is missing, damaged, or of another kind."""


class ReceiptError(KnnlmError):
    """Results that are damaged, or that what made them does not come to again."""


class OutputError(KnnlmError):
    """A file or folder that cannot be written."""


class BusyError(OutputError):
    """A file or folder that another process is writing."""


class Terminated(KeyboardInterrupt):
    """The process was told to end (SIGTERM), and ends as where a user interrupts it."""


#: How libraries written in C++ say that memory, or the disk, is full.
MEMORY_WORDS = ("can't allocate memory", "out of memory", "bad_alloc", "std::bad_array_new_length")
DISK_WORDS = {errno.ENOSPC: "No space left on device", errno.EFBIG: "File too large"}
#: Set to anything to see where an unexpected failure came from.
TRACEBACK = "KNNLM_TRACEBACK"


def told(error: BaseException) -> tuple[str, int]:
    """What a user is told of any failure, and the exit code. The one place that decides it."""
    if isinstance(error, KnnlmError):
        return f"error: {error}", 1
    if isinstance(error, KeyboardInterrupt):
        ended = isinstance(error, Terminated)
        what = "terminated" if ended else "interrupted"
        # On a line of its own: a progress bar, or ^C, may stand on this one.
        return f"\n{what}; nothing was published that was not finished", 143 if ended else 130
    return f"error: {_mended(error)}", 1


def _mended(error: BaseException) -> KnnlmError:
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    for each, words in DISK_WORDS.items():
        if words in text:
            number = each
    place = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputError(
            "the disk is full, or allows no larger file",
            expected="room for what is written",
            found=f"{place}{os.strerror(number)}",
            do="make room, or write to another disk; what was there before is as it was",
        )
    if isinstance(error, MemoryError) or any(words in text for words in MEMORY_WORDS):
        return KnnlmError(
            "the memory does not suffice",
            expected="a smaller piece of work",
            found=(text.splitlines() or ["an allocation that failed"])[0],
            do="lower --max-tokens, --k or --cache-window, or build a smaller index",
        )
    if isinstance(error, OSError) and error.strerror:
        return KnnlmError(
            "a file or folder cannot be used",
            expected="one that is there, and that this user may read or write",
            found=f"{place}{error.strerror}",
            do="check the path",
        )
    return KnnlmError(
        "something failed that should not",
        found=f"{type(error).__name__}: {text}"[:1000],
        do=f"set {TRACEBACK}=1, run it again, and report what it then shows",
    )


def wants_traceback() -> bool:
    """Whether a user asked to see where an unexpected failure came from."""
    return bool(os.environ.get(TRACEBACK))


def first_line(error: BaseException) -> str:
    """What an error of another library says, in a line; its name where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def kind_and_line(error: BaseException) -> str:
    """Its kind, and what it says in a line: for an error that may say no more than a key."""
    return f"{type(error).__name__}: {first_line(error)[:200]}"
