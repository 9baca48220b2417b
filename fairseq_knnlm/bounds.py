"""Bounds of what a user types, checked before anything else sees it."""

from __future__ import annotations

import math
import re

from fairseq_knnlm.errors import ConfigError

#: Seeds that NumPy, torch and FAISS all take.
LAST_SEED = 2**32 - 1
#: What the libraries below take for a count.
MOST = 2**31 - 1
#: Entries of a datastore.
MOST_ENTRIES = 2**48


def check_range(
    flag: str, value: float | None, low: float, high: float | None, what: str, do: str | None = None
) -> None:
    """Refuses a number that is NaN or out of its bounds.

    Args:
        flag: where it was typed, ``"--k"``.
        value: the number; None where the flag was left out, which is always right.
        low: the least that is right.
        high: the most; None where there is no such number.
        what: what it means, as in ``"counts neighbours"``.
        do: the way out, where the bounds alone do not tell it.

    Raises:
        ConfigError: naming the flag, its bounds and what was typed.
    """
    if value is None:
        return
    endless = isinstance(value, float) and not math.isfinite(value)  # an int may be of any length
    if endless or value < low or (high is not None and value > high):
        expected = f"{low:,} or more" if high is None else f"{low:,} to {high:,}"
        raise ConfigError(f"{flag} {what}", expected=expected, found=f"{value:,}", do=do)


def check_count(
    flag: str, value: float | None, what: str, most: float = MOST, least: float = 1
) -> None:
    """The same, but whoever is below the least is not bothered with the most.

    Raises:
        ConfigError: naming the flag and what was typed.
    """
    above = value is not None and value > most
    check_range(flag, value, least, most if above else None, what)


def check_seed(value: int, flag: str = "--seed") -> None:
    """Refuses a seed that some library would not take.

    Raises:
        ConfigError: naming the flag.
    """
    check_range(flag, value, 0, LAST_SEED, "is the seed of random numbers")


def check_share(flag: str, value: float) -> None:
    """Refuses what is no share, or a share of 0.

    Raises:
        ConfigError: naming the flag.
    """
    if not 0 < value <= 1:
        raise ConfigError(f"{flag} is a share", expected="above 0, to 1", found=value)


def check_device(name: str) -> None:
    """Refuses a ``--knn-device`` that is written like none.

    Raises:
        ConfigError: where it is.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4}(,\d{1,4})*)?", name):
        raise ConfigError(
            "--knn-device names no device", expected="auto, cpu, cuda, or cuda:i,j", found=name
        )
