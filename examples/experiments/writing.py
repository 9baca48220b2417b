"""Does a language model write better with a memory?

Prompts of test are continued by the language model alone, with its nearest neighbours at the weight
and temperature that were fitted, at that weight and temperature 1, and with the mixture that
evaluation uses, each by the likeliest tokens and by sampling.
What comes out is measured beside what people wrote there: how likely it is to n-grams of valid,
which neither model nor datastore was made of, how varied and how repetitive it is, how much of it
stands in the datastore's text, in the prompt and in the true continuation.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import text_measures as measures
from scores import command, show
from steps import ended

import fairseq_knnlm.tasks  # noqa: F401  before fairseq, of which it keeps noise off the screen
from fairseq_knnlm.bounds import MOST, check_range, check_seed
from fairseq_knnlm.datastore import open_datastore
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.experts.kind import check_unmerged
from fairseq_knnlm.experts.kneser_ney import NGramModel
from fairseq_knnlm.files import publish
from fairseq_knnlm.files.plain_json import write_json
from fairseq_knnlm.generation.loop import Counts
from fairseq_knnlm.runs.generate import Generation, check_prompts, continued, make_writer
from fairseq_knnlm.runs.mixing import describe
from fairseq_knnlm.tasks.decoding import decoding
from fairseq_knnlm.tasks.session import Session, open_session
from fairseq_knnlm.tasks.stock import check_checkpoint, check_data, check_split
from fairseq_knnlm.versions import versions

EXAMPLE = """\
example: python examples/experiments/writing.py demo/data/reference
         --path demo/lm/checkpoint_best.pt --dstore demo/datastores/reference --out writing --cpu

Flags that are not its own go to fairseq.
"""
ALONE = "LM alone"
PEOPLE = "people"
#: Who writes -> flags that make it so.
WRITERS: Mapping[str, Sequence[str]] = {
    ALONE: ("--experts", "knn", "--mixer", "fixed", "--lmbda", "0"),
    "kNN, fixed": ("--experts", "knn", "--mixer", "fixed"),
    "kNN, T 1": ("--experts", "knn", "--mixer", "fixed", "--knn-temp", "1"),
    "default mixture": (),
}
#: How tokens are chosen -> what that changes of fairseq's defaults.
CHOICES: Mapping[str, Mapping[str, Any]] = {
    "greedy": {},
    "top-p 0.9": {"sampling": True, "top_p": 0.9},
}
#: Tokens of the judge's longest n-grams.
ORDER = 5
#: Tokens of a stretch that counts as copied.
COPIED = 8
NGRAMS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Yardsticks:
    """What texts are measured by.

    Attributes:
        prompts: (T, P) int64, ids.
        truths: (T, N) int64, what people wrote after them.
        judge: n-grams of valid.
        sources: (M,) ids of each datastore's text.
    """

    prompts: np.ndarray
    truths: np.ndarray
    judge: NGramModel
    sources: Sequence[np.ndarray]

    def measured(self, texts: np.ndarray) -> dict[str, np.ndarray]:
        """Measures of each of the texts (T, N): (T,)."""
        true = {f"true_{n}": measures.shared(texts, self.truths, n) for n in NGRAMS}
        return {
            "nats": measures.nats(self.judge, self.prompts, texts),
            "repeated": measures.repeated(texts),
            "looping": measures.looping(texts),
            "copied": measures.copied(texts, self.sources, COPIED),
            "echoed": measures.echoed(texts, self.prompts),
            **true,
        }


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what of it goes to fairseq."""
    parser = command(__doc__, EXAMPLE)
    option = parser.add_argument
    option("data", type=Path, help="folder that fairseq-preprocess wrote")
    option("--path", type=Path, required=True, help="checkpoint of the language model")
    option("--dstore", required=True, help="its datastore, calibrated; several with : between them")
    option("--out", type=Path, required=True, help="folder of all that is made; kept between runs")
    option("--prompts", type=int, default=500, help="at most, as test has room (default: 500)")
    option("--prompt-tokens", type=int, default=32, metavar="N", help="of each (default: 32)")
    option("--new-tokens", type=int, default=64, metavar="N", help="that follow (default: 64)")
    option("--batch-size", type=int, default=50, help="prompts at a time (default: 50)")
    option("--seed", type=int, default=1, help="of sampling (default: 1)")
    return parser.parse_known_args()


def check(args: argparse.Namespace) -> None:
    """Refuses what can be refused before a model is loaded."""
    check_range("--prompts", args.prompts, 1, MOST, "counts prompts")
    check_range("--prompt-tokens", args.prompt_tokens, ORDER, MOST, "counts tokens")
    check_range("--new-tokens", args.new_tokens, COPIED, MOST, "counts tokens")
    check_range("--batch-size", args.batch_size, 1, MOST, "counts texts")
    check_seed(args.seed)
    check_data(str(args.data))
    check_checkpoint(str(args.path), one=True)
    for split in ("valid", "test"):
        check_split(str(args.data), split)


def opened(args: argparse.Namespace, flags: Sequence[str], rest: Sequence[str]) -> Session:
    """A model and its memory."""
    words = ["--path", str(args.path), "--knnlm", "--dstore-filename", args.dstore]
    # Of a flag given twice the last counts: alone is alone, whatever weight the neighbours get.
    return open_session(str(args.data), [*words, "--seed", str(args.seed), *rest, *flags])


def yardsticks(args: argparse.Namespace, session: Session) -> Yardsticks:
    """Prompts of test, n-grams of valid, the datastores' text.

    Raises:
        ConfigError: where test has no room for a prompt, or a datastore no longer holds its text.
    """
    stores = [open_datastore(Path(name), load_keys=False) for name in args.dstore.split(":")]
    for store in stores:
        check_unmerged(store, "the text that may be copied", "name the original datastore")
    test, size = text_of(args.data, session, "test"), args.prompt_tokens + args.new_tokens
    starts = measures.spread(len(test), args.prompts, size)
    if not len(starts):
        raise ConfigError(
            "the test text is too short",
            expected=f"at least {size:,} tokens, a prompt and its continuation",
            found=f"{len(test):,}",
        )
    cut = np.stack([test[start : start + size] for start in starts])
    vocabulary = len(session.inputs.vocabulary.symbols)
    judge = NGramModel.count(text_of(args.data, session, "valid"), vocabulary, ORDER)
    texts = [store.values for store in stores]
    return Yardsticks(cut[:, : args.prompt_tokens], cut[:, args.prompt_tokens :], judge, texts)


def text_of(data: Path, session: Session, split: str) -> np.ndarray:
    """(N,) int64: all tokens of a split, ends of lines included."""
    from fairseq.data.data_utils import load_indexed_dataset

    lines = load_indexed_dataset(str(data / split), session.task.target_dictionary)
    return np.concatenate([lines[number].numpy() for number in range(len(lines))]).astype(np.int64)


def written(
    path: Path, args: argparse.Namespace, session: Session, prompts: np.ndarray, how: str
) -> np.ndarray:
    """(T, N) int64: what follows the prompts, as ``fairseq-knnlm generate --lines`` has it.

    It stays in a file, so that an experiment that was stopped goes on where it was.

    Raises:
        ConfigError: where the file there is of other prompts.
    """
    if not path.exists():
        started = time.perf_counter()
        chosen = replace(decoding(session), **CHOICES[how])
        generation = Generation(args.new_tokens, 0, None, chosen, args.batch_size)
        texts = continued(session.inputs, prompts.tolist(), generation, Counts())
        with publish(path) as temporary, temporary.open("wb") as file:
            np.save(file, np.array([text.tokens for text in texts]))
        print(f"    {how}: {time.perf_counter() - started:.0f} s", flush=True)
    whole = np.load(path, allow_pickle=False)
    shape = (len(prompts), prompts.shape[1] + args.new_tokens)
    if whole.shape != shape or (whole[:, : prompts.shape[1]] != prompts).any():
        raise ConfigError(
            f"{path} is of other prompts",
            expected="texts of the same data and flags",
            do="name another folder with --out",
        )
    return whole[:, prompts.shape[1] :]


def main() -> None:
    args, rest = arguments()
    check(args)
    args.out.mkdir(parents=True, exist_ok=True)
    texts: dict[str, np.ndarray] = {}
    mixtures: dict[str, str] = {}
    for writer, flags in WRITERS.items():
        session = opened(args, flags, rest)
        if not texts:
            sticks = yardsticks(args, session)
            check_prompts(sticks.prompts.tolist(), args.new_tokens, session.longest)
            print(f"{len(sticks.prompts):,} prompts, {args.new_tokens} tokens after each")
            texts[PEOPLE] = sticks.truths
        mixtures[writer] = describe(make_writer(session.inputs).mixture.mixer)
        print(f"{writer}: {mixtures[writer]}", flush=True)
        for how in CHOICES:
            name = f"{writer}, {how}"
            texts[name] = written(args.out / f"{name}.npy", args, session, sticks.prompts, how)
    keep_texts(args.out / "texts.jsonl", session, sticks.prompts, texts)
    found = summed_up(sticks, texts)
    settings: dict[str, Any] = {"judge_order": ORDER, "copied": COPIED, "choices": dict(CHOICES)}
    settings |= {name: str(x) if isinstance(x, Path) else x for name, x in vars(args).items()}
    results = {
        "versions": versions(),
        "settings": settings | {"flags": rest},
        "prompts": len(sticks.prompts),
        "judge_tokens": sticks.judge.tokens,
        "datastore_tokens": sum(map(len, sticks.sources)),
        "mixtures": mixtures,
        "texts": found,
    }
    write_json(args.out / "results.json", results)
    report(found)


def keep_texts(
    path: Path, session: Session, prompts: np.ndarray, texts: Mapping[str, np.ndarray]
) -> None:
    """Writes prompts and what follows each, for people to read: JSON, a prompt a line."""
    spelled = session.spelling.text
    with publish(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for number, prompt in enumerate(prompts):
            # Spelled with its prompt: whether a space comes first depends on what stands before.
            start = spelled(prompt)
            after = {
                name: spelled([*prompt, *some[number]]).removeprefix(start)
                for name, some in texts.items()
            }
            file.write(json.dumps({"prompt": start, **after}, ensure_ascii=False) + "\n")


def summed_up(sticks: Yardsticks, texts: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """For each text its measures, how far these may be off, and the same of their differences from
    the language model alone where it chose tokens in the same way.
    """
    each = {name: sticks.measured(some) for name, some in texts.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, mine in each.items():
        found[name] = {f"distinct_{n}": measures.distinct(texts[name], n) for n in NGRAMS}
        for measure, values in mine.items():
            value, error = measures.mean(values)
            found[name][measure] = {"mean": value, "error": error}
            if name != PEOPLE:
                base = each[f"{ALONE}, {name.rsplit(', ', 1)[1]}"]
                change, error = measures.mean(values - base[measure])
                found[name][measure] |= {"change": change, "change_error": error}
    return found


def report(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints the tables."""
    print("\nShares in %.\n")
    show(
        ["text", "perplexity", *(f"distinct-{n}" for n in NGRAMS), "repeated", "loops"],
        [
            [name, perplexity(one["nats"]), *(f"{100 * one[f'distinct_{n}']:.1f}" for n in NGRAMS)]
            + [percent(one["repeated"]), percent(one["looping"])]
            for name, one in found.items()
        ],
    )
    print()
    show(
        ["text", "copied", "echoed", *(f"true {n}-grams" for n in NGRAMS)],
        [
            [name, percent(one["copied"]), percent(one["echoed"])]
            + [percent(one[f"true_{n}"]) for n in NGRAMS]
            for name, one in found.items()
        ],
    )


def perplexity(nats: Mapping[str, float]) -> str:
    """Of a mean of nats a token, and how far it may be off."""
    value = math.exp(nats["mean"])
    return f"{value:.0f} ± {value * nats['error']:.0f}"


def percent(share: Mapping[str, float]) -> str:
    """A mean share and how far it may be off, in percent."""
    return f"{100 * share['mean']:.1f} ± {100 * share['error']:.1f}"


if __name__ == "__main__":
    sys.exit(ended(main))
