"""How much memory distances recomputed on the keys take, by k and width."""

import re
import sys
from pathlib import Path

#: Neighbours a query, and dimensions of a key: the paper's, and more than anybody asks for.
KS = (1024, 4096, 16_384)
WIDTHS = (256, 1024)
#: Queries of a call, as an evaluation makes them.
QUERIES = 600
ROWS = 20_000


def peaks() -> dict[str, float]:
    """GiB by which the peak of a process grows in two calls, by ``"k 1024, width 256"``."""
    return {f"k {k}, width {width}": _peak(k, width) for width in WIDTHS for k in KS}


def _peak(k: int, width: int) -> float:
    from common.commands import answer  # in the parent alone, which knows the way to it

    return float(answer(__file__, k, width)) / 2**30


def _held() -> int:
    """Bytes that this process has held at most, its parent's not counted."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return 1024 * int(found[1])


def _main(k: int, width: int) -> None:
    import torch

    from fairseq_knnlm.index.distances import distances_to_rows

    torch.manual_seed(0)
    keys, queries = torch.randn(ROWS, width).half(), torch.randn(QUERIES, width)
    rows = torch.randint(ROWS, (QUERIES, k))
    distances_to_rows(keys, queries[:2], rows[:2, :64], "l2")
    before = _held()
    for half in (slice(0, QUERIES // 2), slice(QUERIES // 2, None)):
        distances_to_rows(keys, queries[half], rows[half], "l2")
    print(_held() - before)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    _main(*map(int, sys.argv[1:]))
