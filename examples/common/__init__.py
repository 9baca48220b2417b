"""What the demo, the experiments and the benchmarks share: running commands."""
