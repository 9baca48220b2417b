"""From words to a subcommand, and from its failures to a message and an exit code."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

from fairseq_knnlm.cli import (
    append,
    build_index,
    cluster,
    columns,
    compact,
    compress,
    convert_checkpoint,
    encode,
    explain,
    forget,
    generate,
    import_,
    info,
    replay,
    report,
    save,
    tune,
    verify,
    wrap,
)
from fairseq_knnlm.cli.common import add_commands
from fairseq_knnlm.errors import ConfigError, told, wants_traceback
from fairseq_knnlm.signals import end_on_request, heard, tell_crashes


class Command(Protocol):
    """What a file of a subcommand has in it.

    Attributes:
        HELP: what the subcommand does, in a line.
        EXAMPLE: what to type behind its name.
    """

    HELP: str
    EXAMPLE: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Says what can be typed."""

    def check(self, args: argparse.Namespace, rest: Sequence[str]) -> None:
        """Refuses what can be refused before anything is opened."""

    def run(self, args: argparse.Namespace, rest: Sequence[str]) -> None:
        """Does it, and prints what came of it; ``rest`` are flags for ``fairseq-eval-lm``."""


COMMANDS: dict[str, Command] = {
    "encode": encode,
    "save": save,
    "build-index": build_index,
    "tune": tune,
    "report": report,
    "replay": replay,
    "columns": columns,
    "generate": generate,
    "explain": explain,
    "info": info,
    "verify": verify,
    "compress": compress,
    "append": append,
    "forget": forget,
    "compact": compact,
    "import": import_,
    "convert-checkpoint": convert_checkpoint,
    "wrap": wrap,
    "cluster": cluster,
}


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Runs one subcommand.

    Args:
        argv: arguments, the process's own where left out.
        prog: the command's name in ``--help``.

    Returns:
        The exit code: 0, or 1 after a message on standard error.
    """
    # Where fairseq was imported before, it has set the log to DEBUG, in a format of its own.
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr, force=True)
    end_on_request()
    tell_crashes()
    parser = command_parser(prog)
    args, rest = parser.parse_known_args(argv)
    # Who reads data runs fairseq on it, and passes on what is not ours.
    if rest and not _runs_fairseq(args):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    command = COMMANDS[args.command]
    try:
        _check_words(sys.argv[1:] if argv is None else argv)
        command.check(args, rest)
        command.run(args, rest)
        sys.stdout.flush()
    except BrokenPipeError:  # as in `fairseq-knnlm info ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if wants_traceback():
            raise
        heard()  # while it is in hand: behind this it could be made again
        text, code = told(_in_our_words(error))
        print(text, file=sys.stderr)
        return code
    finally:
        heard()
    return 0


def _runs_fairseq(args: argparse.Namespace) -> bool:
    """Whether there is data to read by a model, or some of it to compute again."""
    again = any(getattr(args, name, None) is not None for name in ("recompute", "results"))
    return again or bool(getattr(args, "data", None))


def command_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The parser of the command and all its subcommands."""
    parser = argparse.ArgumentParser(
        prog=prog or "fairseq-knnlm", description="Datastores and indexes of kNN language models."
    )
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    add_commands(commands, COMMANDS)
    return parser


def _check_words(words: Sequence[str]) -> None:
    """Refuses empty ones, which a variable that is not set leaves behind."""
    for flag, word in pairwise(["the first argument", *words]):
        if not word or re.fullmatch(r"--[\w-]+=", word):
            name = word.rstrip("=") or flag
            raise ConfigError(f"{name} is empty", expected="a name or number", found="''")


def _in_our_words(error: BaseException) -> BaseException:
    """A failure within fairseq, where that was loaded, as a user can mend it."""
    if "fairseq" not in sys.modules:
        return error
    from fairseq_knnlm.tasks.stock import in_our_words

    return in_our_words(error)
