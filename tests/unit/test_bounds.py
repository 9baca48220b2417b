"""Numbers that a user types, against their bounds."""

from __future__ import annotations

import pytest

from fairseq_knnlm.bounds import check_range, check_seed
from fairseq_knnlm.errors import ConfigError


@pytest.mark.parametrize("value", [None, 1, 5, 10, 1.5])
def test_numbers_within_their_bounds(value: float | None) -> None:
    check_range("--n", value, 1, 10, "counts things")


@pytest.mark.parametrize("value", [0, 11, -(10**30), 10**30, float("nan"), float("inf")])
def test_numbers_out_of_their_bounds(value: float) -> None:
    with pytest.raises(ConfigError, match=r"--n counts things\n  expected: 1 to 10\n"):
        check_range("--n", value, 1, 10, "counts things")


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), float("-inf")])
def test_without_an_upper_bound(value: float) -> None:
    check_range("--n", 10**12, 0, None, "counts things")
    with pytest.raises(ConfigError, match="0 or more"):
        check_range("--n", value, 0, None, "counts things")


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30])
def test_seeds(seed: int) -> None:
    check_seed(0)
    check_seed(2**32 - 1)
    with pytest.raises(ConfigError, match="--seed"):
        check_seed(seed)
