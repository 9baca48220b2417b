"""Half a minute of `tools/chaos.py`: commands killed at their write steps lose nothing."""

from __future__ import annotations

import re
import sys

import pytest
from conftest import must
from tiny_world import ROOT


@pytest.mark.slow
def test_half_a_minute_of_chaos() -> None:
    out = must(sys.executable, ROOT / "tools/chaos.py", "--seconds", 30, "--seed", 12)
    found = re.search(r"([\d,]+) cases, ([\d,]+) kills, .* 0 findings", out)
    assert found is not None, out[-3000:]
    assert int(found[2].replace(",", "")) >= 5
