"""``fairseq-knnlm generate``: prompts continued with a memory, and where each word came from."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from fairseq_knnlm.bounds import MOST, check_range, check_seed
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.files import check_outputs
from fairseq_knnlm.runs.places import check_apart

if TYPE_CHECKING:
    from fairseq_knnlm.tasks.session import Session

HELP = "continue prompts with a memory, and say where each word came from"
EXAMPLE = (
    "--dstore DSTORE data-bin --path checkpoint_best.pt --prompts prompts.txt --new-tokens 64 "
    "--sources sources.jsonl --sampling --sampling-topp 0.9"
)

logger = logging.getLogger(__name__)
#: Tokens of a batch of prompts where no flag says otherwise: so much is read at once.
BATCH = 16
#: Flags of fairseq's in whose place there are ours.
OURS = {"--max-len-a": "--new-tokens", "--max-len-b": "--new-tokens", "--input": "--prompts"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Prompts, and how they go on; other flags go to fairseq."""
    parser.add_argument("data", metavar="DATA", help="folder that fairseq-preprocess wrote")
    parser.add_argument("--path", required=True, help="checkpoint of the language model")
    parser.add_argument(
        "--dstore", required=True, help="datastore folder; several with : between them"
    )
    parser.add_argument(
        "--prompts", default="-", metavar="FILE", help="a prompt a line; - for what is typed"
    )
    parser.add_argument(
        "--new-tokens", type=int, default=64, metavar="N", help="tokens that follow (default: 64)"
    )
    parser.add_argument(
        "--lines", action="store_true", help="go on behind the end of a line, up to --new-tokens"
    )
    parser.add_argument(
        "--speculate",
        choices=("auto", "on", "off"),
        default="auto",
        help="draft several tokens, by the text and its neighbours, and check them at once; the "
        "text stays the same (default: auto, for batches in which that pays)",
    )
    parser.add_argument("--sources", type=Path, metavar="OUT", help="write where each came from")
    parser.add_argument("--seed", type=int, default=1, help="of --sampling (default: 1)")
    parser.add_argument("--batch-size", type=int, default=BATCH, help=f"default: {BATCH}")


def check(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Refuses what can be refused before a model is loaded."""
    check_range("--new-tokens", args.new_tokens, 0, MOST, "counts tokens")
    check_range("--batch-size", args.batch_size, 1, MOST, "counts texts")
    check_seed(args.seed)
    for word in rest:
        if (flag := word.split("=")[0]) in OURS:
            raise ConfigError(
                f"{flag} does nothing here", expected=OURS[flag], found=flag, do="leave it out"
            )
    prompts = [Path(args.prompts)] if args.prompts != "-" else []
    if prompts and not prompts[0].is_file():
        raise ConfigError(
            f"no prompts in {args.prompts}",
            expected="--prompts FILE, a prompt a line",
            found="no file",
        )
    check_apart({"--sources": args.sources}, {"--prompts": prompts})
    check_outputs({"--sources": args.sources})
    from fairseq_knnlm.tasks.stock import check_checkpoint, check_data

    check_data(args.data)
    check_checkpoint(args.path, one=True)


def run(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Continues the prompts, prints a text each, and writes its sources."""
    import fairseq_knnlm.tasks  # noqa: F401  before fairseq, of which it keeps noise off the screen
    from fairseq_knnlm.runs.generate import check_prompts
    from fairseq_knnlm.tasks.loading import check_writes_nothing
    from fairseq_knnlm.tasks.session import open_session

    flags = ["--path", args.path, "--knnlm", "--dstore-filename", args.dstore]
    flags += ["--speculate", args.speculate, "--beam", "1", "--seed", str(args.seed), *rest]
    session = open_session(args.data, flags)
    check_writes_nothing(session.task.options)
    prompts = [session.spelling.tokens(line) for line in _lines(args.prompts)]
    _name_unknown(prompts, session.spelling.unknown)
    check_prompts(prompts, args.new_tokens, session.longest)
    written = []
    for tokens in _written(args, session, prompts):
        text = session.spelling.text(_without_end(tokens, session.inputs.vocabulary.eos))
        print(text, end="\n\n" if args.lines else "\n")
        sys.stdout.flush()
        written.append(tokens)
    if args.sources is not None:
        _write_sources(args.sources, session, prompts, written)


def _lines(name: str) -> list[str]:
    """The prompts."""
    try:
        if name == "-":
            return sys.stdin.buffer.read().decode().splitlines()
        return Path(name).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(
            "the prompts are no text",
            expected="UTF-8, a prompt a line",
            found=str(error),
        ) from None


def _without_end(tokens: Sequence[int], eos: int) -> Sequence[int]:
    """A text without what ends it, which is none of its own."""
    last = len(tokens)
    while last and tokens[last - 1] == eos:
        last -= 1
    return tokens[:last]


def _name_unknown(prompts: Sequence[Sequence[int]], unknown: int) -> None:
    tokens = sum(map(len, prompts))
    count = sum(token == unknown for prompt in prompts for token in prompt)
    if count:
        logger.warning(
            "%s of the prompts' %s tokens are not in the dictionary: the model reads <unk> there",
            *(f"{count:,}", f"{tokens:,}"),
        )


def _written(
    args: argparse.Namespace, session: Session, prompts: Sequence[Sequence[int]]
) -> Iterator[list[int]]:
    """The tokens of each text, its prompt's first."""
    from fairseq_knnlm.generation.loop import Counts
    from fairseq_knnlm.runs.generate import Generation, continued
    from fairseq_knnlm.tasks.decoding import by_search, decoding, wants_search

    if wants_search(session.cfg.generation):
        if args.lines or args.speculate == "on":
            raise ConfigError(
                "--lines and --speculate on write one text at a time, token by token",
                expected="--beam 1",
                found="flags of a beam search",
            )
        yield from by_search(session, prompts, args.new_tokens, args.batch_size)
        return
    eos = session.inputs.vocabulary.eos
    how = Generation(
        args.new_tokens,
        session.cfg.generation.min_len,
        None if args.lines else eos,
        decoding(session),
        args.batch_size,
        session.inputs.options.generation.wanted,
    )
    counts, started = Counts(), time.perf_counter()
    total = len(prompts) * args.new_tokens
    with tqdm(total=total, desc="writing", unit=" tokens", disable=None) as bar:
        for text in continued(session.inputs, prompts, how, counts, bar.update):
            yield text.tokens
    _report(counts, time.perf_counter() - started)


def _report(counts: object, seconds: float) -> None:
    from fairseq_knnlm.generation.loop import Counts

    assert isinstance(counts, Counts)
    logger.info(
        "%s tokens in %.1f s, %.0f tokens/s, %.2f tokens a step%s",
        *(f"{counts.tokens:,}", seconds, counts.tokens / max(seconds, 1e-9)),
        counts.tokens / max(counts.steps, 1),
        f"; {counts.kept:,} of {counts.drafted:,} drafted tokens were kept"
        if counts.drafted
        else "",
    )


def _write_sources(
    path: Path,
    session: Session,
    prompts: Sequence[Sequence[int]],
    written: Sequence[Sequence[int]],
) -> None:
    from fairseq_knnlm.explanation.record_file import write_record
    from fairseq_knnlm.runs.explain import explain_texts

    told = [number for number, tokens in enumerate(written) if tokens]
    record = explain_texts(
        session.inputs,
        session.spelling,
        [written[number] for number in told],
        [len(prompts[number]) for number in told],
        names=[f"prompt {number + 1}" for number in told],
    )
    write_record(path, record)
    logger.info("sources: %s", path)
