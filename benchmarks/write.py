"""Continues prompts, with stock fairseq or with a memory, and says how long that took.

    python benchmarks/write.py DATA --path CHECKPOINT --prompts FILE --out FILE.json
    python benchmarks/write.py DATA --path CHECKPOINT --prompts FILE --out FILE.json --knnlm ...

Stock is the hub interface with the task ``language_modeling``, in whose process nothing of this
package is loaded. With ``--knnlm``, and whatever other flags of ``knn_lm`` follow, it is what
``fairseq-knnlm generate`` runs. Either takes the likeliest token, and no text ends early.
"""

import argparse
import functools
import json
import sys
import time
import types
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Also from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

#: Prompts that are continued first, untimed; a batch of them at least.
WARM_UP = 2


@dataclass
class Written:
    """What was written, and what it took.

    Attributes:
        texts: ids of each text, its prompt's first, without the one that ends it.
        log_probs: of the ids that were written, natural log.
        tokens: that were written, ends included, since they take a step as others do.
        steps: forward passes of a text; 0 where nobody counts them.
        drafted: tokens of drafts.
        kept: of these.
        seconds: in all.
        parts: seconds of its parts.
    """

    texts: list[list[int]] = field(default_factory=list)
    log_probs: list[list[float]] = field(default_factory=list)
    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    kept: int = 0
    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)


Write = Callable[[Sequence[str]], Written]


def stock(args: argparse.Namespace) -> Write:
    """fairseq's own generation, by its hub interface."""
    import numpy as np
    from fairseq import checkpoint_utils, options, tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq.hub_utils import GeneratorHubInterface

    if not hasattr(np, "compat"):  # fairseq's data sets of prompts want what NumPy 2 has no more
        np.compat = types.SimpleNamespace(long=np.int64)  # type: ignore[attr-defined]
    flags = ["--task", "language_modeling", "--path", args.path, "--cpu"]
    words = [args.data, *flags, "--batch-size", str(args.batch)]
    parser = options.get_interactive_generation_parser(default_task="language_modeling")
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, words))
    task = tasks.setup_task(cfg.task)
    models, _ = checkpoint_utils.load_model_ensemble([args.path], task=task)
    hub = GeneratorHubInterface(cfg, task, models)

    def write(lines: Sequence[str]) -> Written:
        prompts = [hub.binarize(line) for line in lines]  # with an end, which fairseq takes off
        given = len(prompts[0]) - 1
        length = given + args.new
        found = hub.generate(prompts, beam=1, min_len=length, max_len_a=0, max_len_b=length)
        texts = [best["tokens"].tolist()[:-1] for best, *_ in found]
        said = [best["positional_scores"].tolist()[given:-1] for best, *_ in found]
        return Written(texts, said, tokens=sum(len(text) + 1 - given for text in texts))

    return write


def with_memory(args: argparse.Namespace, flags: Sequence[str]) -> Write:
    """What ``fairseq-knnlm generate`` does once it has read its prompts."""
    import fairseq_knnlm.tasks  # noqa: F401  before fairseq, as the command does
    from fairseq_knnlm.generation.loop import Counts
    from fairseq_knnlm.runs.generate import Generation, continued
    from fairseq_knnlm.tasks.decoding import decoding
    from fairseq_knnlm.tasks.session import open_session

    session = open_session(args.data, ["--path", args.path, "--cpu", "--beam", "1", *flags])
    dictionary, inputs = session.task.source_dictionary, session.inputs

    def write(lines: Sequence[str]) -> Written:
        prompts = [
            dictionary.encode_line(line, append_eos=False, add_if_not_exist=False).tolist()
            for line in lines
        ]
        how = Generation(
            args.new,
            len(prompts[0]) + args.new,
            inputs.vocabulary.eos,
            decoding(session),
            args.batch,
            inputs.options.generation.wanted,
        )
        counts = Counts()
        texts = list(continued(inputs, prompts, how, counts))
        said = [text.log_probs for text in texts]
        return Written([text.tokens for text in texts], said, **asdict(counts))

    return write


class Parts:
    """Seconds that parts of our own writing take, each without those inside of it.

    Attributes:
        seconds: by the part's name.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inside: list[float] = []  # seconds of what ran inside of each part that runs now

    def watch_ours(self) -> None:
        """Has those parts add up their seconds from now on."""
        from fairseq_knnlm.generation.choosing import Decoding
        from fairseq_knnlm.generation.drafts import Drafts
        from fairseq_knnlm.lm.reading import Reading
        from fairseq_knnlm.lm.transformer import TransformerLM
        from fairseq_knnlm.mixture.model import MixtureLM, Weighed
        from fairseq_knnlm.retrieval.local import LocalRetriever

        self.watch(Reading, "read", "decoder")
        self.watch(TransformerLM, "log_probs", "output layer")
        self.watch(LocalRetriever, "search", "search")
        self.watch(MixtureLM, "predict", "experts")
        self.watch(MixtureLM, "read", "experts")
        self.watch(Weighed, "log_probs", "mixing")
        self.watch(Decoding, "choose", "choosing")
        self.watch(Drafts, "of", "drafts")

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Has a method of a class add the seconds that it takes to those of ``name``."""
        original = getattr(owner, method)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            started = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                spent = time.perf_counter() - started
                self.seconds[name] += spent - self._inside.pop()
                if self._inside:
                    self._inside[-1] += spent

        setattr(owner, method, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    option = parser.add_argument
    option("data", help="folder that fairseq-preprocess wrote")
    option("--path", required=True, help="checkpoint of the language model")
    option("--prompts", type=Path, required=True, help="symbols of the dictionary, as many a line")
    option("--new", type=int, default=64, help="tokens that follow each")
    option("--batch", type=int, default=1, help="texts at a time")
    option("--out", type=Path, required=True, help="JSON file to write")
    args, flags = parser.parse_known_args()
    lines = args.prompts.read_text(encoding="utf-8").splitlines()
    write = with_memory(args, flags) if flags else stock(args)
    parts = Parts()
    if flags:
        parts.watch_ours()
    write(lines[: max(args.batch, WARM_UP)])
    parts.seconds.clear()
    started = time.perf_counter()
    written = write(lines)
    written.seconds = time.perf_counter() - started
    written.parts = dict(parts.seconds)
    args.out.write_text(json.dumps(asdict(written)), encoding="utf-8")


if __name__ == "__main__":
    main()
