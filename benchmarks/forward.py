"""``fairseq-eval-lm`` whose scorer runs the language model up to its features, and no further.

    python benchmarks/forward.py DATA --path CHECKPOINT --gen-subset test ...

What fairseq reports as its speed is then that of the forward pass alone; it finds no loss.
"""

import sys
from pathlib import Path
from typing import Any

from fairseq_cli import eval_lm

# Also from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fairseq_knnlm.lm.transformer import TransformerLM


class FeaturesOnly:
    """Has the interface of fairseq's ``SequenceScorer``, and scores nothing."""

    def __init__(self, dictionary: Any, *_: Any) -> None:
        self.pad = dictionary.pad()

    def generate(self, models: Any, sample: Any, **_: Any) -> list[Any]:
        TransformerLM(models[0]).encode(sample["net_input"], sample["target"].ne(self.pad))
        return []


if __name__ == "__main__":
    eval_lm.SequenceScorer = FeaturesOnly
    eval_lm.cli_main()
