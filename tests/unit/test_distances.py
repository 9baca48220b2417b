"""Distances by direct differences: NumPy's in float64, in memory that does not grow with k."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from fairseq_knnlm.index import distances as module
from fairseq_knnlm.index.distances import distances_to_rows

#: Prints by how many bytes the peak of a process grows while it computes distances.
PEAK = """
import re, sys
from pathlib import Path
import torch
from fairseq_knnlm.index.distances import distances_to_rows
def peak():  # getrusage counts that of the parent, too
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
k = int(sys.argv[1])
torch.manual_seed(0)
keys = torch.randn(20_000, 1024).half()
queries = torch.randn(600, 1024)
rows = torch.randint(20_000, (600, k))
distances_to_rows(keys, queries[:2], rows[:2, :64], "l2")
before = peak()
for start in range(0, 600, 300):
    distances_to_rows(keys, queries[start:start + 300], rows[start:start + 300], "l2")
print(1024 * (peak() - before))
"""


@pytest.mark.slow
@pytest.mark.parametrize("k", [1024, 4096, 20_000])
def test_memory_does_not_grow_with_k(k: int) -> None:
    """Keys of the paper's width; all of a batch's would be 2.5 to 49 GB."""
    program = PEAK if k < 20_000 else PEAK.replace("(600", "(40")
    done = subprocess.run(
        [sys.executable, "-c", program, str(k)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 150e6


@pytest.mark.parametrize("gather_bytes", [1, 3 * 4 * 24, 5000, 2**23])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("similarity", ["l2", "dot"])
@pytest.mark.parametrize("shape", [(7, 13), (1, 50), (50, 1), (0, 5), (5, 0)])
def test_they_are_numpys(
    shape: tuple[int, int],
    similarity: str,
    dtype: torch.dtype,
    gather_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many keys are held at a time: one, or all; cut along the neighbours too."""
    monkeypatch.setattr(module, "GATHER_BYTES", gather_bytes)
    rng = np.random.default_rng(0)
    keys = torch.from_numpy(rng.normal(size=(60, 24))).to(dtype)
    queries = torch.from_numpy(rng.normal(size=(shape[0], 24))).float()
    rows = torch.from_numpy(rng.integers(60, size=shape))
    before = queries.clone(), keys.clone()
    found = distances_to_rows(keys, queries, rows, similarity)
    near, asked = keys.double().numpy()[rows.numpy()], queries.double().numpy()[:, None]
    expected = -(near * asked).sum(2) if similarity == "dot" else ((near - asked) ** 2).sum(2)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(queries, before[0]) and torch.equal(keys, before[1])
