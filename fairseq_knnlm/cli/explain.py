"""``fairseq-knnlm explain``: where the probability of each token of a text came from."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from fairseq_knnlm.bounds import MOST_ENTRIES, check_range
from fairseq_knnlm.cli.explained import check_token, show_record, show_token, token_of
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.explanation.record_file import Record, read_record, write_record
from fairseq_knnlm.files import check_outputs
from fairseq_knnlm.runs.places import check_apart

HELP = "show who gave each token of a text its probability, and from which entries"
EXAMPLE = (
    "--dstore DSTORE data-bin --path checkpoint_best.pt --gen-subset test --rows 0:200 "
    "--tokens-per-sample 512 --html explain.html"
)

#: Ways of naming what is explained.
WAYS = ("--text", "--rows", "--sources")
#: Most that can be asked for of one token.
MOST_SOURCES = 1000
#: Tokens that are explained of a split at once; they are held in memory.
MOST_ROWS = 100_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A text, or a file that ``--json`` or ``generate --sources`` wrote."""
    parser.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help="folder that fairseq-preprocess wrote; further flags behind it go to fairseq, such as "
        "--k, --lmbda, --experts, --bpe and --tokens-per-sample",
    )
    parser.add_argument("--dstore", help="datastore folder; several with : between them")
    parser.add_argument("--path", help="checkpoint of the language model")
    parser.add_argument("--text", help="to explain: a text")
    parser.add_argument("--gen-subset", help="with --rows: split (default: test)")
    parser.add_argument(
        "--rows",
        metavar="A:B",
        help="to explain: tokens A to B of the split, the first is 0, without B itself; in the "
        "blocks of --tokens-per-sample and --context-window",
    )
    parser.add_argument(
        "--sources",
        type=Path,
        metavar="FILE",
        help="to show: what --json wrote, or `fairseq-knnlm generate --sources`",
    )
    parser.add_argument("--html", type=Path, metavar="PAGE", help="write a page to look at")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write JSON lines, one a text")
    parser.add_argument(
        "--token", type=int, metavar="N", help="print all about one token; the first is 1"
    )
    parser.add_argument(
        "--sources-per-token",
        type=int,
        metavar="N",
        help="entries that are named of each token (default: 8)",
    )


def check(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Refuses what can be refused before a model is loaded, and files that cannot be written."""
    given = [way for way in WAYS if getattr(args, way[2:]) is not None]
    if len(given) != 1:
        raise ConfigError(
            "explain explains one thing",
            expected="--text TEXT, --rows A:B of --gen-subset, or --sources FILE",
            found=" and ".join(given) or "none of them",
        )
    check_range("--token", args.token, 1, MOST_ENTRIES, "names a token, the first is 1")
    number = args.sources_per_token
    check_range("--sources-per-token", number, 0, MOST_SOURCES, "counts entries")
    (_check_file if args.sources is not None else _check_text)(args)
    outputs = {"--json": args.json, "--html": args.html}
    check_apart(outputs, {"--sources": [args.sources] if args.sources is not None else []})
    check_outputs(outputs)


def _check_file(args: argparse.Namespace) -> None:
    flags = ("data", "dstore", "path", "gen_subset", "sources_per_token")
    for name in flags:
        if getattr(args, name) is not None:
            flag = "DATA" if name == "data" else f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{flag} does nothing with --sources",
                expected="--sources FILE, with --html, --json or --token",
                found=flag,
                do="leave it out: the file holds what was found when it was written",
            )


def _check_text(args: argparse.Namespace) -> None:
    for flag, value, what in (
        ("--dstore", args.dstore, "--dstore DSTORE, a memory to look into"),
        ("DATA", args.data, "DATA, a folder that fairseq-preprocess wrote"),
        ("--path", args.path, "--path CHECKPOINT"),
    ):
        if value is None:
            raise ConfigError(f"explain needs {flag}", expected=what, found="nothing")
    if args.text is not None:
        _check_alone(args)
    else:
        rows = parse_rows(args.rows)
        check_range("--token", args.token, 1, len(rows), "names one of the rows, the first is 1")
    from fairseq_knnlm.tasks.stock import check_checkpoint, check_data, check_split

    check_data(args.data)
    if args.rows is not None:
        check_split(args.data, args.gen_subset or "test")
    check_checkpoint(args.path, one=True)


def _check_alone(args: argparse.Namespace) -> None:
    """A text that somebody typed."""
    if args.gen_subset is not None:
        raise ConfigError(
            "--gen-subset does nothing with --text",
            expected="--rows A:B with it",
            found="--text",
        )
    if not args.text.strip():
        raise ConfigError("--text is empty", expected="at least a word", found=repr(args.text))


def parse_rows(words: str) -> range:
    """The rows that ``A:B`` names.

    Raises:
        ConfigError: where it names none, or too many.
    """
    found = re.fullmatch(r"(\d{1,15}):(\d{1,15})", words, flags=re.ASCII)
    rows = range(int(found[1]), int(found[2])) if found else range(0)
    if not 0 < len(rows) <= MOST_ROWS:
        raise ConfigError(
            "--rows names tokens of a split",
            expected=f"A:B, A below B, at most {MOST_ROWS:,} tokens, as in 0:200",
            found=repr(words),
        )
    return rows


def run(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Explains the text, or reads what was explained; writes what is asked for, and shows it."""
    record = read_record(args.sources) if args.sources is not None else _explained(args, rest)
    chosen = token_of(record, args.token) if args.token is not None else None
    if args.json is not None:
        write_record(args.json, record)
    if args.html is not None:
        _write_page(args.html, record)
    if chosen is not None:
        show_token(record.run, args.token, chosen)
    else:
        show_record(record)
    for path in (args.json, args.html):
        if path is not None:
            print(f"written to {path}")


def _write_page(path: Path, record: Record) -> None:
    from fairseq_knnlm.explanation.page import write_page

    shown, left_out = write_page(path, record.run, record.texts)
    if left_out:
        print(f"the page has room for the first {shown:,} texts of {shown + left_out:,}")


def _explained(args: argparse.Namespace, rest: Sequence[str]) -> Record:
    """What is found of the text, all of it."""
    import fairseq_knnlm.tasks  # noqa: F401  before fairseq, of which it keeps noise off the screen
    from fairseq_knnlm.runs.explain import SOURCES, explain_rows, explain_texts
    from fairseq_knnlm.tasks.loading import check_writes_nothing
    from fairseq_knnlm.tasks.session import open_session
    from fairseq_knnlm.tasks.split import open_rows

    flags = ["--path", args.path, "--knnlm", "--dstore-filename", args.dstore, *rest]
    session = open_session(args.data, flags)
    what, of_split = "where a text is explained", args.text is None
    check_writes_nothing(session.task.options, what, reads_split=of_split)
    most = SOURCES if args.sources_per_token is None else args.sources_per_token
    if args.text is None:
        rows = parse_rows(args.rows)
        inputs, found = open_rows(session, args.gen_subset or "test", rows)
        record = explain_rows(inputs, session.spelling, found, sources=most)
    else:
        tokens = session.spelling.tokens(args.text)
        _warn_of_unknown(tokens, session.spelling.unknown)
        check_token(args.token, len(tokens))
        inputs, spelling = session.inputs, session.spelling
        record = explain_texts(inputs, spelling, [tokens], names=["text"], sources=most)
    return Record(record.run, list(record.texts))


def _warn_of_unknown(tokens: Sequence[int], unknown: int) -> None:
    import logging

    count = sum(token == unknown for token in tokens)
    if count == len(tokens):
        logging.getLogger(__name__).warning(
            "the dictionary has none of the text's words: all of them are explained as unknown ones"
        )
