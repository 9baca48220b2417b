"""Runs a command, and says at its end how much memory it held at most.

    python benchmarks/peak.py fairseq-eval-lm DATA ...

A process of its own does this, since what a system counts for a child begins with its parent's.
"""

import resource
import subprocess
import sys

if __name__ == "__main__":
    code = subprocess.run(sys.argv[1:]).returncode
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"peak memory {peak:.3f} GiB", flush=True)
    sys.exit(code)
