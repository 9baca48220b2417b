"""Computes the kNN-LM of some test tokens again, in plain NumPy, and compares.

    python check.py --dstore DSTORE --queries TEST_DSTORE --score-table test.npz --tokens 2000

TEST_DSTORE is a datastore of the test split saved with --dstore-fp32: its keys are the queries.
Nothing of fairseq_knnlm, fairseq, torch or FAISS takes part: the k nearest of all keys are found by
brute force, their distances computed in float64, and equations 2 and 3 of Khandelwal et al. (2020)
written out. Ends with exit code 1 where a log-probability differs by more than --tolerance.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

CHUNK = 65536


def nearest(queries: np.ndarray, keys: np.ndarray, k: int) -> np.ndarray:
    """Rows of the k nearest keys by squared L2, (N, k), found chunk by chunk."""
    best = np.full((len(queries), k), np.inf, np.float32)
    rows = np.zeros((len(queries), k), np.int64)
    norms = (queries**2).sum(axis=1, keepdims=True)
    for start in range(0, len(keys), CHUNK):
        chunk = keys[start : start + CHUNK].astype(np.float32)
        distances = norms - 2 * queries @ chunk.T + (chunk**2).sum(axis=1)
        found = np.argpartition(distances, min(k, len(chunk)) - 1, axis=1)[:, :k]
        candidates = np.concatenate([best, np.take_along_axis(distances, found, 1)], axis=1)
        candidate_rows = np.concatenate([rows, found + start], axis=1)
        kept = np.argpartition(candidates, k - 1, axis=1)[:, :k]
        best = np.take_along_axis(candidates, kept, 1)
        rows = np.take_along_axis(candidate_rows, kept, 1)
        print(f"\r{start + len(chunk):,} of {len(keys):,} keys", end="", file=sys.stderr)
    print(file=sys.stderr)
    return rows


def log_mixture(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, token: int, lm: float, knn: dict
) -> float:
    """log(lambda p_kNN + (1 - lambda) p_LM) of one token, from its k nearest entries."""
    distances = ((keys.astype(np.float64) - query) ** 2).sum(axis=1)
    weights = np.exp(-(distances - distances.min()) / knn["temperature"])
    p_knn = weights[values == token].sum() / weights.sum()
    return float(np.log(knn["weight"] * p_knn + (1 - knn["weight"]) * np.exp(lm)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compare a score table with plain NumPy.",
        epilog="example: check.py --dstore DSTORE --queries TEST --score-table test.npz",
    )
    parser.add_argument("--dstore", type=Path, required=True)
    parser.add_argument("--queries", type=Path, required=True)
    parser.add_argument("--score-table", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    table = np.load(args.score_table)
    card = json.loads(str(table["card"][0]))
    _, knn = card["weights"]  # the language model stands first
    setting = {name: value for name, value in knn.items() if name not in ("expert", "weight")}
    column = table["knn"][:, card["experts"]["knn"].index(setting)]
    keys = np.load(args.dstore / "keys.npy", mmap_mode="r")
    values = np.load(args.dstore / "values.npy")
    asked = np.load(args.queries / "keys.npy", mmap_mode="r")
    tokens = np.load(args.queries / "values.npy")
    assert np.array_equal(table["token"], tokens), "the table is of another text"

    rng = np.random.default_rng(args.seed)
    sample = np.sort(rng.choice(len(tokens), size=min(args.tokens, len(tokens)), replace=False))
    queries = asked[sample].astype(np.float32)
    neighbours = nearest(queries, keys, card["k"])
    plain = np.array(
        [
            log_mixture(query, keys[rows], values[rows], tokens[i], table["lm"][i], knn)
            for i, query, rows in zip(sample, queries.astype(np.float64), neighbours, strict=True)
        ]
    )
    mixed = np.logaddexp(
        table["lm"][sample] + np.log(1 - knn["weight"]),
        column[sample] + np.log(knn["weight"]),
    )
    worst = float(np.abs(plain - mixed).max())
    print(f"{len(sample):,} tokens, lambda {knn['weight']:.4f}, T {knn['temperature']:g}")
    print(f"perplexity {np.exp(-plain.mean()):.4f} plain, {np.exp(-mixed.mean()):.4f} in the table")
    print(f"largest difference of a log-probability {worst:.2e} (allowed {args.tolerance:g})")
    return int(worst > args.tolerance)


if __name__ == "__main__":
    sys.exit(main())
