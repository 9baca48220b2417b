"""What several subcommands share: naming a datastore, and running ``fairseq-eval-lm``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fairseq_knnlm.bounds import MOST_ENTRIES, check_range
from fairseq_knnlm.datastore import Datastore, outline
from fairseq_knnlm.datastore.legacy import is_legacy
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.runs.places import check_datastore_output, check_new_datastore
from fairseq_knnlm.runs.stores import name_foreign, open_store


def add_commands(parsers: Any, commands: Mapping[str, Any], typed: str = "") -> None:
    """Adds a parser for each subcommand, each of which has ``HELP``, ``EXAMPLE`` and its arguments.

    Args:
        parsers: what ``add_subparsers`` returned.
        commands: by name.
        typed: what stands before the name, behind ``fairseq-knnlm``.
    """
    for name, command in commands.items():
        what = command.HELP
        parser = parsers.add_parser(
            name,
            help=what,
            description=f"{what[0].upper()}{what[1:]}.",
            epilog=f"example: fairseq-knnlm {typed}{name} {command.EXAMPLE}",
        )
        command.add_arguments(parser)


def add_store(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """The arguments that name a datastore to read."""
    parser.add_argument(
        "--dstore",
        required=required,
        type=Path,
        help="datastore folder, or PREFIX of urvashik/knnlm",
    )
    parser.add_argument("--dstore-size", type=int, help="entries, for files of urvashik/knnlm")
    parser.add_argument(
        "--dstore-fp16", action="store_true", help="those files are float16 and int16"
    )


def check_store(args: argparse.Namespace) -> None:
    """Refuses sizes that no datastore has."""
    check_range("--dstore-size", args.dstore_size, 1, MOST_ENTRIES, "counts entries")


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """The argument that names a calibration where there is no datastore beside which it lies."""
    parser.add_argument(
        "--calibration",
        type=Path,
        help="in the place of --dstore: the calibration of a table that `columns` made",
    )


def has_place(args: argparse.Namespace) -> bool:
    """Whether the arguments name a datastore or a calibration.

    Raises:
        ConfigError: where they name both, or give a size to no datastore.
    """
    sizes = {"--dstore-size": args.dstore_size, "--dstore-fp16": args.dstore_fp16}
    of_store = [flag for flag, given in ({"--dstore": args.dstore} | sizes).items() if given]
    if args.calibration is not None and of_store:
        raise ConfigError(
            "a calibration lies beside its datastore",
            expected="--dstore DSTORE; or, of columns, --calibration FILE alone",
            found=f"--calibration and {', '.join(of_store)}",
            do="leave one out",
        )
    return args.dstore is not None or args.calibration is not None


def calibration_place(args: argparse.Namespace) -> tuple[Datastore | None, Path]:
    """The datastore that the arguments name, if any, and where its calibration lies."""
    if args.dstore is None:
        return None, args.calibration
    store = opened(args)
    return store, store.calibration_path


def check_ours(path: Path) -> None:
    """Refuses a datastore that cannot be changed, being files of urvashik/knnlm.

    Raises:
        ConfigError: where it is one.
    """
    if is_legacy(path):
        raise ConfigError(
            f"{path} is a datastore of urvashik/knnlm, which cannot be changed",
            expected="a datastore folder",
            found=f"{path.name}_keys.npy and {path.name}_vals.npy",
            do="make one of it with `fairseq-knnlm import`",
        )


def opened(
    args: argparse.Namespace, vocabulary: int | None = None, *, load_keys: bool = True
) -> Datastore:
    """The datastore that the arguments name."""
    if not is_legacy(args.dstore):
        name_foreign(args.dstore_size, args.dstore_fp16)
    return open_store(
        args.dstore,
        rows=args.dstore_size,
        fp16=args.dstore_fp16,
        vocabulary=vocabulary,
        load_keys=load_keys,
    )


def outlined(args: argparse.Namespace) -> Datastore:
    """The same, whose arrays may be damaged."""
    return opened(args) if is_legacy(args.dstore) else outline(args.dstore)


def check_new(flag: str, path: Path, *, goes_on: bool = False) -> None:
    """Refuses a place where no datastore can be made; one in the making may go on."""
    check_new_datastore(flag, path, {}, goes_on=goes_on)
    check_datastore_output(flag, path)


def evaluate(data: str, flags: Sequence[str]) -> None:
    """Runs ``fairseq-eval-lm`` in this process, with this package's task."""
    import fairseq_knnlm.tasks  # noqa: F401  before fairseq, of which it keeps noise off the screen

    from fairseq_cli import eval_lm  # isort: skip

    for name in ("fairseq", "fairseq_cli"):  # whose log begins with every flag there is
        logging.getLogger(name).setLevel(logging.WARNING)
    package = Path(__file__).absolute().parents[1]  # as it was imported
    sys.argv = ["fairseq-eval-lm", data, "--user-dir", str(package), "--task", "knn_lm", *flags]
    eval_lm.cli_main()
