"""How soon ``fairseq-knnlm`` answers, against Python with NumPy alone.

python benchmarks/start.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

# Also from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from fairseq_knnlm.datastore import DatastoreWriter, Origin

ROOT = Path(__file__).resolve().parents[1]
#: Rounds in which each command runs once: whatever else the machine does meets all alike.
ROUNDS = 9
NUMPY = "import numpy"
COMMAND = "import sys; from fairseq_knnlm.cli import main; sys.exit(main())"


def measure() -> dict[str, float]:
    """Seconds to an answer, medians, as ratios to ``python -c "import numpy"``.

    Returns:
        ``help_over_numpy`` and ``info_over_numpy``, and the seconds themselves: ``help_seconds``,
        ``info_seconds`` and ``numpy_seconds``.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = small_store(Path(folder) / "store")
        commands = {
            "numpy": [NUMPY],
            "help": [COMMAND, "--help"],
            "info": [COMMAND, "info", "--dstore", str(store)],
        }
        for words in commands.values():  # from here on all is in the disk's cache
            seconds(words)
        taken = {name: [0.0] * ROUNDS for name in commands}
        for turn in range(ROUNDS):
            for name, words in commands.items():
                taken[name][turn] = seconds(words)
    medians = {name: statistics.median(each) for name, each in taken.items()}
    return {
        "help_over_numpy": medians["help"] / medians["numpy"],
        "info_over_numpy": medians["info"] / medians["numpy"],
        **{f"{name}_seconds": each for name, each in medians.items()},
    }


def seconds(words: Sequence[str]) -> float:
    """That a fresh Python takes for a program, as a user waits for it."""
    started = time.perf_counter()
    command = [sys.executable, "-c", *words]  # which looks for the package where it runs
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def small_store(folder: Path) -> Path:
    """A datastore of a thousand entries, without an index."""
    rows, width = 1000, 16
    rng = np.random.default_rng(0)
    origin = Origin("a" * 64, "b" * 64, vocabulary=50, key_type="last_ffn_input", split="train")
    writer = DatastoreWriter(folder, rows, width, origin)
    keys, values = rng.normal(size=(rows, width)), rng.integers(0, 50, rows)
    writer.write(np.arange(rows), keys.astype(np.float16), values)
    return writer.publish()


if __name__ == "__main__":
    for name, figure in measure().items():
        print(f"{name:<16} {figure:.2f}")
